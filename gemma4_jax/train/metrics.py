"""Where numbers go while a run trains: ``metrics.jsonl``, TensorBoard events and the progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from gemma4_jax.train.checkpoints import write_atomically

QUIET_SECONDS = 60.0  # between progress lines when nobody watches a terminal
METRICS = "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``, oldest first; a last line cut by a kill is left out."""
    path = Path(workdir) / METRICS
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


class MetricsWriter:
    """Appends rows ``{"step", "kind": "train" | "eval", …}``; a resumed run drops rows of steps that it repeats.

    A number that is not finite is stored as null in the JSON lines, which have no spelling for it.
    """

    def __init__(self, workdir: Path, resume_step: int):
        rows = [row for row in read_metrics(workdir) if row["step"] <= resume_step]
        write_atomically(workdir / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = (workdir / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One row, flushed."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


class NoMetrics:
    """Takes the place of the writer in the processes of a run that are not the first."""

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Progress:
    """The progress line: step, loss, tokens/s, time left. One line a minute when ``stream`` is not a terminal."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO | None = None, clock=time.monotonic):
        self._total, self._first = total_steps, first_step
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._start = self._last_shown = clock()

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Called after each logged step; decides itself whether to print."""
        now = self._clock()
        if not self._terminal and now - self._last_shown < QUIET_SECONDS and step < self._total:
            return
        self._last_shown = now
        done = step - self._first
        left = (now - self._start) / done * (self._total - step) if done > 0 else 0.0
        line = (
            f"step {step}/{self._total}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )
        self._stream.write(f"\r{line:<78}" if self._terminal else line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line that a terminal shows."""
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()
