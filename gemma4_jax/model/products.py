"""Matrix products that multiply what they are given and add up in f32."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma4_jax.model.apart import runs_apart

WIDE = 64  # rows and columns from which on widening is faster; measured, see ``product``


def product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``einsum(form, x, y)`` accumulated and returned in f32.

    On one CPU device, large products of bf16 depend on its units. Without those for bf16 the f32 kernels do them: XLA:CPU's bf16
    kernels read half the bytes, but multiply at 0.55 to 0.75 of the rate. The numbers are the same up to the order of the
    sums, since bf16 is exact in f32. With such units they multiply at twice the rate; only sums over the first axis of both
    operands, as of weight gradients, XLA:CPU does by other means unless there is one more axis. Not in a mesh of several: there
    a CPU stands in for others, whose memory a plan asks about.

    Args:
      form: of two operands; leading axes of one may be an ellipsis.
    """
    if x.dtype == y.dtype == jnp.bfloat16 and runs_apart():
        if has_bf16_units():
            operands, result = form.split("->")
            first, second = operands.split(",")
            if first[0] == second[0] and first[0] not in result:
                form, x, y = f"z{first},z{second}->{result}", x[None], y[None]
        elif _narrowest(form, x, y) >= WIDE:
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(form, x, y, preferred_element_type=jnp.float32)


@functools.cache
def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 by instructions of its own, which XLA:CPU's kernels use where they are: AVX512_BF16, which
    comes with AMX too. Asked of Linux alone; not measured, since a run that goes on must choose as it did before."""
    listed = Path("/proc/cpuinfo")
    return listed.exists() and "avx512_bf16" in listed.read_text().split()


def _narrowest(form: str, x: jax.Array, y: jax.Array) -> int:
    """The smaller side of the result: rows that only x gives, or columns that only y gives."""
    first, second = (part.removeprefix("...") for part in form.split("->")[0].split(","))
    sizes = dict(zip(reversed(first), reversed(x.shape), strict=False))
    shared = math.prod(size for axis, size in sizes.items() if axis in second)
    return min(x.size, y.size) // shared
