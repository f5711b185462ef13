"""Sides of a benchmark as processes of their own that take turns.

A worker is a module run with ``python -m MODULE SIDE JSON`` whose main calls ``serve``: it prepares, says so, and then measures
once per request. Turns alternate, so that whatever else the machine does falls on all sides alike; medians are compared.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from gemma4_jax.train import profiling

Measurement = dict[str, float]
OURS = "ours"  # how the names of our own sides begin
# Of which the last counts: the first has to get back the memory that the machine took in the pause.
MEASURED_PER_TURN = 2
SETTLE_SECONDS = 0.3  # before a turn, until the threads of the one before have gone to sleep


class Worker:
    """One side, as a context manager that ends its process. It starts with ``start`` and is ready after ``wait``.

    Raises:
      RuntimeError: the process ended before it answered (its own error is on stderr).
    """

    def __init__(self, module: str, side: str, options: dict[str, Any], threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        environment["PYTHONPATH"] = path  # the command may be run from any folder
        if profiling.folder() and side.startswith(OURS):
            options = {**options, "trace": str(profiling.folder().resolve() / side)}
        self.side, self.process = side, None
        self._command, self._environment = [sys.executable, "-m", module, side, json.dumps(options)], environment

    def __enter__(self) -> Worker:
        return self

    def start(self) -> None:
        """Let the process prepare."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )

    def __exit__(self, *exception):
        if self.process is None:
            return
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def wait(self) -> Measurement:
        """The next line that the process writes."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.side} side of the benchmark ended with exit code {self.process.wait()}")
        return json.loads(line)

    def measure(self) -> Measurement:
        """One more measurement."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.wait()


def peak_bytes() -> int:
    """The largest resident memory of this process.

    On Linux not that of ``getrusage``, which begins with what the parent held when it made this process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(prepare: Callable[[], Callable[[], Measurement]], trace: str | None = None) -> None:
    """The worker's side: prepare, then answer each line of stdin with a measurement. Libraries' chatter goes to stderr.

    trace: folder of a profiler trace of one more measurement, after the last turn.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    measure = prepare()
    print(json.dumps({"ready": 1.0}), file=answers, flush=True)
    for _ in sys.stdin:
        result = [measure() for _ in range(MEASURED_PER_TURN)][-1]
        result["peak_bytes"] = peak_bytes()
        print(json.dumps(result), file=answers, flush=True)
    if trace:
        with jax.profiler.trace(trace):
            measure()


def alternate(workers: Iterable[Worker], rounds: int) -> dict[str, Measurement]:
    """Medians of ``rounds`` measurements of every side, taken in turns; the largest ``peak_bytes``."""
    workers = list(workers)
    # One after another: threads that wait for each other in a spin crawl beside a side that compiles.
    for worker in workers:
        worker.start()
        worker.wait()
    taken = {worker.side: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            time.sleep(SETTLE_SECONDS)
            taken[worker.side].append(worker.measure())
    return {side: _summary(rows) for side, rows in taken.items()}


def _summary(rows: list[Measurement]) -> Measurement:
    summary = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    summary["peak_bytes"] = max(row["peak_bytes"] for row in rows)
    return summary
