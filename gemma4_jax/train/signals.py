"""Stopping a run: SIGTERM and Ctrl-C as exceptions outside training, as a flag inside it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asked the run to end; ``signal`` is its number. Like KeyboardInterrupt, no handler of errors takes it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM raises ``Interrupted`` at once (Ctrl-C raises KeyboardInterrupt anyway). Main thread only, else nothing."""

    def stop(number, _):
        raise Interrupted(number)

    with _handlers({signal.SIGTERM: stop}):
        yield


class StopFlag:
    """Holds the first signal that came while ``collect`` was active; the loop looks at it between steps."""

    def __init__(self):
        self.signal: int | None = None

    @contextlib.contextmanager
    def collect(self) -> Iterator[StopFlag]:
        """Signals only set the flag in here, so that a step or a checkpoint is never cut in half."""

        def note(number, _):
            self.signal = self.signal or number

        with _handlers(dict.fromkeys(STOP_SIGNALS, note)):
            yield self


@contextlib.contextmanager
def _handlers(handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield
        return
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
