"""Packed weights: two formats, and the modules that hold them in place of matrices.

Axis letters: O outputs, I inputs, G = I/32 groups, D model width, V vocabulary. Leading axes (stacked layers) stay as they are.

* ``int8``: one scale for each output row. values int8 (O, I), scale f16 (O, 1); a weight is ``values * scale``. Rounded as
  GGUF's Q8_0 rounds a block that is as long as the row, so a file in that type takes the numbers unchanged.
* ``int4``: GGUF's Q4_0. Groups of 32 inputs with one f16 scale each; the number of largest magnitude in a group becomes
  -8 (or, where that makes the scale negative, +8 times it). values uint8 (O, I/2): byte j of a group's 16 holds number j in
  its low and number j + 16 in its high half, each plus 8. scale f16 (O, G).

Tables are int8 in either scheme. Both roundings are those of the ``gguf`` package, bit for bit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.errors import ConfigError
from gemma4_jax.model.layers import Embedder, Linear, embedding_scale, soft_cap
from gemma4_jax.model.products import product

GROUP = 32
SCALE_DTYPE = np.dtype(np.float16)
_BLOCK = 1 << 16  # numbers that are rounded together, so that what lies between stays in the cache
_TABLE_BLOCK = 8192  # rows of a table that are unpacked together


class Quantized(nnx.Variable):
    """Packed numbers or their scales. Not an ``nnx.Param``: training freezes them."""


# ---------------------------------------------------------------------------------------------------------------- formats


def packed_shapes(shape: tuple[int, ...], scheme: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of ``values`` and ``scale`` for weights (…, O, I)."""
    *lead, width = shape
    if scheme == "int8":
        return jax.ShapeDtypeStruct(shape, np.int8), jax.ShapeDtypeStruct((*lead, 1), SCALE_DTYPE)
    values = jax.ShapeDtypeStruct((*lead, width // 2), np.uint8)
    return values, jax.ShapeDtypeStruct((*lead, width // GROUP), SCALE_DTYPE)


def pack(weights: jax.Array, scheme: str) -> tuple[jax.Array, jax.Array]:
    """Weights (…, O, I) to values and scale; traceable. I must be a multiple of 32 for int4."""
    x = weights.astype(jnp.float32)
    if scheme == "int8":
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        # Products are rounded before they are added to: a fused multiply-add would round some numbers elsewhere.
        scaled = jax.lax.optimization_barrier(x * jnp.where(scale == 0, 0, 1 / scale))
        size = jnp.abs(scaled)
        whole = jnp.floor(size)
        whole = whole + jnp.floor(2 * (size - whole))
        return (jnp.sign(scaled) * whole).astype(jnp.int8), scale.astype(SCALE_DTYPE)
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    largest = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    scale = jnp.take_along_axis(groups, largest, axis=-1) / -8
    scaled = jax.lax.optimization_barrier(groups * jnp.where(scale == 0, 0, 1 / scale))
    numbers = jnp.clip(jnp.trunc(scaled + 8.5), 0, 15).astype(jnp.uint8)
    low, high = numbers[..., : GROUP // 2], numbers[..., GROUP // 2 :]
    return (low | (high << 4)).reshape(*x.shape[:-1], -1), scale[..., 0].astype(SCALE_DTYPE)


def pack_into(weights: np.ndarray, values: np.ndarray, scale: np.ndarray) -> None:
    """``pack`` on the host, a few rows at a time: weights (O, I) of any float dtype into values and scale.

    The format is that of ``values``: int8, or uint8 for int4.
    """
    rows = max(1, _BLOCK // weights.shape[-1])
    fill = _pack_rows if values.dtype == np.int8 else _pack_groups
    for start in range(0, weights.shape[0], rows):
        block = slice(start, start + rows)
        fill(weights[block].astype(np.float32), values[block], scale[block])


def _pack_rows(x: np.ndarray, values: np.ndarray, scale: np.ndarray) -> None:
    step = np.abs(np.maximum(x.max(-1, keepdims=True), -x.min(-1, keepdims=True))) / np.float32(127)
    x *= _inverse(step)
    size = np.abs(x)
    whole = np.floor(size)
    size -= whole
    size *= 2
    whole += np.floor(size)
    values[...] = np.copysign(whole, x, out=whole)
    scale[...] = step


def _pack_groups(x: np.ndarray, values: np.ndarray, scale: np.ndarray) -> None:
    x = np.ascontiguousarray(x.reshape(-1, GROUP).T)  # one column a group: whole passes over long rows
    top, bottom = x.max(0), x.min(0)
    largest = np.where(top >= -bottom, top, bottom)
    ties = np.flatnonzero((top == -bottom) & (top != 0))
    largest[ties] = x[np.abs(x[:, ties]).argmax(0), ties]  # the first one's sign counts
    step = largest / np.float32(-8)
    x *= _inverse(step)
    x += np.float32(8.5)
    numbers = np.minimum(x.astype(np.uint8), 15)
    half = GROUP // 2
    values.reshape(-1, half)[...] = (numbers[:half] | (numbers[half:] << 4)).T
    scale[...] = step.reshape(scale.shape)


def _inverse(step: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(step == 0, np.float32(0), 1 / step)


def unpack(values: jax.Array, scale: jax.Array, dtype=jnp.float32) -> jax.Array:
    """The weights (…, O, I) that values and scale stand for; exact in f32, else rounded once."""
    numbers = values.reshape(*scale.shape, -1)
    if values.dtype == jnp.uint8:
        numbers = jnp.concatenate([numbers & 15, numbers >> 4], axis=-1).astype(jnp.int8) - jnp.int8(8)
    weights = numbers.astype(jnp.float32) * scale[..., None].astype(jnp.float32)
    return weights.astype(dtype).reshape(*scale.shape[:-1], -1)


def input_columns(values: jax.Array, scale: jax.Array, columns: slice) -> tuple[jax.Array, jax.Array]:
    """Some input columns of packed weights, whole groups of them."""
    width = values.shape[-1] * (2 if values.dtype == jnp.uint8 else 1)
    start, stop, _ = columns.indices(width)
    group = width // scale.shape[-1]
    if group < width:
        scale = scale[..., start // group : stop // group]
    per_byte = width // values.shape[-1]
    return values[..., start // per_byte : stop // per_byte], scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quantize(weights: jax.Array, scheme: str) -> jax.Array:
    """Weights as they would be after packing, in their own dtype; gradients pass straight through."""
    return unpack(*pack(weights, scheme), weights.dtype)


fake_quantize.defvjp(lambda weights, scheme: (fake_quantize(weights, scheme), None), lambda scheme, _, g: (g,))


# --------------------------------------------------------------------------------------------------------------- products


@jax.custom_vjp
def packed_matmul(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """``x @ unpack(values, scale).T`` accumulated in f32, in x's dtype: x (..., I) -> (..., O).

    The backward pass unpacks anew: only packed numbers are kept for it.
    """
    return product("...i,oi->...o", x, unpack(values, scale, x.dtype)).astype(x.dtype)


def _packed_forward(x, values, scale):
    return packed_matmul(x, values, scale), (values, scale)


def _packed_backward(packed, g):
    values, scale = packed
    weights = unpack(*jax.lax.optimization_barrier((values, scale)), g.dtype)
    d_x = product("...o,oi->...i", g, weights).astype(g.dtype)
    return d_x, np.zeros(values.shape, jax.dtypes.float0), jnp.zeros_like(scale)


packed_matmul.defvjp(_packed_forward, _packed_backward)


# ---------------------------------------------------------------------------------------------------------------- modules


class Unpacked:
    """Reads like the Variable that was packed: ``[...]`` and ``get_value`` unpack it."""

    def __init__(self, values: Quantized, scale: Quantized, dtype):
        self._values, self._scale, self._dtype = values, scale, dtype

    def get_value(self) -> jax.Array:
        """All of it, in the dtype in which weights are stored otherwise."""
        return unpack(self._values[...], self._scale[...], self._dtype)

    def __getitem__(self, key) -> jax.Array:
        return self.get_value()[key]


class QuantizedLinear(Linear):
    """A ``Linear`` with packed weights. values, scale: see the module's header; ``weight`` unpacks them when read."""

    def __init__(self, source: Linear, scheme: str):
        """The packed form of ``source``; bias and adapter stay as they are."""
        nnx.Module.__init__(self)
        for name, value in vars(source).items():
            if name != "weight" and not name.startswith("_"):
                setattr(self, name, value)
        weight = source.weight[...]
        self.dtype = jnp.dtype(weight.dtype)
        values, scale = pack(weight, scheme)
        self.values, self.scale = Quantized(values), Quantized(scale)

    @property
    def weight(self) -> Unpacked:
        """The weights (out, in), unpacked when read."""
        return Unpacked(self.values, self.scale, self.dtype)

    def product(self, x: jax.Array, columns: slice | None = None) -> jax.Array:
        """See ``Linear.product``."""
        values, scale = self.values[...], self.scale[...]
        if columns is not None:
            values, scale = input_columns(values, scale, columns)
        y = packed_matmul(x, values, scale)
        return y if self.lora is None else y + self.lora(x, columns)


class QuantizedEmbedder(Embedder):
    """The shared table in int8. values (V, D), scale (V, 1); ``table`` unpacks them when read."""

    def __init__(self, source: Embedder):
        nnx.Module.__init__(self)
        table = source.table[...]
        self.dtype = jnp.dtype(table.dtype)
        values, scale = pack(table, "int8")
        self.values, self.scale = Quantized(values), Quantized(scale)

    @property
    def table(self) -> Unpacked:
        """The table (V, D), unpacked when read."""
        return Unpacked(self.values, self.scale, self.dtype)

    def encode(self, tokens: jax.Array, dtype) -> jax.Array:
        """See ``Embedder.encode``; unpacks the rows that are looked up."""
        rows = unpack(self.values[...][tokens], self.scale[...][tokens], self.dtype)
        return (rows * embedding_scale(rows)).astype(dtype)

    def decode(self, hidden: jax.Array, softcap: float | None = None) -> jax.Array:
        """See ``Embedder.decode``; unpacks some rows of the table at a time."""
        values, scale = self.values[...], self.scale[...]

        def logits(values, scale):
            rows = unpack(values, scale, hidden.dtype)
            return product("...d,vd->...v", hidden, rows)

        whole = values.shape[0] // _TABLE_BLOCK * _TABLE_BLOCK
        if whole < 2 * _TABLE_BLOCK:
            return soft_cap(logits(values, scale), softcap)
        blocks = [part[:whole].reshape(-1, _TABLE_BLOCK, part.shape[-1]) for part in (values, scale)]
        first = jax.lax.map(lambda block: logits(*block), tuple(blocks))  # (blocks, ..., rows)
        first = jnp.moveaxis(first, 0, -2).reshape(*hidden.shape[:-1], whole)
        rest = logits(values[whole:], scale[whole:])
        return soft_cap(jnp.concatenate([first, rest], axis=-1), softcap)


def quantize_modules(module: nnx.Module, scheme: str) -> nnx.Module:
    """The same network with packed matrices and tables; its other arrays are shared. Traceable.

    Raises:
      ConfigError: rows that do not fill the groups of int4, naming the matrix.
    """
    module = nnx.merge(*nnx.split(module))
    for path, node in list(nnx.iter_modules(module)):
        for name, child in list(vars(node).items()):
            if type(child) is Embedder:
                setattr(node, name, QuantizedEmbedder(child))
            elif type(child) is Linear:
                width = child.weight[...].shape[-1]
                if scheme == "int4" and width % GROUP:
                    place = "/".join(map(str, (*path, name)))
                    raise ConfigError(f"{place} has rows of {width} numbers; int4 needs a multiple of {GROUP}")
                setattr(node, name, QuantizedLinear(child, scheme))
    return module
