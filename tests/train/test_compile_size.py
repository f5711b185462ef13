"""Depth must not grow the program: the repeating layer group is one loop body."""

import jax
import pytest

from gemma4_jax.config import get_preset
from gemma4_jax.losses import LossConfig
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.sharding import MeshConfig
from gemma4_jax.train.trainer import Trainer, TrainOptions


def lowered_size(layers):
    model = get_preset(
        "tiny", vision=None, audio=None, vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=layers
    )
    trainer = Trainer(
        model, loss=LossConfig(mtp_steps=2), optimizer=OptimizerConfig(warmup_steps=1), options=TrainOptions(steps=2),
        mesh=MeshConfig(data=1, fsdp=1), seed=0, batch_size=2, devices=jax.devices()[:1],
    )  # fmt: skip
    return len(trainer.train_step.lower(trainer.abstract, trainer.abstract_batch(2, 8)).as_text())


@pytest.fixture(scope="module")
def twelve():
    return lowered_size(12)


def test_48_layers_are_no_bigger_a_program_than_12(twelve):
    assert lowered_size(48) <= 1.02 * twelve
