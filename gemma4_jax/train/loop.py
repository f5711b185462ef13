"""The one training loop: steps, evaluation, checkpoints, metrics, stopping and going on.

The loop is a function of the checkpoint it starts from: weights, moments, step, random key and the data iterator's place
all come from it, so N steps and N/2 + a new process + N/2 give the same bits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import DataError
from gemma4_jax.train import distributed, plots, profiling
from gemma4_jax.train.checkpoints import Checkpoints
from gemma4_jax.train.metrics import MetricsWriter, NoMetrics, Progress
from gemma4_jax.train.signals import Interrupted, StopFlag
from gemma4_jax.train.state import TrainState, from_items, to_items
from gemma4_jax.train.step import STOP_VOTES, eval_means
from gemma4_jax.train.trainer import Trainer

log = logging.getLogger(__name__)


class Data(Protocol):
    """What the loop needs from a data set."""

    def train_iterator(self) -> Iterator[Mapping[str, np.ndarray]]:
        """An endless Grain iterator of this process's rows, from the beginning; Orbax saves and sets its place."""

    def heldout_batches(self, limit: int) -> Iterable[Mapping[str, np.ndarray]]:
        """The same at most ``limit`` batches each time (0: all), never of a text that is trained on."""

    def count_bytes(self, batch: Mapping[str, np.ndarray]) -> int:
        """UTF-8 bytes of the text that a batch's supervised targets spell."""


@dataclasses.dataclass
class Totals:
    """What a run has used up, over all its processes' lives; kept in the checkpoints."""

    tokens: float = 0.0
    seconds: float = 0.0
    input_seconds: float = 0.0
    timed_tokens: float = 0.0
    empty_steps: float = 0.0
    skipped_steps: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but each process's first one, which compiles; without evaluation and checkpoints."""
        return self.timed_tokens / self.seconds if self.seconds else 0.0

    @property
    def input_wait_share(self) -> float:
        """The part of the same seconds in which the loop waited for a batch."""
        return self.input_seconds / self.seconds if self.seconds else 0.0


@dataclasses.dataclass
class TrainResult:
    """End of a run: the state, the last evaluation's means (with ``bits_per_byte``), and the totals."""

    state: TrainState
    evaluation: dict[str, float]
    totals: Totals


def train(
    trainer: Trainer,
    data: Data,
    workdir: Path,
    *,
    files: Mapping[str, str],
    given: Mapping[str, jax.Array] | None = None,
) -> TrainResult:
    """Train from the newest checkpoint in ``workdir``, or from the beginning, to the configured number of steps.

    Args:
      trainer: what to run.
      data: batches.
      workdir: gets ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``plots/``.
      files: plain files that go into every checkpoint (model configuration, tokenizer), by name.
      given: weights to begin with, see ``Trainer.init``; a checkpoint in ``workdir`` goes before them.

    Raises:
      Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
      DataError: the data ended.
      CheckpointError: the checkpoints there hold another model, or cannot be written.
      ConfigError: ``train.keep_best`` names no metric.
      FloatingPointError: a loss or gradient that is not finite, with ``train.nan_policy`` "stop".
    """
    return _Run(trainer, data, workdir, files, given).to_the_end()


