"""One device, eight under every mesh, two and four real processes: the same run."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import mini_train as mini
import numpy as np
import pytest

import gemma4_jax
from gemma4_jax.errors import ConfigError
from gemma4_jax.train import checkpoints, distributed, metrics, trees
from gemma4_jax.train.distributed import DistributedConfig
from gemma4_jax.train.sharding import MeshConfig, make_mesh

STEPS = 20
HELPERS = Path(mini.__file__).parent
ROOT = Path(gemma4_jax.__file__).parents[1]


def losses_of(mesh, accumulation=1):
    """Losses of a run's steps, without a loop."""
    trainer = mini.mini_trainer(mesh=mesh, optimizer=mini.SLOW, steps=STEPS, accumulation=accumulation)
    state, losses = trainer.init(), []
    iterator = mini.MiniData().train_iterator()
    for _ in range(STEPS):
        state, found = trainer.train_step(state, trainer.place(next(iterator)))
        losses.append(float(found["loss"]))
    return losses


@pytest.fixture(scope="module")
def one_device():
    return losses_of((1, 1, 1))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)], ids=["data", "fsdp", "tensor", "mixed"])
def test_meshes_train_alike(one_device, mesh):
    np.testing.assert_allclose(losses_of(mesh), one_device, atol=1e-5, rtol=0)


def run_processes(workdir, stop, count, devices, mesh):
    environment = os.environ | {
        "PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(HELPERS / "process_run.py"), workdir, stop, count, STEPS, *mesh]
    return subprocess.run(list(map(str, command)), env=environment, timeout=290, check=False).returncode


def rows_of(workdir, count):
    """First tokens of the rows of each batch, the parts of all processes side by side."""
    parts = [(workdir / f"rows-{count}-{process}").read_text().splitlines() for process in range(count)]
    return [" ".join(lines).split() for lines in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Two processes of four devices, one of which is told to stop; then four processes of two on another mesh go on."""
    workdir = tmp_path_factory.mktemp("processes") / "run"
    assert run_processes(workdir, 9, 2, 4, (2, 4, 1)) == 143
    stopped = checkpoints.list_steps(workdir / "checkpoints")[-1]
    assert run_processes(workdir, 0, 4, 2, (1, 4, 2)) == 0
    return workdir, stopped


def test_processes_train_like_one_device(processes, one_device):
    workdir, stopped = processes
    assert 10 <= stopped <= 12  # asked with batch 10: all stop together, once all have heard of it
    found = {row["step"]: row["loss"] for row in metrics.read_metrics(workdir) if row["kind"] == "train"}
    np.testing.assert_allclose([found[step] for step in range(1, STEPS + 1)], one_device, atol=1e-5, rtol=0)
    whole = mini.MiniData()
    iterator = whole.train_iterator()
    for _ in range(STEPS):
        next(iterator)
    order = [list(map(str, rows)) for rows in whole.seen]
    assert rows_of(workdir, 2)[:stopped] == order[:stopped]
    assert rows_of(workdir, 4) == order[stopped:]


def test_checkpoints_of_processes_are_whole(processes):
    """Written by four processes, read by this one; the numbers of the evaluation are those over all parts."""
    workdir, _ = processes
    folder = checkpoints.newest(workdir)
    assert folder.name == checkpoints.step_name(STEPS)
    assert len(list((folder / "data").glob("process_*-of-4.json"))) == 4
    trainer = mini.mini_trainer(optimizer=mini.SLOW)
    params = checkpoints.load_params(folder)
    flat = {name: jax.numpy.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    trained, frozen = ({n: flat[n] for n in part} for part in (trainer.abstract.params, trainer.abstract.frozen))
    nats = size = 0.0
    for batch in mini.MiniData().heldout_batches(0):
        nats += float(trainer.eval_step(trained, frozen, trainer.place(batch))["next_token"])
        size += batch["loss_mask"].sum()
    (last,) = [row for row in metrics.read_metrics(workdir) if row["kind"] == "eval" and row["step"] == STEPS]
    assert last["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)


class _Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("mesh", "per_process", "process", "expected"),
    [
        ((2, 4, 1), 4, 1, (1, 2)),
        ((1, 4, 2), 2, 3, (3, 4)),
        ((1, 1, 8), 4, 1, (0, 1)),  # cut along tensor only: both feed all rows
        ((1, 2, 4), 2, 1, (0, 2)),  # two processes share the first half
        ((8, 1, 1), 8, 0, (0, 1)),
    ],
)
def test_parts_of_a_batch(monkeypatch, mesh, per_process, process, expected):
    size = int(np.prod(mesh))
    devices = np.asarray([_Device(i // per_process) for i in range(size)], object).reshape(mesh)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    fake = type("Mesh", (), {"devices": devices, "shape": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))})
    assert distributed.batch_part(fake) == expected


def test_uneven_parts_are_refused(monkeypatch):
    devices = np.asarray([_Device(i // 3) for i in range(6)], object).reshape(1, 3, 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    fake = type("Mesh", (), {"devices": devices, "shape": {"data": 1, "fsdp": 3, "tensor": 2}})
    with pytest.raises(ConfigError, match=r"process 0 holds pieces \[0, 1\] of 3 on axes data x fsdp"):
        distributed.batch_part(fake)


def test_one_process_needs_no_others():
    distributed.start(DistributedConfig())
    assert distributed.is_main() and not distributed.active()
    assert distributed.total(3.0, make_mesh(MeshConfig())) == 3.0
    done = []
    distributed.on_main(lambda: done.append(1))
    assert done == [1]
    assert distributed.section({"distributed": {"start": "auto"}}).start == "auto"
    assert distributed.section({}) == DistributedConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": "slurm"}, "unknown distributed.start 'slurm'.*none, auto, explicit"),
        ({"start": "explicit"}, "distributed.coordinator is ''; it must be HOST:PORT"),
        ({"start": "explicit", "coordinator": "h:1"}, "distributed.num_processes is 0"),
        ({"start": "explicit", "coordinator": "h:1", "num_processes": 2}, "process_id is -1; it must be in 0…1"),
        ({"cpu_collectives": "nccl"}, "unknown distributed.cpu_collectives 'nccl'"),
        ({"timeout_seconds": 0}, "distributed.timeout_seconds is 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**fields)


NO_SCHEDULER = """
from gemma4_jax.errors import ConfigError
from gemma4_jax.train import distributed
try:
    distributed.start(distributed.DistributedConfig(start="auto"))
except ConfigError as error:
    print(error)
"""


def test_no_scheduler_is_one_line():
    done = subprocess.run([sys.executable, "-c", NO_SCHEDULER], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.startswith("distributed.start 'auto' failed: ") and done.stdout.count("\n") == 1
