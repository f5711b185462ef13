"""Products that read int4 weights laid out by columns, on CPUs: inputs outermost, so that outputs are neighbours in memory.

Axis letters: M rows of input, O outputs, I inputs, G = I/32 groups of inputs, L = leading axes of a stack.

XLA:CPU adds up along a row number by number, but takes eight outputs at once where it goes along a column. So a group's 32
products are written out, one loop over all groups and outputs unpacks, multiplies and adds them in registers, and what
remains is one sum over G partial sums. Nothing is unpacked in memory, and one row costs a quarter of what the ``blocked``
form takes.

For two rows the loop is a reduction of two results at once, which alone makes XLA:CPU read and unpack once for both; more
than two are more than LLVM unrolls. Rows are taken in pairs therefore, up to ``PAIRED_ROWS``; more are multiplied by blocks
of columns that are unpacked in the cache.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from gemma4_jax.packed import GROUP
from gemma4_jax.sample.blocks import by_columns_of_halves, halves, over_blocks, to_write_over, unpacked_dtype
from gemma4_jax.sample.columns import COLUMNS, total

HALF = GROUP // 2  # bytes of a group; number j is in the low half of byte j, number j + 16 in its high half
PAIRED_ROWS = 10
STEP = 4  # bytes of a group that the reduction of two rows goes through; the others are written out
SUMMED = 8  # groups whose partial sums are added while they are scaled
TRANSPOSED_ROWS = 128


@jax.jit
def by_columns(values: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int4 values (L, O, I/2) and scale (L, O, G), laid out as uint8 (L, I/2, O) and f16 (L, G, O)."""
    return _transposed(values), _transposed(scale)


def _transposed(stack: jax.Array) -> jax.Array:
    """(L, O, X) -> (L, X, O), some rows at a time: four times as fast as XLA:CPU's own way through all of a matrix."""
    *lead, outputs, width = stack.shape
    rows = min(outputs, TRANSPOSED_ROWS)

    def matrix(source):
        def block(start, result):
            some = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(source, start, rows))
            some = jax.lax.optimization_barrier(some.T)
            return jax.lax.dynamic_update_slice_in_dim(result, some, start, axis=1)

        return over_blocks(outputs, rows, block, jnp.zeros((width, outputs), source.dtype))

    return jax.lax.map(matrix, stack.reshape(-1, outputs, width)).reshape(*lead, width, outputs)


def read_columns(x: jax.Array, values: jax.Array, scale: jax.Array, place: jax.Array | int = 0) -> jax.Array:
    """x (M, I) times a matrix that ``by_columns`` laid out, in f32: -> (M, O).

    place: values and scale may be stacks; this is the matrix meant, leading axes counted as one.
    """
    scale = scale.reshape(-1, *scale.shape[-2:])
    values = values.reshape(*scale.shape[:2], HALF, -1)
    place = jnp.int32(place)
    x = x.astype(unpacked_dtype(x))
    if len(x) > PAIRED_ROWS:
        return _blocks(x, values, scale, place)
    x = x.reshape(len(x), -1, 2, HALF)
    return _few(x, values, scale, place) if len(x) <= 2 else _pairs(x, values, scale, place)


def _pairs(x: jax.Array, values: jax.Array, scale: jax.Array, place: jax.Array) -> jax.Array:
    """Several rows, two by two in a loop, for one pair is much to compile: x (M, G, 2, 16) -> (M, O)."""
    count = len(x)
    x = jnp.pad(x, ((0, count % 2), (0, 0), (0, 0), (0, 0)))

    def pair(i, y):
        # As far as XLA sees, another matrix each time: it would unpack it before the loop, once for all.
        matrix = jax.lax.optimization_barrier((i, values, scale))[1:]
        some = _few(jax.lax.dynamic_slice_in_dim(x, 2 * i, 2), *matrix, place)
        return jax.lax.dynamic_update_slice_in_dim(y, some, 2 * i, axis=0)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(len(x) // 2), pair, to_write_over(x, scale.shape[-1]))[:count]


def _few(x: jax.Array, values: jax.Array, scale: jax.Array, place: jax.Array) -> jax.Array:
    """One row or two: x (M, G, 2, 16) -> (M, O)."""
    # Halves of bytes are 0 to 15 and stand for -8 to 7: what that adds is taken off each group's sum.
    x, excess = jax.lax.optimization_barrier((x, 8 * x.sum(axis=(2, 3))))
    step = 1 if len(x) == 1 else STEP
    terms: list[list[jax.Array]] = [[] for _ in x]
    for first in range(0, HALF, step):
        # A slice of a slice would be copied; each of these has one reader, and is read in place.
        some = jax.lax.dynamic_slice_in_dim(values, first, step, axis=2)
        bits = jax.lax.dynamic_index_in_dim(some, place, keepdims=False).astype(jnp.int32)
        low, high = (bits & 15).astype(jnp.float32), (bits >> 4).astype(jnp.float32)
        inputs = x[..., first : first + step, None]
        for row, sums in zip(inputs, terms, strict=True):
            sums.append(low * row[:, 0] + high * row[:, 1])
    sums = tuple(functools.reduce(jnp.add, parts) for parts in terms)  # (G, step, O) of each row
    scale = jax.lax.dynamic_index_in_dim(scale, place, keepdims=False).astype(jnp.float32)
    if len(x) == 1:
        return total([(sums[0][:, 0] - excess[0, :, None]) * scale])
    zeros = (jnp.float32(0),) * len(sums)
    sums = jax.lax.reduce(sums, zeros, lambda some, more: tuple(a + b for a, b in zip(some, more, strict=True)), (1,))
    return total([_scaled(one, off, scale) for one, off in zip(sums, excess, strict=True)])


def _scaled(sums: jax.Array, excess: jax.Array, scale: jax.Array) -> jax.Array:
    """Partial sums (G, O) scaled, some groups added up: (G/…, O)."""
    count = math.gcd(SUMMED, len(sums))
    parts = [part.reshape(count, -1, part.shape[-1]) for part in (sums, excess[:, None], scale)]
    return functools.reduce(jnp.add, [(some - off) * by for some, off, by in zip(*parts, strict=True)])


def _blocks(x: jax.Array, values: jax.Array, scale: jax.Array, place: jax.Array) -> jax.Array:
    """Many rows: x (M, I) -> (M, O)."""
    groups, outputs = scale.shape[1:]

    def unpacked(start, size):
        bits = jax.lax.dynamic_slice(values, (place, 0, 0, start), (1, groups, HALF, size))[0].astype(jnp.int32)
        factor = jax.lax.dynamic_slice(scale, (place, 0, start), (1, groups, size))[0].astype(jnp.float32)[:, None]
        both = (((half - 8).astype(jnp.float32) * factor).astype(x.dtype) for half in (bits & 15, bits >> 4))
        return tuple(half.reshape(-1, size) for half in both)

    return by_columns_of_halves(jax.lax.optimization_barrier(halves(x)), outputs, COLUMNS, unpacked)
