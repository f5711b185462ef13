"""Products of one row as sums along the rows of weights, for GPUs.

Axis letters: O outputs, I inputs, G = I/32 groups of inputs.

One row costs what reading the weights costs. XLA:GPU makes one kernel of such a sum, which converts or unpacks in registers; a
matrix product would be padded to 16 rows first, and int4 unpacked in memory for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma4_jax.packed import GROUP


def row_product(x: jax.Array, weights: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """``x @ weights.T`` in f32: x (1, I) -> (1, O).

    Args:
      weights: (O, I) numbers, or packed ones with their ``scale`` (``gemma4_jax.packed``).
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
        bits, halves = groups.astype(jnp.int32), x.reshape(-1, 2, GROUP // 2)
        low, high = ((bits & 15) - 8).astype(jnp.float32), ((bits >> 4) - 8).astype(jnp.float32)
        total = low * halves[:, 0] + high * halves[:, 1]
    return jnp.sum(total * scale.astype(jnp.float32)[..., None], axis=(1, 2))[None]
