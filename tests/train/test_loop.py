"""The loop: going on bit for bit, stopping, evaluating, logging."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import mini_train as mini
import numpy as np
import pytest

import gemma4_jax
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.train import checkpoints, loop, metrics, profiling, trees
from gemma4_jax.train.signals import Interrupted

STEPS = 6
HELPERS = Path(mini.__file__).parent
ROOT = Path(gemma4_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def short():
    """A trainer of ``STEPS`` steps that evaluates and saves on the way; compiled once."""
    return mini.mini_trainer(steps=STEPS, eval_every=4, eval_batches=1, checkpoint_every=4, keep=9)


@pytest.fixture(scope="module")
def uninterrupted(short, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    data = mini.MiniData()
    result = loop.train(short, data, workdir, files={"config.json": "{}"})
    return workdir, data, result


def saved_state(workdir, step=STEPS):
    """Every stored number of a checkpoint: weights, moments, step, key; and the data iterator's place."""
    folder = workdir / "checkpoints" / checkpoints.step_name(step)
    items = {item: trees.unflatten(checkpoints.describe(folder, item)) for item in ("params", "train")}
    arrays = trees.flatten(checkpoints.restore(folder, items))
    return {name: np.asarray(leaf) for name, leaf in arrays.items()}, (folder / "data").joinpath(
        "process_0-of-1.json"
    ).read_text()


def assert_same_state(a, b):
    arrays_a, place_a = saved_state(a)
    arrays_b, place_b = saved_state(b)
    assert arrays_a.keys() == arrays_b.keys() and place_a == place_b
    for name, leaf in arrays_a.items():
        assert leaf.dtype == arrays_b[name].dtype
        assert leaf.tobytes() == arrays_b[name].tobytes(), name


def test_stop_and_go_on_in_this_process(short, uninterrupted, tmp_path):
    """SIGTERM at the third batch: the step is finished, a checkpoint written; the rest gives the same bits."""
    workdir, whole, result = uninterrupted
    first = mini.MiniData(stop_at=2)
    with pytest.raises(Interrupted) as stop:
        loop.train(short, first, tmp_path, files={"config.json": "{}"})
    assert stop.value.signal == signal.SIGTERM
    assert checkpoints.list_steps(tmp_path / "checkpoints") == [3]
    second = mini.MiniData()
    again = loop.train(short, second, tmp_path, files={"config.json": "{}"})
    assert first.seen + second.seen == whole.seen
    assert_same_state(tmp_path, workdir)
    assert again.evaluation == result.evaluation and again.totals.tokens == result.totals.tokens
    steps = [(row["kind"], row["step"]) for row in metrics.read_metrics(tmp_path)]
    assert steps == [(row["kind"], row["step"]) for row in metrics.read_metrics(workdir)]


def test_go_on_in_a_new_process(short, uninterrupted, tmp_path):
    with pytest.raises(Interrupted):
        loop.train(short, mini.MiniData(stop_at=2), tmp_path, files={})
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(HELPERS / "resume_run.py"), str(tmp_path), str(STEPS)]
    subprocess.run(command, env=environment, check=True, timeout=280)
    assert_same_state(tmp_path, uninterrupted[0])


def test_what_a_run_leaves(short, uninterrupted):
    workdir, _, result = uninterrupted
    assert checkpoints.list_steps(workdir / "checkpoints") == [4, 6]
    assert (checkpoints.newest(workdir) / "config.json").read_text() == "{}"
    rows = metrics.read_metrics(workdir)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4, 6]
    wanted = {
        "loss",
        "next_token_loss",
        "mtp_1_loss",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        "empty_steps",
    }
    assert wanted <= rows[0].keys()
    assert {"bits_per_byte", "acceptance_1", "acceptance_2", "mean_accepted"} <= result.evaluation.keys()
    assert rows[-1]["bits_per_byte"] == result.evaluation["bits_per_byte"]
    assert list((workdir / "tensorboard").iterdir())
    assert {p.name for p in (workdir / "plots").iterdir()} == {"loss.png", "acceptance.png"}
    assert int(jax.device_get(result.state.step)) == STEPS


def test_bits_per_byte_is_the_loss_over_all_held_out_rows(short, uninterrupted):
    """Independent of batching: nats summed over both held-out batches, over ln 2 times their bytes."""
    result = uninterrupted[2]
    batches = [mini.random_batch(8, seed=100), mini.random_batch(8, seed=101)]
    nats = [
        short.eval_step(result.state.params, result.state.frozen, short.place(batch))["next_token"] for batch in batches
    ]
    size = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert result.evaluation["bits_per_byte"] == pytest.approx(float(sum(nats)) / np.log(2) / size, rel=1e-6)


def test_a_finished_run_started_again_adds_nothing(short, uninterrupted):
    workdir, _, result = uninterrupted
    data = mini.MiniData()
    before = (workdir / "metrics.jsonl").read_bytes()
    again = loop.train(short, data, workdir, files={})
    assert data.seen == [] and again.evaluation == result.evaluation
    assert (workdir / "metrics.jsonl").read_bytes() == before


def poisoned(step, at, seen):
    """A train step whose loss is NaN in call number ``at``."""

    def run(state, batch):
        state, found = step(state, batch)
        seen.append(1)
        return state, found | {"loss": np.float32("nan")} if len(seen) == at else found

    return run


