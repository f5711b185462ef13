"""Low-rank adapters (LoRA): what they add to a linear map, where they are put, and how they become part of its weight.

Axis letters: O outputs, I inputs, R rank. An adapter of a stacked map has the leading axes of its weight, so scanning,
rematerialisation and unstacking treat it as they treat the weight.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import LoraConfig
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.layers import Linear, matmul

SEPARATOR = "/"
PART = "/lora/"  # in the name of every adapter weight: …/q_proj/lora/a


class Adapter(nnx.Module):
    """``scale * (x a') b'``. a (R, I) is random and b (O, R) zero at first, so that a new adapter changes nothing."""

    def __init__(self, a: jax.Array, b: jax.Array, scale: float):
        self.a, self.b, self.scale = nnx.Param(a), nnx.Param(b), scale

    def __call__(self, x: jax.Array, columns: slice | None = None) -> jax.Array:
        """x (..., I), or only some ``columns`` of it, -> (..., O) in x's dtype."""
        low = matmul(x, self._inputs(columns))
        return matmul(low * self.scale, self.b[...])

    def part(self, columns: slice | None) -> Adapter:
        """An adapter of its own for some input columns, with the same outputs."""
        return Adapter(self._inputs(columns), self.b[...], self.scale)

    def _inputs(self, columns: slice | None) -> jax.Array:
        a = self.a[...]
        return a if columns is None else a[:, columns]


def add_adapters(modules: Mapping[str, nnx.Module], config: LoraConfig, key: jax.Array) -> None:
    """Puts new adapters beside the linear maps that ``config.targets`` chooses.

    Args:
      modules: ``{"model": Gemma4, "drafter": Drafter}``, changed in place; linear maps may be stacked.
      key: of the random halves; each depends on its name too, and on nothing else.

    Raises:
      ConfigError: a pattern that no linear map matches, or nothing is left.
    """
    linears = dict(_linears(modules))
    chosen = choose_targets(list(linears), config.targets)
    for name, linear in linears.items():
        if name not in chosen:
            continue
        *leading, outputs, inputs = linear.weight[...].shape
        dtype = jnp.dtype(config.dtype)
        draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), (*leading, config.rank, inputs))
        a, b = (draw * inputs**-0.5).astype(dtype), jnp.zeros((*leading, outputs, config.rank), dtype)
        linear.lora = Adapter(a, b, config.scale)


def choose_targets(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Names of linear weights that get an adapter; what no pattern matches gets none. Raises as ``add_adapters``."""
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatch.fnmatchcase(name, pattern.removeprefix("!"))}
        if not matches:
            raise ConfigError(f"lora.targets: pattern {pattern!r} matches none of the {len(names)} linear weights")
        chosen = chosen - matches if pattern.startswith("!") else chosen | matches
    if not chosen:
        raise ConfigError(f"lora.targets {list(patterns)} leaves nothing to adapt")
    return chosen


def _linears(modules: Mapping[str, nnx.Module]) -> Iterator[tuple[str, Linear]]:
    """Linear maps by the names of their weights."""
    for part, module in modules.items():
        for path, child in nnx.iter_modules(module):
            if isinstance(child, Linear):
                yield SEPARATOR.join(map(str, (part, *path, "weight"))), child


def is_adapter(name: str) -> bool:
    """Whether a parameter name is that of an adapter."""
    return PART in name


def merge_adapters(weights: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """The flat weights of the same function without adapters: ``W + scale * b a``, computed in f32, in W's dtype.

    Args:
      weights: flat, with ``…/weight``, ``…/lora/a`` and ``…/lora/b``.
      config: of the adapters.
    """
    merged = {name: leaf for name, leaf in weights.items() if not is_adapter(name)}
    for name in weights:
        place, found, half = name.rpartition(PART)
        if found and half == "a":
            weight = f"{place}/weight"
            merged[weight] = _merged(merged[weight], weights[name], weights[f"{place}{PART}b"], config.scale)
    return merged


@jax.jit
def _merged(weight, a, b, scale):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Full precision: on some accelerators an f32 product would otherwise be one of bf16.
    delta = jnp.einsum("...or,...ri->...oi", b, a, precision="highest")
    return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)
