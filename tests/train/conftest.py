"""A model small enough to compile in seconds, and one compiled trainer for the whole folder."""

import jax
import numpy as np
import pytest

from gemma4_jax.config import get_preset
from gemma4_jax.losses import LossConfig
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.sharding import MeshConfig
from gemma4_jax.train.trainer import Trainer, TrainOptions

SEQ_LEN = 12


def mini_config(**overrides):
    """Two layers, one of each kind, and a drafter of one layer."""
    values = {
        "vision": None, "audio": None, "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
        "sliding_window": 4, "drafter.hidden_size": 8, "drafter.intermediate_size": 16, "drafter.num_hidden_layers": 1,
        "drafter.num_attention_heads": 4,
    }  # fmt: skip
    return get_preset("tiny", **{**values, **overrides})


def mini_trainer(*, model=None, loss=None, mesh=(1, 1, 1), batch_size=8, optimizer=None, **options):
    """A Trainer of the mini model on the first devices."""
    devices = jax.devices()[: int(np.prod(mesh))]
    return Trainer(
        mini_config() if model is None else model,
        loss=LossConfig(mtp_steps=2) if loss is None else loss,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1) if optimizer is None else optimizer,
        options=TrainOptions(**{"steps": 10, "log_every": 1, **options}),
        mesh=MeshConfig(*mesh),
        seed=3,
        batch_size=batch_size,
        devices=devices,
    )


def random_batch(rows=8, seed=0, length=SEQ_LEN):
    """Packed rows with padding and very unequal numbers of supervised tokens."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cut, end = sorted(rng.integers(1, length + 1, 2))
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    supervised = rng.random((rows, length)) < rng.random((rows, 1))
    return {
        "tokens": np.where(segments > 0, rng.integers(5, 64, (rows, length)), 0).astype(np.int32),
        "loss_mask": supervised & (segments > 0),
        "segment_ids": segments,
        "positions": positions,
    }


@pytest.fixture(scope="session")
def trainer():
    """The mini trainer on one device; its state is made by ``trainer.init()``."""
    return mini_trainer()
