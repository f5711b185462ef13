"""A model small enough to compile in seconds, its trainer, and data made on the spot."""

import os
import signal

import grain
import jax
import numpy as np

from gemma4_jax.config import get_preset
from gemma4_jax.data.pipeline import BatchIterator
from gemma4_jax.losses import LossConfig
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.sharding import MeshConfig
from gemma4_jax.train.trainer import Trainer, TrainOptions

SEQ_LEN = 12
# For comparing many steps: with small ones rounding does not grow where a gradient is about 0.
SLOW = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, eps=1e-4)


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


class MiniData:
    """Endless random rows by Grain, two held-out batches; a signal to this very process when a given batch is asked for.

    Attributes:
      seen: the first column of tokens of every batch taken, in order.
    """

    def __init__(self, stop_at=None, rows=40):
        self.rows, self.stop_at, self.seen = rows, stop_at, []

    def train_iterator(self):
        return _Recorder(self.batches(), self)

    def batches(self):
        pool = random_batch(self.rows, seed=5)
        rows = grain.MapDataset.range(self.rows).shuffle(seed=1).repeat()
        return iter(rows.map(lambda i: {name: value[i] for name, value in pool.items()}).batch(8).to_iter_dataset())

    def heldout_batches(self, limit):
        return [random_batch(8, seed=100 + i) for i in range(limit or 2)]

    def count_bytes(self, batch):
        return int(batch["loss_mask"].sum())


class _Recorder(grain.DatasetIterator):
    load = BatchIterator.load  # reads what another number of processes wrote

    def __init__(self, batches, data):
        super().__init__()
        self._batches, self._data = batches, data

    def __next__(self):
        batch = next(self._batches)
        if len(self._data.seen) == self._data.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self._data.seen.append(batch["tokens"][:, 0].tolist())
        return batch

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)
