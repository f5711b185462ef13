"""What the loops over packed weights share. Axis letters: M rows of input, O outputs, I inputs, G = I/32 groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.model.apart import runs_apart
from gemma4_jax.model.products import has_bf16_units, product
from gemma4_jax.packed import GROUP

MANY = 24  # rows; more are a prompt's


def over_blocks(
    total: int, size: int, step: Callable[[jax.Array, jax.Array], jax.Array], result: jax.Array
) -> jax.Array:
    """``result = step(start, result)`` for every block of ``size`` (at most ``total``). The last block begins earlier where
    the others leave less than a block, and does some again."""

    def block(i, result):
        return step(jnp.minimum(i * size, total - size), result)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-total // size)), block, result)


def to_write_over(x: jax.Array, outputs: int) -> jax.Array:
    """An f32 array (M, O), for x (M, …), all of which will be written. Zeros would do, but they wait for nothing: XLA then makes
    those of all layers at the start."""
    return jnp.broadcast_to(x.reshape(-1)[:1].astype(jnp.float32), (len(x), outputs))


def unpacked_dtype(x: jax.Array) -> Any:
    """What packed weights are unpacked to for inputs (M, I): f32, or bf16 for bf16 rows of a prompt where the CPU has units for
    it. That rounds weights with group scales, as in a model of that dtype; other int8 is exact."""
    narrow = x.dtype == jnp.bfloat16 and len(x) > MANY and runs_apart() and has_bf16_units()
    return jnp.dtype(jnp.bfloat16 if narrow else jnp.float32)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inputs of all low and of all high halves of bytes: (M, I) -> twice (M, I/2)."""
    groups = x.reshape(x.shape[0], -1, 2, GROUP // 2)
    return groups[:, :, 0].reshape(x.shape[0], -1), groups[:, :, 1].reshape(x.shape[0], -1)


def by_columns_of_halves(
    x: tuple[jax.Array, jax.Array],
    outputs: int,
    columns: int,
    unpacked: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """x, two halves of inputs (M, I/2), times a matrix that is unpacked in the cache, some columns at a time: -> f32 (M, O).

    Args:
      columns: that are unpacked together, at most.
      unpacked: of (first column, columns), the weights (I/2, columns) that meet each half, in x's dtype.
    """
    size = min(outputs, columns)

    def block(start, y):
        # The barrier keeps the unpacking out of the products' inner loops.
        weights = jax.lax.optimization_barrier(unpacked(start, size))
        new = sum(product("mi,io->mo", half, some) for half, some in zip(x, weights, strict=True))
        return jax.lax.dynamic_update_slice(y, new, (jnp.int32(0), start))

    return over_blocks(outputs, size, block, to_write_over(x[0], outputs))
