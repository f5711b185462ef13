"""Products that read packed weights: the whole matrix is never unpacked in memory.

Axis letters: M rows of input, O outputs, I inputs, G = I/32 groups, R rows of a block.

Forms, by name (``FORMS``):

* ``blocked``: plain XLA. A loop over blocks of output rows, each unpacked into f32 where the cache holds it and multiplied
  from there. The loop is the point: without it XLA:CPU converts inside the product's inner loop, ten times slower.
* ``pallas``: a kernel for GPU and TPU, unpacking in registers (``gemma4_jax.sample.packed_kernel``).
* ``unpacked``: one product with all weights unpacked, for comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import unknown_name
from gemma4_jax.model.layers import Linear, soft_cap
from gemma4_jax.packed import GROUP, Quantized, QuantizedEmbedder, QuantizedLinear, packed_columns, unpack
from gemma4_jax.sample import packed_kernel

log = logging.getLogger(__name__)

BLOCK_NUMBERS = 1 << 18  # of weights that are unpacked together: 1 MB in f32
FORMS = ("blocked", "pallas", "unpacked")


def default_form() -> str:
    """The form that suits the first device: ``pallas`` on GPU and TPU, ``blocked`` elsewhere."""
    return "pallas" if jax.devices()[0].platform in ("gpu", "tpu") else "blocked"


def choose_form(modules: Sequence[nnx.Module], form: str | None) -> str:
    """Let every packed product of readable networks take one form; None: the device's. Logs and returns it.

    Raises:
      ConfigError: an unknown form.
    """
    form = form or default_form()
    if form not in FORMS:
        raise unknown_name("packed_product", form, FORMS)
    nodes = [node for module in modules for _, node in nnx.iter_modules(module)]
    packed = [node for node in nodes if isinstance(node, (ReadPacked, ReadPackedEmbedder))]
    for node in packed:
        node.form = form
    log.info("%d packed products in form %r", len(packed), form)
    return form


def read_packed(x: jax.Array, values: jax.Array, scale: jax.Array, form: str) -> jax.Array:
    """``x @ unpack(values, scale).T``: x (..., I) -> f32 (..., O), accumulated in f32."""
    rows = x.reshape(-1, x.shape[-1])
    y = _PRODUCTS[form](rows, values, scale)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _blocked(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    outputs, count = values.shape[0], x.shape[0]
    width = x.shape[1]
    size = min(outputs, max(16, BLOCK_NUMBERS // width // 16 * 16))
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))
    halves = _halves(x) if values.dtype == jnp.uint8 else None

    def block(i, y):
        # The last block begins earlier where the rows do not fill it, and writes some outputs again.
        start = jnp.minimum(i * size, outputs - size)
        some = [jax.lax.dynamic_slice_in_dim(part, start, size) for part in (values, scale)]
        new = _block_int8(x, *some) if halves is None else _block_int4(halves, *some)
        return jax.lax.dynamic_update_slice(y, new, (jnp.int32(0), start))

    blocks = -(-outputs // size)
    # All of it is written over. Zeros would do, but they wait for nothing: XLA then makes those of all layers at the start.
    start = jnp.broadcast_to(x[:1, :1], (count, outputs))
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), block, start)


def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    # The barrier keeps the conversion out of the product's inner loop.
    weights = jax.lax.optimization_barrier(weights)
    return jnp.einsum("mi,oi->mo", x, weights, preferred_element_type=jnp.float32)


def _block_int8(x, values, scale):
    if scale.shape[1] > 1:  # groups, as in files of type Q8_0
        return _product(x, unpack(values, scale))
    return _product(x, values.astype(jnp.float32)) * scale[:, 0].astype(jnp.float32)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inputs of all low and of all high halves of bytes: (M, I) -> twice (M, I/2)."""
    groups = x.reshape(x.shape[0], -1, 2, GROUP // 2)
    return groups[:, :, 0].reshape(x.shape[0], -1), groups[:, :, 1].reshape(x.shape[0], -1)


def _block_int4(halves, values, scale):
    """Low and high halves are unpacked apart, so that nothing is interleaved."""
    low, high = halves
    groups = values.reshape(*scale.shape, GROUP // 2)
    scale = scale.astype(jnp.float32)[..., None]
    parts = [
        ((bits.astype(jnp.int32) - 8).astype(jnp.float32) * scale).reshape(values.shape)
        for bits in (groups & 15, groups >> 4)
    ]
    return _product(low, parts[0]) + _product(high, parts[1])


def _pallas(x, values, scale):
    return packed_kernel.packed_product(x, values, scale)


def _unpacked(x, values, scale):
    return _product(x.astype(jnp.float32), unpack(values, scale))


_PRODUCTS = {"blocked": _blocked, "pallas": _pallas, "unpacked": _unpacked}


class ReadPacked(nnx.Module):
    """Packed linear maps of one input, their outputs side by side. values, scale: of each map, as they were."""

    lora: nnx.Module | None = None

    def __init__(self, *sources: QuantizedLinear, columns: slice | None = None):
        """Their arrays are shared, unless only some ``columns`` are taken."""
        self.form = "blocked"
        pairs = [(source.values[...], source.scale[...]) for source in sources]
        if columns is not None:
            pairs = [packed_columns(*pair, columns) for pair in pairs]
        self.values = nnx.List([Quantized(values) for values, _ in pairs])
        self.scales = nnx.List([Quantized(scale) for _, scale in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., out) in x's dtype."""
        pairs = zip(self.values, self.scales, strict=True)
        parts = [read_packed(x, values[...], scale[...], self.form) for values, scale in pairs]
        y = (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)).astype(x.dtype)
        return y if self.lora is None else y + self.lora(x)


class ReadPackedEmbedder(QuantizedEmbedder):
    """The packed table, read as input rows and as output head. values (V, D), scale (V, 1)."""

    def __init__(self, source: QuantizedEmbedder):
        self.form = "blocked"
        self.values, self.scale, self.dtype = source.values, source.scale, source.dtype

    def decode(self, hidden: jax.Array, softcap: float | None = None) -> jax.Array:
        """f32 logits: hidden (..., D) -> (..., V)."""
        return soft_cap(read_packed(hidden, self.values[...], self.scale[...], self.form), softcap)


def are_packed(sources: Sequence[Linear]) -> bool:
    """Whether all of some maps are packed."""
    return all(isinstance(source, QuantizedLinear) for source in sources)
