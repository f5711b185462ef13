"""The profiler request of ``launch.py --profile``, picked up by what traces itself."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path

FIRST_STEP, LAST_STEP = 3, 6  # counted from the start of this process; the first ones compile

_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("profile_folder", default=None)


@contextlib.contextmanager
def requested(folder: Path | None) -> Iterator[None]:
    """What runs inside writes a trace to ``folder``; None: it does not."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def folder() -> Path | None:
    """Where a trace is wanted, or None."""
    return _folder.get()
