"""Products of weights that are laid out by columns, on CPUs: inputs outermost, so that outputs are neighbours in memory.

Axis letters: M rows of input, O outputs, I inputs.

f32: XLA:CPU lays (O, I) out anew in each product of several rows, (I, O) it multiplies as it lies; what that saves depends on
the machine (``inputs_first``). One row of (I, O) runs as fast as one of (O, I), in the form of ``column_product``.

bf16: two inputs of one output are a 32-bit word, widened by a shift and a mask. One row then reads at nearly the memory's rate;
XLA:CPU's own product needs twice the time.
"""

from __future__ import annotations

import functools
import logging
import math
import time

import jax
import jax.numpy as jnp

from gemma4_jax.sample.blocks import by_columns_of_halves

log = logging.getLogger(__name__)

STEP = 16  # inputs that are multiplied and added in registers: 8 and 32 are not faster
COLUMNS = 512  # that are unpacked together: fewer make narrow products and read less of each page of memory, more leave the cache
ROWS, SIDE, TURNS = (4, 8), 4096, 5  # of the measurement: what a round verifies, a batch; a matrix of 64 MB
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


@jax.jit
def paired(weight: jax.Array) -> jax.Array:
    """bf16 (O, I), I even, as uint32 (I/2, O): the first of two inputs in a word's low half."""
    return jax.lax.bitcast_convert_type(weight.reshape(len(weight), -1, 2), jnp.uint32).T


def paired_product(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """x (M, I) times a matrix that ``paired`` laid out, in f32: -> (M, O)."""
    # As far as XLA sees, pairs change with x: it would widen those of a loop before it, once for all.
    x, pairs = jax.lax.optimization_barrier((x.astype(jnp.float32).reshape(len(x), -1, 2), pairs))
    return _one_row(x[0], pairs) if len(x) == 1 else _by_blocks(x, pairs)


def _one_row(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """x (I/2, 2) -> (1, O)."""
    step = math.gcd(len(pairs), STEP // 2)
    x, groups = x.reshape(-1, step, 2), pairs.reshape(-1, step, pairs.shape[1])
    terms = []
    for i in range(step):
        low, high = _widened(groups[:, i])
        terms += [low * x[:, i, :1], high * x[:, i, 1:]]
    return total([functools.reduce(jnp.add, terms)])


def _by_blocks(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """Several rows: x (M, I/2, 2) -> (M, O)."""
    inputs, outputs = pairs.shape

    def unpacked(start, size):
        return _widened(jax.lax.dynamic_slice(pairs, (jnp.int32(0), start), (inputs, size)))

    return by_columns_of_halves((x[..., 0], x[..., 1]), outputs, COLUMNS, unpacked)


def _widened(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers of the low and of the high halves of words, in f32."""
    return tuple(
        jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in (pairs << 16, pairs & jnp.uint32(0xFFFF0000))
    )


@functools.cache
def inputs_first() -> bool:
    """Whether this machine multiplies a few rows by large f32 weights (I, O) faster than by (O, I): measured once a process, in
    a fraction of a second."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        inputs, weight = [jnp.ones((rows, SIDE), jnp.float32) for rows in ROWS], jnp.ones((SIDE, SIDE), jnp.float32)
        products = [jax.jit(functools.partial(jnp.einsum, form)) for form in ("mi,io->mo", "mi,oi->mo")]
        # The first turn compiles.
        turns = [[sum(_seconds(run, x, weight) for x in inputs) for run in products] for _ in range(1 + TURNS)]
    turned, plain = (min(seconds) for seconds in zip(*turns[1:], strict=True))
    first = turned < WORTH * plain
    log.info(
        "%d and %d rows by a large f32 matrix: %.1f ms with its inputs first, %.1f with its outputs first; %s first",
        *(*ROWS, 1e3 * turned, 1e3 * plain, "inputs" if first else "outputs"),
    )
    return first


def _seconds(run, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start
