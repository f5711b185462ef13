"""Products of one row as sums along the rows of weights, for GPUs.

Axis letters: O outputs, I inputs, G = I/32 groups of inputs, W = I/8 words of eight int4 numbers.

One row costs what reading the weights costs. XLA:GPU makes one kernel of such a sum, which converts or unpacks in registers; a
matrix product would be padded to 16 rows first, and int4 unpacked in memory for it. int4 is read as words of 32 bits: a thread
that loads a byte at a time has too few of them under way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma4_jax.packed import GROUP, unpack

BITS = 4
SHIFTS = tuple(range(0, 32, BITS))  # of a word's numbers: low and high half of its first byte, of its second, …


def pays(rows: int) -> bool:
    """Whether products of so many rows are better taken this way."""
    return rows == 1 and jax.default_backend() == "gpu"


def row_product(x: jax.Array, weights: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """``x @ weights.T`` in f32: x (1, I) -> (1, O).

    Args:
      weights: (O, I) numbers, or packed ones with their ``scale`` (``gemma4_jax.packed``); int4 as ``words``.
    """
    x = x[0].astype(jnp.float32)
    if scale is None:
        return jnp.sum(weights.astype(jnp.float32) * x, axis=1)[None]
    if weights.dtype == jnp.int8 and scale.shape[1] == 1:
        return row_product(x[None], weights) * scale[:, 0].astype(jnp.float32)
    groups = weights.reshape(*scale.shape, -1)
    if weights.dtype == jnp.int8:
        total = groups.astype(jnp.float32) * x.reshape(groups.shape[1:])
    else:
        pairs = zip(numbers(groups), inputs(x), strict=True)
        total = sum(number.astype(jnp.float32) * part.reshape(groups.shape[1:]) for number, part in pairs)
    return jnp.sum(total * scale.astype(jnp.float32)[..., None], axis=(1, 2))[None]


def words(values: jax.Array) -> jax.Array:
    """int4 weights (…, I/2) uint8 as (…, W) uint32."""
    return jax.lax.bitcast_convert_type(values.reshape(*values.shape[:-1], -1, 4), jnp.uint32)


def unpack_words(values: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """``gemma4_jax.packed.unpack`` of int4 weights in words."""
    packed = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return unpack(packed.reshape(*values.shape[:-1], -1), scale, dtype)


def numbers(values: jax.Array, count: int = len(SHIFTS)) -> list[jax.Array]:
    """The ``count`` int4 numbers of each word (of each byte: two), by ``SHIFTS``: int32 arrays of the shape of ``values``."""
    bits = values.astype(jnp.int32)
    return [((bits >> shift) & 15) - 8 for shift in SHIFTS[:count]]


def inputs(x: jax.Array) -> list[jax.Array]:
    """The inputs (…, I) that ``numbers`` meet: eight arrays (…, W)."""
    parts = x.reshape(*x.shape[:-1], -1, 2, GROUP // 8, 4)  # group, half of a byte, word, byte
    return [parts[..., shift // BITS % 2, :, shift // 8].reshape(*x.shape[:-1], -1) for shift in SHIFTS]
