"""The Pallas kernel of products with packed weights, for GPU (Triton) and TPU; interpreted elsewhere.

Axis letters: M rows of input, O outputs, I inputs, W = I/2 bytes a row (I in int8), S steps of a row.

One program computes a tile of outputs for all rows: it goes along the rows of weights in steps, unpacks a step in
registers and adds its product. What is read from memory is the packed matrix, once, for up to ``ROWS`` rows of input.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic_tpu
from jax.experimental.pallas import triton

from gemma4_jax.packed import GROUP

TILE = {"triton": 64, "mosaic_tpu": 128}  # outputs of a program; a TPU's blocks fill its 128 lanes
STEP = 128  # bytes of a row unpacked at once; 256 inputs of int4
COMPILERS = {"triton": triton, "mosaic_tpu": mosaic_tpu}
LEAST_ROWS, ROWS = 16, 64  # rows of a program; the matrix units want at least 16


def packed_product(x: jax.Array, values: jax.Array, scale: jax.Array, backend: str | None = None) -> jax.Array:
    """``x @ unpack(values, scale).T`` in f32: x (M, I) -> (M, O).

    Args:
      x: f32 or bf16; products are taken in its dtype and added in f32.
      values, scale: see ``gemma4_jax.packed``.
      backend: compile for ``triton`` or ``mosaic_tpu``; None: what suits the first device, and where that is neither
        GPU nor TPU the kernel runs as plain JAX.
    """
    backend = backend or {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.devices()[0].platform)
    tile = TILE[backend or "triton"]
    count, width = x.shape
    outputs, row_bytes = values.shape
    step = _largest_divisor(row_bytes, STEP)
    x = jnp.pad(x, ((0, -count % LEAST_ROWS if count < ROWS else -count % ROWS), (0, 0)))
    padding = -outputs % tile
    if padding:
        values, scale = (jnp.pad(part, ((0, padding), (0, 0))) for part in (values, scale))
    halves = [x]
    if values.dtype == jnp.uint8:
        groups = x.reshape(x.shape[0], width // GROUP, 2, GROUP // 2)
        halves = [groups[:, :, half].reshape(x.shape[0], row_bytes) for half in (0, 1)]
    rows = min(x.shape[0], ROWS)
    per_scale = row_bytes // scale.shape[1]
    grid = (values.shape[0] // tile, x.shape[0] // rows)
    y = pl.pallas_call(
        functools.partial(_kernel, step=step, per_scale=per_scale),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], values.shape[0]), jnp.float32),
        grid=grid,
        in_specs=[
            *[pl.BlockSpec((rows, row_bytes), lambda o, m: (m, 0))] * len(halves),
            pl.BlockSpec((tile, row_bytes), lambda o, m: (o, 0)),
            pl.BlockSpec((tile, scale.shape[1]), lambda o, m: (o, 0)),
        ],
        out_specs=pl.BlockSpec((rows, tile), lambda o, m: (m, o)),
        interpret=backend is None,
        compiler_params=None if backend is None else COMPILERS[backend].CompilerParams(),
    )(*halves, values, scale)
    return y[:count, :outputs]


def _largest_divisor(total: int, limit: int) -> int:
    """The largest power of two that divides ``total`` and is at most ``limit``."""
    return min(limit, total & -total)


def _kernel(*refs, step: int, per_scale: int):
    """refs: the inputs' low halves and high ones (int4) or all of them (int8), values, scale, result."""
    *inputs, values_ref, scale_ref, y_ref = refs
    dtype = inputs[0].dtype
    whole_row = scale_ref.shape[1] == 1

    def product(x, weights):
        return jax.lax.dot_general(
            x, weights.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    def add(i, total):
        some = pl.ds(i * step, step)
        packed = values_ref[:, some]
        parts = [packed]
        if len(inputs) == 2:
            bits = packed.astype(jnp.int32)
            parts = [(bits & 15) - 8, (bits >> 4) - 8]
        factor = None
        if not whole_row:
            scales = scale_ref[:, pl.ds(i * (step // per_scale), step // per_scale)].astype(jnp.float32)
            factor = jnp.broadcast_to(scales[:, :, None], (*scales.shape, per_scale)).reshape(packed.shape)
        for x_ref, part in zip(inputs, parts, strict=True):
            weights = part.astype(jnp.float32)
            total += product(x_ref[:, some], weights if factor is None else weights * factor)
        return total

    steps = values_ref.shape[1] // step
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros(y_ref.shape, jnp.float32))
    if whole_row:
        total *= scale_ref[:, 0].astype(jnp.float32)[None]
    y_ref[...] = total
