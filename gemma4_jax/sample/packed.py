"""Products that read packed weights: the whole matrix is never unpacked in memory.

Axis letters: M rows of input, O outputs, I inputs, G = I/32 groups, R rows of a block.

Forms, by name (``FORMS``):

* ``integer``: int8 numbers are never converted. The inputs become whole numbers of 24 bits, cut into three int8 digits,
  three rows of one int8 product whose int32 sums are exact. Reads one byte a weight and runs in the machine's integer
  units, so it beats f32. An input far below the row's largest keeps fewer bits than in f32: it is rounded at 2^-23 of
  the largest. For up to ``INTEGER_ROWS`` rows of int8 with one scale a row; everything else takes ``blocked``.
* ``columns``: int4 weights are laid out anew, by columns (``gemma4_jax.sample.packed_columns``), and read several times as
  fast as ``blocked`` reads them. int8 takes ``integer``.
* ``blocked``: plain XLA. A loop over blocks of output rows, each unpacked into f32 where the cache holds it and multiplied
  from there. The loop is the point: without it XLA:CPU converts inside the product's inner loop, ten times slower.
* ``pallas``: a kernel for GPU and TPU, unpacking in registers (``gemma4_jax.sample.packed_kernel``).
* ``reduced``: for GPUs. One row is a sum along the rows of weights (``gemma4_jax.sample.reduced``). More of int8 are one product,
  which XLA:GPU lets convert as it reads; of int4, a few take the kernel of ``pallas``, and many a product with what was
  unpacked in memory.
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
from gemma4_jax.model.products import product
from gemma4_jax.packed import GROUP, Quantized, QuantizedEmbedder, QuantizedLinear, input_columns, unpack
from gemma4_jax.sample import packed_kernel, reduced
from gemma4_jax.sample.blocks import halves, over_blocks, to_write_over, unpacked_dtype
from gemma4_jax.sample.packed_columns import by_columns, read_columns

log = logging.getLogger(__name__)

BLOCK_NUMBERS = 1 << 18  # of weights that are unpacked together: 1 MB in f32
LEAST_ROWS = 16  # XLA:GPU converts int8 within a product from so many rows on, and in memory for fewer
INTEGER_ROWS = 24  # as whole numbers they are three times as many: beyond, unpacking once pays
_DIGITS = 3
_DIGIT_BITS = 8
_EXCEPT = {
    "integer": f" ('blocked' where numbers have group scales, and for more than {INTEGER_ROWS} rows)",
    "columns": " ('integer' for int8)",
}
FORMS = ("integer", "columns", "blocked", "reduced", "pallas", "unpacked")


def default_form(scheme: str, release: bool) -> str:
    """The form that suits the backend: ``reduced`` on GPU, ``pallas`` on TPU; elsewhere ``columns`` for int4 weights that may be
    laid out anew without being held twice (``release``), ``integer`` for others."""
    if jax.default_backend() in ("gpu", "tpu"):
        return {"gpu": "reduced", "tpu": "pallas"}[jax.default_backend()]
    if scheme != "int4":
        return "integer"
    if not release:
        log.info(
            "int4 weights are read as they are: release=True or packed_product='columns' reads them several times as fast"
        )
    return "columns" if release else "integer"


def chosen_form(form: str | None, scheme: str, release: bool = False) -> str:
    """A checked form; None: what suits the device.

    Raises:
      ConfigError: an unknown form.
    """
    form = form or default_form(scheme, release)
    if form not in FORMS:
        raise unknown_name("packed_product", form, FORMS)
    return form


def reads_blocks(scheme: str, form: str) -> bool:
    """Whether a form reads matrices of a scheme piece by piece, so that it may as well read them out of a stack."""
    return form == "blocked" or (form in ("integer", "columns") and scheme == "int4")


def set_form(modules: Sequence[nnx.Module], form: str, release: bool = False) -> None:
    """Let every packed product of readable networks take one form, and log it. release: see ``ReadPacked.lay_out``."""
    nodes = [node for module in modules for _, node in nnx.iter_modules(module)]
    packed = [node for node in nodes if isinstance(node, (ReadPacked, ReadPackedEmbedder))]
    for node in packed:
        node.form = form
        if form in ("columns", "reduced") and isinstance(node, ReadPacked):
            node.lay_out(release)
    log.info("%d packed products in form %r%s", len(packed), form, _EXCEPT.get(form, ""))


def read_packed(x: jax.Array, values: jax.Array, scale: jax.Array, form: str, place: jax.Array | int = 0) -> jax.Array:
    """``x @ unpack(values, scale).T``: x (..., I) -> f32 (..., O), accumulated in f32.

    place: for what ``reads_blocks``, values and scale may be stacks; this is the matrix meant, leading axes counted as one.
    int4 in the form ``columns`` must have been laid out by ``by_columns``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if form == "columns" and values.dtype == jnp.int8:
        form = "integer"
    if form == "integer" and not (values.dtype == jnp.int8 and scale.shape[-1] == 1 and len(rows) <= INTEGER_ROWS):
        form = "blocked"
    if form in _OF_STACKS:
        y = _OF_STACKS[form](rows, values, scale, place)
    else:
        y = _PRODUCTS[form](rows, values, scale)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _integer(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    digits, step = _digits(x.astype(jnp.float32))
    sums = jnp.einsum("kmi,oi->kmo", digits, values, preferred_element_type=jnp.int32)
    # A product of digits is at most 2^14, so that int32 holds the sums of 2^17 inputs; f32 rounds each once.
    y = jnp.zeros(sums.shape[1:], jnp.float32)
    for digit in reversed(range(_DIGITS)):
        y = y * (1 << _DIGIT_BITS) + sums[digit].astype(jnp.float32)
    return y * step * scale[:, 0].astype(jnp.float32)


def _digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32 (M, I) as ``step * sum_k(2^(8 k) * digits[k])``: int8 (3, M, I) and f32 (M, 1).

    ``step`` is 2^-23 of the row's largest magnitude: what f32 keeps of that number.
    """
    most = 127 * sum(1 << (_DIGIT_BITS * k) for k in range(_DIGITS))  # every digit stays within -128…127
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / most
    rest = jnp.round(x * jnp.where(step == 0, 0, 1 / step)).astype(jnp.int32)
    half = 1 << (_DIGIT_BITS - 1)
    digits = []
    for _ in range(_DIGITS):
        low = ((rest + half) & ((1 << _DIGIT_BITS) - 1)) - half
        digits.append(low.astype(jnp.int8))
        rest = (rest - low) >> _DIGIT_BITS
    return jax.lax.optimization_barrier((jnp.stack(digits), step))


def _blocked(x: jax.Array, values: jax.Array, scale: jax.Array, place: jax.Array | int) -> jax.Array:
    outputs, width = values.shape[-2], x.shape[1]
    size = min(outputs, max(16, BLOCK_NUMBERS // width // 16 * 16))
    x = jax.lax.optimization_barrier(x.astype(unpacked_dtype(x)))
    x_halves = halves(x) if values.dtype == jnp.uint8 else None

    def block(start, y):
        some = [_rows(part, place, start, size) for part in (values, scale)]
        new = _block_int8(x, *some) if x_halves is None else _block_int4(x_halves, *some)
        return jax.lax.dynamic_update_slice(y, new, (jnp.int32(0), start))

    return over_blocks(outputs, size, block, to_write_over(x, outputs))


def _rows(part: jax.Array, place: jax.Array | int, start: jax.Array, size: int) -> jax.Array:
    """Rows of one matrix of a stack; a matrix is a stack of one."""
    stack = part.reshape(-1, *part.shape[-2:])
    return jax.lax.dynamic_slice(stack, (jnp.int32(place), start, jnp.int32(0)), (1, size, stack.shape[2]))[0]


def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    # The barrier keeps the conversion out of the product's inner loop.
    weights = jax.lax.optimization_barrier(weights)
    return product("mi,oi->mo", x, weights)


def _block_int8(x, values, scale):
    if scale.shape[1] > 1:  # groups, as in files of type Q8_0
        return _product(x, unpack(values, scale, x.dtype))
    return _product(x, values.astype(x.dtype)) * scale[:, 0].astype(jnp.float32)


def _block_int4(x_halves, values, scale):
    """Low and high halves are unpacked apart, so that nothing is interleaved."""
    low, high = x_halves
    groups = values.reshape(*scale.shape, GROUP // 2)
    scale = scale.astype(jnp.float32)[..., None]
    parts = [
        ((bits.astype(jnp.int32) - 8).astype(jnp.float32) * scale).astype(low.dtype).reshape(values.shape)
        for bits in (groups & 15, groups >> 4)
    ]
    return _product(low, parts[0]) + _product(high, parts[1])


def _pallas(x, values, scale):
    return packed_kernel.packed_product(x, values, scale)


def _reduced(x, values, scale):
    if len(x) == 1:
        return reduced.row_product(x, values, scale)
    if values.dtype == jnp.uint8 and len(x) <= packed_kernel.ROWS:
        return packed_kernel.packed_product(x, values, scale)
    if values.dtype == jnp.uint8 or scale.shape[1] > 1:
        return product("mi,oi->mo", x, unpack(values, scale, x.dtype))
    rows = jnp.pad(x, ((0, -len(x) % LEAST_ROWS), (0, 0)))
    y = product("mi,oi->mo", rows, values.astype(x.dtype))[: len(x)]  # exact in bf16
    return y * scale[:, 0].astype(jnp.float32)


def _unpacked(x, values, scale):
    return _product(x.astype(jnp.float32), unpack(values, scale))


_PRODUCTS = {"integer": _integer, "reduced": _reduced, "pallas": _pallas, "unpacked": _unpacked}
_OF_STACKS = {"blocked": _blocked, "columns": read_columns}


class ReadPacked(nnx.Module):
    """Packed linear maps of one input, their outputs side by side. values, scale: of each map, as they were unless the form is
    ``columns``. place: in stacks."""

    lora: nnx.Module | None = None
    place: jax.Array | int = 0

    def __init__(self, *sources: QuantizedLinear, columns: slice | None = None):
        """Their arrays are shared, unless only some ``columns`` are taken."""
        self.form = "blocked"
        pairs = [(source.values[...], source.scale[...]) for source in sources]
        if columns is not None:
            pairs = [input_columns(*pair, columns) for pair in pairs]
        self.values = nnx.List([Quantized(values) for values, _ in pairs])
        self.scales = nnx.List([Quantized(scale) for _, scale in pairs])

    def lay_out(self, release: bool) -> None:
        """As ``form`` reads them: int4 matrices by columns, one after the other, or (``reduced``) all maps as one matrix. With
        ``release`` those that they were made of are freed."""
        if self.form == "reduced":
            if len(self.values) > 1:
                self.values, self.scales = (nnx.List([_joined(part, release)]) for part in (self.values, self.scales))
            return
        for values, scale in zip(self.values, self.scales, strict=True):
            old = values[...], scale[...]
            if old[0].dtype != jnp.uint8:
                continue
            new = jax.block_until_ready(by_columns(*old))
            values.set_value(new[0])
            scale.set_value(new[1])
            if release:
                free(old)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., out) in x's dtype."""
        return self.unrounded(x, x.dtype).astype(x.dtype)

    def unrounded(self, x: jax.Array, dtype) -> jax.Array:
        """x (..., in) in f32 or ``dtype`` -> (..., out) in f32; see ``ReadLinear.unrounded``."""
        x = x.astype(dtype)
        pairs = zip(self.values, self.scales, strict=True)
        parts = [read_packed(x, values[...], scale[...], self.form, self.place) for values, scale in pairs]
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        return y if self.lora is None else y + self.lora(x)


def _joined(parts: Sequence[Quantized], release: bool) -> Quantized:
    """Arrays one below the other."""
    arrays = [part[...] for part in parts]
    joined = jax.block_until_ready(jnp.concatenate(arrays))
    if release:
        free(arrays)
    return Quantized(joined)


def free(arrays: Sequence[jax.Array]) -> None:
    """Give back the memory of arrays that nothing reads any more."""
    for array in arrays:
        array.delete()


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