class _Run:
    def __init__(self, trainer: Trainer, data: Data, workdir: Path, files: Mapping[str, str], given=None):
        self.trainer, self.data, self.workdir, self.files = trainer, data, workdir, files
        self.options = trainer.options
        best = self.options.keep_best
        names = [*eval_means(collections.defaultdict(float), trainer.loss), "bits_per_byte"]
        if best and best not in names:
            raise unknown_name("train.keep_best", best, names)
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.options.keep, best)
        self.iterator = data.train_iterator()
        self.state, self.step, self.totals, self.evaluation = self._start(given)
        self.saved_step = self.step
        self.voted, self.waited = False, 0.0
        self.evaluated_step = self.step if self.evaluation else -1
        self.window: list[dict[str, float]] = []

    def _start(self, given) -> tuple[TrainState, int, Totals, dict[str, float]]:
        """State, step, totals, and of a finished run its evaluation."""
        self.checkpoints.clean()
        restored = self.checkpoints.restore_newest({**to_items(self.trainer.abstract), "data": self.iterator})
        if restored is None:
            return self.trainer.init(given), 0, Totals(), {}
        items, metadata = restored
        log.info("going on from step %d", metadata["step"])
        step = metadata["step"]
        evaluation = metadata.get("evaluation", {}) if step == self.options.steps else {}
        return from_items(items, self.trainer.abstract), step, Totals(**metadata["totals"]), evaluation

    def to_the_end(self) -> TrainResult:
        total = self.options.steps
        self.first_step = self.step
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            self.writer = MetricsWriter(self.workdir, self.step) if distributed.is_main() else NoMetrics()
            stack.callback(self.writer.close)
            self.progress = Progress(total, self.step)
            stack.callback(self.progress.close)
            self.stop = stack.enter_context(StopFlag().collect())
            self.profiler = stack.enter_context(_Profiler())
            pending = None
            self.clock = time.perf_counter()
            while self.step < total and not self._stopped():
                pending = self._advance(pending)
                self.step += 1
                due = self.step == total or self._stopped()
                evaluate = self.step == total or _is_due(self.step, self.options.eval_every)
                checkpoint = due or _is_due(self.step, self.options.checkpoint_every)
                if evaluate or checkpoint:
                    self._collect(*pending)
                    pending = None
                    self._between_steps(evaluate, checkpoint)
            if pending is not None:
                self._collect(*pending)
            if self._stopped():
                self._save()
                self.checkpoints.wait()
                raise Interrupted(self.stop.signal or signal.SIGTERM)
            if self.evaluated_step != total:  # its checkpoint is that of a longer run, stopped at this step
                self.evaluation = self._evaluate()
            self.checkpoints.wait()
        if distributed.is_main():
            plots.run_plots(self.workdir)
        return TrainResult(self.state, self.evaluation, self.totals)

    def _stopped(self) -> bool:
        """Whether to end early: on all processes at the same step, see ``STOP_VOTES``."""
        return self.voted if distributed.active() else self.stop.signal is not None

    def _advance(self, pending):
        """Dispatch one step, then fetch the metrics of the one before, while the device works on this one."""
        asked = time.perf_counter()
        batch = next(self.iterator, None)
        if self.step > self.first_step:  # as for all times: the first step compiles
            self.waited += time.perf_counter() - asked
        if batch is None:
            raise DataError(f"the training data ended after step {self.step} of {self.options.steps}")
        self.profiler.before(self.step - self.first_step)
        if distributed.active():
            votes = np.full(len(batch["tokens"]), self.stop.signal is not None, np.int32)
            batch = {**batch, STOP_VOTES: votes}
        self.state, metrics = self.trainer.train_step(self.state, self.trainer.place(batch))
        if pending is not None:
            self._collect(*pending)
        return self.step + 1, metrics

    def _collect(self, step: int, metrics) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.voted |= values.pop(STOP_VOTES, 0.0) > 0
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self._check_finite(step, values)
        self.totals.tokens += values["tokens"]
        self.totals.empty_steps += values["empty_steps"]
        self.totals.skipped_steps += values.get("skipped_steps", 0.0)
        if step > self.first_step + 1:  # the first one compiles
            self.totals.seconds += seconds
            self.totals.timed_tokens += values["tokens"]
        self.window.append({**values, "seconds": seconds})
        if step % self.options.log_every == 0 or step == self.options.steps:
            self._log(step)

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        if self.options.nan_policy == "skip" or all(math.isfinite(values[n]) for n in ("loss", "gradient_norm")):
            return
        raise FloatingPointError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; the newest checkpoint is of step "
            f"{self.saved_step}. Lower optimizer.learning_rate {values['learning_rate']:.3g}, or set train.nan_policy=skip"
        )

    def _log(self, step: int) -> None:
        rows, self.window = self.window, []
        if step - len(rows) == self.first_step and len(rows) > 1:
            timed = rows[1:]  # the first one compiles
        else:
            timed = rows
        good = [row for row in rows if not row.get("skipped_steps")] or rows
        values = {name: sum(row[name] for row in good) / len(good) for name in rows[0] if name != "seconds"}
        values["empty_steps"] = self.totals.empty_steps
        if self.options.nan_policy == "skip":
            values["skipped_steps"] = self.totals.skipped_steps
        seconds = max(sum(row["seconds"] for row in timed), 1e-9)
        values["tokens_per_second"] = sum(row["tokens"] for row in timed) / seconds
        values["input_wait_share"] = self.waited / seconds
        self.totals.input_seconds += self.waited
        self.waited = 0.0
        self.writer.write(step, "train", values)
        self.progress.show(step, values["loss"], values["tokens_per_second"])

    def _between_steps(self, evaluate: bool, checkpoint: bool) -> None:
        if evaluate:
            self.evaluation = self._evaluate()
        if checkpoint:
            self._save()
        self.clock = time.perf_counter()

    def _evaluate(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        size = 0
        options = self.options
        limit = options.final_eval_batches if self.step == options.steps else options.eval_batches
        for batch in self.data.heldout_batches(limit):
            found = jax.device_get(
                self.trainer.eval_step(self.state.evaluated, self.state.frozen, self.trainer.place(batch))
            )
            size += self.data.count_bytes(batch)
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
        if not sums:
            raise DataError("the held-out data is empty: nothing to evaluate on")
        means = eval_means(sums, self.trainer.loss)
        means["bits_per_byte"] = sums["next_token"] / math.log(2.0) / max(distributed.total(size, self.trainer.mesh), 1)
        self.writer.write(self.step, "eval", means)
        self.evaluated_step = self.step
        return means

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        items: dict[str, Any] = {**to_items(self.state), "data": self.iterator}
        metadata: dict[str, Any] = {"totals": dataclasses.asdict(self.totals)}
        if self.evaluated_step == self.step:
            metadata["evaluation"] = self.evaluation
        self.checkpoints.save(self.step, items, files=self.files, metadata=metadata)
        self.saved_step = self.step


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Profiler:
    """Traces a few steps of this process when ``launch.py --profile`` asked for it."""

    def __init__(self):
        self.folder, self.active = profiling.folder(), False

    def __enter__(self):
        return self

    def before(self, steps_done: int) -> None:
        """Called ahead of each step with the number of steps this process has done."""
        if self.folder is None:
            return
        if not self.active and steps_done == profiling.FIRST_STEP:
            jax.profiler.start_trace(str(self.folder))
            self.active = True
        elif self.active and steps_done == profiling.LAST_STEP:
            self._stop()

    def __exit__(self, *_):
        if self.active:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.active, self.folder = False, None
