"""Matrix products that multiply what they are given and add up in f32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gemma4_jax.model.apart import runs_apart

WIDE = 64  # rows and columns from which on widening is faster; measured, see ``product``


def product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``einsum(form, x, y)`` accumulated and returned in f32.

    On one CPU device the f32 kernels do large products of bf16: those that XLA:CPU has for bf16 read half the bytes, but
    multiply at 0.55 to 0.75 of the rate. The numbers are the same up to the order of the sums, since bf16 is exact in f32.
    Not in a mesh of several: there a CPU stands in for others, whose memory a plan asks about.

    Args:
      form: of two operands; leading axes of one may be an ellipsis.
    """
    if x.dtype == y.dtype == jnp.bfloat16 and runs_apart() and _narrowest(form, x, y) >= WIDE:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(form, x, y, preferred_element_type=jnp.float32)


def _narrowest(form: str, x: jax.Array, y: jax.Array) -> int:
    """The smaller side of the result: rows that only x gives, or columns that only y gives."""
    first, second = (part.removeprefix("...") for part in form.split("->")[0].split(","))
    sizes = dict(zip(reversed(first), reversed(x.shape), strict=False))
    shared = math.prod(size for axis, size in sizes.items() if axis in second)
    return min(x.size, y.size) // shared
