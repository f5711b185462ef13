"""Products of few rows as sums along the rows of weights, for GPUs.

Axis letters: M rows of input, O outputs, I inputs, G = I/32 groups of inputs.

A few rows cost what reading the weights costs. XLA:GPU makes one kernel of a reduction that converts or unpacks numbers in
registers and reads each of them once for all M rows; a matrix product would have to be padded to the units' shape first, and
would unpack into memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma4_jax.packed import GROUP

ROWS = 8  # rows of input that share one reduction; measured, see ``experiments.benchmarks.device``


def pays(rows: int) -> bool:
    """Whether products of so many rows are better taken this way."""
    return rows <= ROWS and jax.default_backend() == "gpu"


def reduced_product(x: jax.Array, weights: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """``x @ weights.T`` in f32: x (M, I) -> (M, O).

    Args:
      weights: (O, I) numbers, or packed ones with their ``scale`` (``gemma4_jax.packed``).
    """
    x = x.astype(jnp.float32)
    if scale is None:
        return _sums([weights.astype(jnp.float32) * row for row in x], (1,))
    if scale.shape[1] == 1:
        return reduced_product(x, weights) * scale[:, 0].astype(jnp.float32)
    groups = weights.reshape(*scale.shape, -1)
    step = scale.astype(jnp.float32)[..., None]
    if weights.dtype == jnp.int8:
        parts = [(groups.astype(jnp.float32) * step, x.reshape(len(x), *groups.shape[1:]))]
    else:
        bits = groups.astype(jnp.int32)
        halves = x.reshape(len(x), -1, 2, GROUP // 2)
        numbers = (bits & 15) - 8, (bits >> 4) - 8
        parts = [(n.astype(jnp.float32) * step, halves[:, :, half]) for half, n in enumerate(numbers)]
    return _sums([sum(numbers * rows[m] for numbers, rows in parts) for m in range(len(x))], (1, 2))


def _sums(terms: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """Sums of M arrays over the same axes, in one reduction: (M, O)."""
    zeros = [jnp.float32(0)] * len(terms)
    return jnp.stack(jax.lax.reduce(terms, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], axes))
