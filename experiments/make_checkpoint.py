"""A checkpoint of random weights in the published form: for trying imports at true size without the true weights.

    python -m experiments.make_checkpoint FOLDER [--preset gemma4_12b] [--seed 0] [--shard_gb 5]

Writes ``FOLDER`` (bf16 shards with an index, configuration) and ``FOLDER/drafter``. The 12B takes 24 GB of disk; memory stays
at one tensor, whatever the size.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma4_jax.config import PRESETS, get_preset
from gemma4_jax.errors import CheckpointError
from gemma4_jax.interop.hf_export import save_folder
from gemma4_jax.train.state import Network

_POOL = 1 << 24  # random numbers that tensors are cut from


@dataclasses.dataclass(frozen=True)
class RandomLeaf:
    """A leaf that is drawn when it is read, slice by slice. Matrices have variance 1/inputs, other leaves lie around 1.

    But query and key norms around H**-0.25, as where training starts: with them around 1 attention picks single keys, and 48
    layers of that blow a change of 1e-6 in the table up to five times the logits, so no two ways of computing them agree.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pool: np.ndarray
    seed: int

    def __getitem__(self, index) -> np.ndarray:
        depth = len(index) if isinstance(index, tuple) else 1
        return self._draw(self.shape[depth:], np.atleast_1d(index).tolist())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._draw(self.shape, [])

    def _draw(self, shape: tuple[int, ...], place: list[int]) -> np.ndarray:
        if np.issubdtype(self.dtype, np.integer):
            return np.arange(shape[-1], dtype=self.dtype)
        key = [self.seed, *map(ord, self.name), *place]
        rng = np.random.default_rng(key)
        if len(shape) < 2:
            around = shape[-1] ** -0.25 if self.name.endswith(("q_norm/weight", "k_norm/weight")) else 1.0
            return (around * rng.uniform(0.5, 1.0, shape)).astype(self.dtype)
        # A fresh offset and sign for every run of the pool: repeated numbers, but no repeated rows.
        scale = self.dtype.type(shape[-1] ** -0.5)
        flat = np.empty(int(np.prod(shape)), self.dtype)
        for start in range(0, flat.size, _POOL // 2):
            part = flat[start : start + _POOL // 2]
            offset = int(rng.integers(0, self.pool.size - part.size))
            np.multiply(self.pool[offset : offset + part.size], scale, out=part)
        return flat.reshape(shape)


class RandomWeights(Mapping):
    """The weights of a network by flat name, none of them in memory."""

    def __init__(self, network: Network, seed: int):
        self.shapes, self.seed = network.shapes, seed
        self.pool = np.random.default_rng(seed).standard_normal(_POOL, np.float32).astype(ml_dtypes.bfloat16)

    def __getitem__(self, name: str) -> RandomLeaf:
        leaf = self.shapes[name]
        return RandomLeaf(name, tuple(leaf.shape), np.dtype(leaf.dtype), self.pool, self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def make(folder: str | Path, preset: str, seed: int = 0, shard_bytes: int = 5_000_000_000) -> dict[str, int]:
    """Write a checkpoint of a preset's shape with its drafter; returns tensors, bytes and files.

    Raises:
      CheckpointError: the folder is not empty, or too little disk. ConfigError: an unknown preset.
    """
    config = get_preset(preset, dtype="bfloat16", param_dtype="bfloat16")
    network = Network(config)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in network.shapes.values())
    place = Path(folder).absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < 1.02 * needed:
        raise CheckpointError(f"{folder} needs {needed / 1e9:.1f} GB of disk, but {free / 1e9:.1f} GB are free")
    return save_folder(folder, config, RandomWeights(network, seed), shard_bytes=shard_bytes)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--preset", default="gemma4_12b", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_gb", type=float, default=5)
    given = parser.parse_args(arguments)
    print(make(given.folder, given.preset, given.seed, int(given.shard_gb * 1e9)))


if __name__ == "__main__":
    main()
