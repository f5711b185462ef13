"""The memory plan: numbers from the compiled step, advice, made-up devices; what the program must never gather."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import mini_train as mini
import pytest

import launch
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import memory_plan
from gemma4_jax.train.sharding import MeshConfig

ROOT = Path(launch.__file__).parent
VOCAB, ROWS, LENGTH = 1536, 16, 24


def wide(mesh):
    """A mini trainer whose vocabulary is the largest number anywhere, with its loss in chunks."""
    model = mini.mini_config(vocab_size=VOCAB, remat="full")
    loss = LossConfig(mtp_steps=2, token_chunk=16, vocab_chunk=96)
    return mini.mini_trainer(model=model, loss=loss, mesh=mesh, batch_size=ROWS)


@pytest.fixture(scope="module", params=[(1, 8, 1), (2, 2, 2)], ids=["fsdp", "mixed"])
def program(request):
    """The trainer, its plan and the optimised HLO of its step."""
    trainer = wide(request.param)
    batch = trainer.abstract_batch(ROWS, LENGTH)
    plan = memory_plan.measure(trainer, batch)
    return trainer, plan, trainer.train_step.lower(trainer.abstract, batch).compile().as_text()


def test_numbers_are_those_of_one_device(program):
    trainer, plan, _ = program
    cut = trainer.mesh.shape["fsdp"] * trainer.mesh.shape["tensor"]
    whole = sum(4 * math.prod(leaf.shape) for leaf in trainer.network.shapes.values())
    assert whole / cut <= plan.weights < 1.3 * whole / cut  # vectors are not cut
    assert 2 * plan.gradients <= plan.moments <= 2 * plan.gradients + 64
    assert plan.batch == ROWS * LENGTH * (3 * 4 + 1) // (trainer.mesh.size // trainer.mesh.shape["tensor"])
    assert plan.peak >= plan.weights + plan.moments + plan.batch + plan.temporaries
    assert plan.temporaries > plan.gradients / 2
    assert plan.platform == "8 x cpu"
    assert "peak" in plan.table() and "memory per device, compiled for 8 x cpu" in plan.table()


def gathered(hlo):
    """Shapes that collectives make whole, largest first."""
    found = re.findall(r"= (?:\()?\w+\[([\d,]+)\][^\n]*? all-gather(?:-start)?\(", hlo)
    return sorted((tuple(map(int, shape.split(","))) for shape in found), key=math.prod, reverse=True)


def test_neither_table_nor_logits_are_gathered(program):
    """fsdp gathers one layer's weights at a time, the table in chunks of the vocabulary."""
    _, _, hlo = program
    shapes = gathered(hlo)
    assert shapes, "fsdp gathers something"
    for shape in shapes:
        assert max(shape) < VOCAB // 2, f"gathers {shape}: a whole side of the table or of the logits"
        assert math.prod(shape) < VOCAB * 16, f"gathers {shape}: as much as the table"


def plan_of(**changes):
    gigabyte = 10**9
    values = dict(weights=3, moments=12, average=0, batch=0, gradients=3, temporaries=8, peak=23)
    values = {name: value * gigabyte for name, value in (values | changes).items()}
    return memory_plan.MemoryPlan(**values, platform="8 x cpu")


CONFIG = {
    "mesh": {"fsdp": 8}, "optimizer": {"name": "adamw"}, "data": {"batch_size": 64, "seq_len": 128},
    "train": {"accumulation": 2},
}  # fmt: skip


def test_advice_says_what_to_change():
    lines = memory_plan.advice(plan_of(), 16, CONFIG, "none")
    assert lines[0] == "does not fit into 16 GB: 7.000 GB too much. Change:"
    text = "\n".join(lines)
    for part in (
        "mesh.fsdp 8 -> 18", "optimizer.name -> adafactor: takes nearly all of the moments' 12.000 GB",
        "model_overrides.remat none -> full", "train.accumulation 2 -> more: 32 rows at a time", "data.seq_len 128",
    ):  # fmt: skip
        assert part in text
    assert memory_plan.advice(plan_of(), 24, CONFIG, "none") == ["fits into 24 GB with 1.000 GB to spare"]
    small = memory_plan.advice(plan_of(moments=0, gradients=0), 16, CONFIG, "full")
    assert not any("mesh.fsdp" in line or "remat" in line for line in small)


def test_devices_to_plan_on():
    assert memory_plan.plan_devices(MeshConfig()) is None
    assert memory_plan.plan_devices(MeshConfig(1, 8, 1)) is None
    assert memory_plan.plan_devices(MeshConfig(1, 2, 2)) == jax.devices()[:4]
    with pytest.raises(ConfigError, match="the mesh needs 16 devices, but there are 8, and no more can be made up"):
        memory_plan.plan_devices(MeshConfig(1, 16, 1))


def test_dry_run_makes_devices_up():
    """On a machine with one device, for a mesh of twelve; nothing is left behind."""
    fields = {
        "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 3, "data.batch_size": 8, "train.memory_limit_gb": 0.0001,
        "model_overrides.num_attention_heads": 6, "model_overrides.hidden_size": 48, "model_overrides.num_hidden_layers": 2,
        "model_overrides.intermediate_size": 48, "model_overrides.vocab_size": 480, "data.vocab_size": 480,
        "model_overrides.drafter.num_attention_heads": 6, "model_overrides.drafter.num_hidden_layers": 1,
        "model_overrides.drafter.intermediate_size": 48, "loss.mtp_steps": 1,
    }  # fmt: skip
    command = [
        sys.executable,
        "launch.py",
        "--config",
        "configs/pretrain.py:tiny",
        "--workdir",
        "/nonexistent/run",
        "--dry_run",
    ]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "mesh: data 1 x fsdp 4 x tensor 3" in done.stdout
    assert "memory per device, compiled for 12 x cpu" in done.stdout
    assert "does not fit into 0.0001 GB" in done.stdout and "optimizer.name -> adafactor" in done.stdout


def test_options_are_checked():
    options = mini.mini_trainer().options
    for name, value in (("memory_limit_gb", -1.0), ("ema_decay", 1.0), ("nan_policy", "ignore")):
        with pytest.raises(ConfigError, match=f"train.{name}"):
            dataclasses.replace(options, **{name: value})
