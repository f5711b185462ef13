"""Depth must not grow the program: the repeating layer group is one loop body. Nor does the program copy the weights."""

import re

import jax
import pytest

from gemma4_jax.config import get_preset
from gemma4_jax.losses import LossConfig
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.sharding import MeshConfig
from gemma4_jax.train.trainer import Trainer, TrainOptions


def lowered(layers):
    model = get_preset(
        "tiny", vision=None, audio=None, vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=layers
    )
    trainer = Trainer(
        model, loss=LossConfig(mtp_steps=2), optimizer=OptimizerConfig(warmup_steps=1), options=TrainOptions(steps=2),
        mesh=MeshConfig(data=1, fsdp=1), seed=0, batch_size=2, devices=jax.devices()[:1],
    )  # fmt: skip
    return trainer.train_step.lower(trainer.abstract, trainer.abstract_batch(2, 8))


@pytest.fixture(scope="module")
def twelve():
    return lowered(12)


def test_48_layers_are_no_bigger_a_program_than_12(twelve):
    assert len(lowered(48).as_text()) <= 1.02 * len(twelve.as_text())


def test_weights_are_updated_where_they_lie(twelve):
    text = twelve.compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert "input_output_alias" in text
    matrices = re.findall(r" = f32\[\d+(?:,\d+)+\]\S* parameter\(", entry)
    copies = re.findall(r" = f32\[\d+(?:,\d+)+\]\S* copy\(%(?:weight|table)\S*\)", entry)
    assert len(matrices) > 20 and not copies
