"""Products of f32 weights that are laid out by columns, on CPUs: inputs outermost, so that outputs are neighbours in memory.

Axis letters: M rows of input, O outputs, I inputs.

XLA:CPU lays (O, I) out anew in each product of several rows, (I, O) it multiplies as it lies; what that saves depends on the
machine (`inputs_first`). One row of (I, O) runs as fast as one of (O, I), in the form of ``column_product``.
"""

from __future__ import annotations

import functools
import logging
import math
import time

import jax
import jax.numpy as jnp

log = logging.getLogger(__name__)

STEP = 16  # inputs that are multiplied and added in registers: 8 and 32 are not faster
ROWS, SIDE, TURNS = 4, 4096, 5  # of the measurement: a matrix of 64 MB
WORTH = 0.9  # of the time, from which on the other order is taken: a tie must not be left to chance


def column_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x @ weight`` for one row, all f32: x (1, I), weight (I, O) -> (1, O).

    XLA:CPU adds up along columns slowly, but takes several outputs at once where ``STEP`` products are written out. What remains
    is a sum over I/``STEP`` partial sums.
    """
    inputs, outputs = weight.shape
    step = math.gcd(inputs, STEP)
    x = jax.lax.optimization_barrier(x).reshape(-1, step)
    groups = weight.reshape(-1, step, outputs)
    return total([functools.reduce(jnp.add, [groups[:, i] * x[:, i, None] for i in range(step)])])


def total(sums: list[jax.Array]) -> jax.Array:
    """Each row's partial sums (…, O) added up: (M, O). As products with ones: XLA:CPU's sums along columns are slow."""
    ones = jnp.ones((len(sums[0]),), jnp.float32)
    return jnp.stack([jnp.einsum("g,go->o", ones, part) for part in jax.lax.optimization_barrier(sums)])


@functools.cache
def inputs_first() -> bool:
    """Whether this machine multiplies a few rows by large f32 weights (I, O) faster than by (O, I): measured once a process, in
    a fraction of a second."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x, weight = jnp.ones((ROWS, SIDE), jnp.float32), jnp.ones((SIDE, SIDE), jnp.float32)
        products = [jax.jit(functools.partial(jnp.einsum, form)) for form in ("mi,io->mo", "mi,oi->mo")]
        turns = [[_seconds(run, x, weight) for run in products] for _ in range(1 + TURNS)]  # the first compiles
    turned, plain = (min(seconds) for seconds in zip(*turns[1:], strict=True))
    first = turned < WORTH * plain
    log.info(
        "%d rows by a large f32 matrix: %.1f ms with its inputs first, %.1f with its outputs first; %s first",
        *(ROWS, 1e3 * turned, 1e3 * plain, "inputs" if first else "outputs"),
    )
    return first


def _seconds(run, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start