def test_a_loss_that_is_not_finite_stops_the_run(short, tmp_path, monkeypatch):
    """In time: the checkpoint of that very step is not written."""
    monkeypatch.setattr(short, "train_step", poisoned(short.train_step, 4, []))
    with pytest.raises(
        FloatingPointError, match=r"step 4: loss nan, gradient norm [\d.]+; the newest checkpoint is of step 0"
    ):
        loop.train(short, mini.MiniData(), tmp_path, files={})
    assert checkpoints.list_steps(tmp_path / "checkpoints") == []


@pytest.fixture(scope="module")
def careful():
    """Keeps an average and the best checkpoint, and skips what is not finite."""
    return mini.mini_trainer(
        steps=4, eval_every=2, eval_batches=1, final_eval_batches=1, checkpoint_every=2, keep=1, keep_best="bits_per_byte",
        ema_decay=0.5, nan_policy="skip",
    )  # fmt: skip


def test_average_and_best_checkpoint(careful, tmp_path):
    result = loop.train(careful, mini.MiniData(), tmp_path, files={})
    state = result.state
    means = {name: np.asarray(leaf) for name, leaf in state.average.items()}
    stored = trees.flatten(checkpoints.load_params(tmp_path))
    raw = trees.flatten(checkpoints.load_params(tmp_path, average=False))
    assert means.keys() == state.params.keys()
    for name, leaf in means.items():
        np.testing.assert_array_equal(np.asarray(stored[name]), leaf)
        np.testing.assert_array_equal(np.asarray(raw[name]), np.asarray(state.params[name]))
    batch = careful.place(mini.random_batch(8, seed=100))
    sums = careful.eval_step(state.average, state.frozen, batch)
    judged = float(sums["next_token"]) / float(sums["count_next_token"])
    assert result.evaluation["next_token_loss"] == pytest.approx(judged, rel=1e-6)
    bits = {row["step"]: row["bits_per_byte"] for row in metrics.read_metrics(tmp_path) if row["kind"] == "eval"}
    assert checkpoints.list_steps(tmp_path / "checkpoints") == sorted({min(bits, key=bits.get), 4})
    rows = [row for row in metrics.read_metrics(tmp_path) if row["kind"] == "train"]
    assert all(0 < row["update_ratio"] < 1 and row["skipped_steps"] == 0 for row in rows)


def test_a_skipped_step_changes_nothing_but_the_count(careful):
    state = careful.init()
    sick = max(state.params)
    state = dataclasses.replace(state, params={**state.params, sick: state.params[sick] * np.float32("nan")})
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    after, found = careful.train_step(state, careful.place(mini.random_batch()))
    assert float(found["skipped_steps"]) == 1.0 and not np.isfinite(float(found["loss"]))
    assert int(after.step) == int(before.step) + 1
    for a, b in zip(jax.tree.leaves((after.params, after.opt_state, after.average)),
                    jax.tree.leaves((before.params, before.opt_state, before.average)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(a), b)


def test_unknown_best_metric(careful, tmp_path, monkeypatch):
    monkeypatch.setattr(careful, "options", dataclasses.replace(careful.options, keep_best="bits"))
    with pytest.raises(ConfigError, match="unknown train.keep_best 'bits'.*next_token_loss"):
        loop.train(careful, mini.MiniData(), tmp_path, files={})
    with pytest.raises(ConfigError, match="checkpoint_every 3 is not a multiple of train.eval_every 2"):
        dataclasses.replace(careful.options, checkpoint_every=3)


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')  # a kill in the middle of a line
    writer = metrics.MetricsWriter(tmp_path, 2)
    writer.write(3, "train", {"loss": float("nan")})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, None)]


class Ending(mini.MiniData):
    """Three batches, nothing held out."""

    def train_iterator(self):
        return iter([mini.random_batch(8, seed=i) for i in range(3)])

    def heldout_batches(self, limit):
        return []


def test_data_that_ends(short, tmp_path, monkeypatch):
    # A plain list iterator cannot be saved; only the errors are looked at here.
    monkeypatch.setattr(checkpoints.Checkpoints, "save", lambda *_, **__: None)
    with pytest.raises(DataError, match="ended after step 3 of 6"):
        loop.train(short, Ending(), tmp_path, files={})
    run = loop._Run(short, Ending(), tmp_path, {})
    with pytest.raises(DataError, match="held-out data is empty"):
        run._evaluate()


def test_progress_on_a_terminal_and_off_it():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    times = iter([0.0, 10.0, 20.0, 75.0, 80.0])
    quiet = io.StringIO()
    progress = metrics.Progress(100, 0, quiet, clock=lambda: next(times))
    for step in (10, 20, 50, 60):
        progress.show(step, 1.5, 1234.0)
    progress.close()
    assert quiet.getvalue() == "step 50/100  loss 1.5000  1,234 tokens/s  1:15 left\n"
    loud = Terminal()
    times = iter([0.0, 1.0])
    progress = metrics.Progress(4, 2, loud, clock=lambda: next(times))
    progress.show(3, 0.25, 10.0)
    progress.close()
    assert loud.getvalue().startswith("\rstep 3/4  loss 0.2500  10 tokens/s  0:01 left") and loud.getvalue()[-1] == "\n"


def test_profiler_writes_a_trace(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with profiling.requested(tmp_path / "profile"), loop._Profiler() as profiler:
        for done in range(8):
            profiler.before(done)
    assert calls == [str(tmp_path / "profile"), "stop"]
    with profiling.requested(tmp_path / "profile"), loop._Profiler() as profiler:
        for done in range(5):
            profiler.before(done)  # ends inside the window
    assert calls[2:] == [str(tmp_path / "profile"), "stop"]
    with loop._Profiler() as profiler:
        profiler.before(profiling.FIRST_STEP)
    assert len(calls) == 4
