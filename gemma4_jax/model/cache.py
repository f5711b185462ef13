"""Key/value caches for sampling: what is stored, in which layout, and how it is read.

Axis letters: B batch, T new positions, S slots, K key/value heads, G = N/K, H head width, C stored numbers of a token
and head, M = T*G query rows of one key/value head.

Layout, stated once: every buffer is ``(B, K, S, C)``. Head before slot, because then both attention products are plain
batched matrix products over contiguous slots; ``(B, S, K, C)`` makes XLA transpose the whole cache at each step.

* Sliding layers hold a ring of ``W + D + 1`` slots (W window, D longest draft): position p lies in slot ``p mod S``. A
  verification writes D+1 positions before it is known which of them stay. Those overwritten are older than all that the
  next verification (W-1 back) and the drafter (W+1 back) read, so a rejection needs no repair: the length alone decides
  what a slot means (``ring_positions``).
* Global layers without values of their own hold the compact form ``[v (H) | turned dimensions of k (2R)]``: k is
  ``k_norm * v`` on the dimensions that RoPE leaves alone. 640 numbers in the 12B instead of 1024; scores are one
  product with ``[q * k_norm, 0 on turned dimensions | turned q]``, and values are the first H numbers of what was read.
* Global layers with separate values, or without the value norm, hold plain keys and values (``KindLayout.compact``).

Storage is float32, bfloat16, or int8 with one f32 scale for each token, head and part. bfloat16 numbers are held as their
bits (uint16): XLA:CPU slices no bf16, and would convert a whole cache to f32 to read one block of it. Rows have lengths of
their own, kept by the caller. Positions at or beyond a row's length are never read, whatever lies there.

A network whose layers run in a loop takes the caches of like layers as one stack, ``(L*B, K, S, C)`` for L layers: the rows
of layer i begin at ``first = i * B``. Functions that read or write touch these rows alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import FULL, SLIDING, ModelConfig
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.apart import own_program, runs_apart
from gemma4_jax.model.attention import MASKED
from gemma4_jax.model.decoder import runs_of, scanned_layers
from gemma4_jax.model.products import product
from gemma4_jax.model.rope import inverse_frequencies

CACHE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.uint16, "int8": jnp.int8}  # and what holds their numbers
BLOCK = 256  # slots of a global cache read at once
GPU_BLOCK = 8192  # the same on GPUs, where a turn of a loop waits for the host longer than it takes to read as many
GPU_SCORES = 1 << 26  # of which fewer are read for so many query rows that a block has more scores
SMALL = 1 << 19  # numbers that stay in a core's cache
FEW = 64  # query rows for which XLA:CPU multiplies f32 keys by query columns faster than rows by keys, which it lays out anew


class Store(NamedTuple):
    """One buffer. data: (B, K, S, C); scale: f32 (B, K, S, number of parts) for int8, else None. A stack: L*B rows."""

    data: jax.Array
    scale: jax.Array | None


class LayerCache(NamedTuple):
    """Buffers of one layer; values is None in the compact form."""

    keys: Store
    values: Store | None


Entries = Store | LayerCache


@dataclasses.dataclass(frozen=True)
class KindLayout:
    """What the layers of one kind store for a token."""

    kind: str
    kv_heads: int
    head_width: int
    turned: int  # R: angles that RoPE turns
    compact: bool
    scale: float

    @property
    def key_parts(self) -> tuple[int, ...]:
        """Widths of the parts of ``keys``, each with a scale of its own in int8."""
        return (self.head_width, 2 * self.turned) if self.compact else (self.head_width,)

    def numbers_per_token(self) -> int:
        """Numbers stored for one token of one layer."""
        return self.kv_heads * (sum(self.key_parts) + (0 if self.compact else self.head_width))


@functools.lru_cache(maxsize=256)
def kind_layout(config: ModelConfig, kind: str) -> KindLayout:
    """The layout of a layer kind, from the architecture alone."""
    width = config.head_width(kind)
    turned = width // 2
    if kind == FULL:
        turned = len(inverse_frequencies(width, config.global_rope_theta, config.partial_rotary_factor))
    compact = not config.separate_values(kind) and config.value_norm
    return KindLayout(kind, config.kv_heads(kind), width, turned, compact, config.attention_scale)


def ring_slots(config: ModelConfig, max_length: int, draft_tokens: int) -> int:
    """Slots of a sliding layer: W + D + 1, or fewer where no row can grow past the window."""
    return min(config.sliding_window, max_length) + draft_tokens + 1


def global_slots(max_length: int, draft_tokens: int) -> int:
    """Slots of a global layer: the longest row and a rejected draft, in whole blocks (or less than one block)."""
    slots = max_length + draft_tokens + 1
    return slots if slots <= BLOCK else -(-slots // BLOCK) * BLOCK


def cache_entries(config: ModelConfig, stacked: bool = False) -> list[tuple[str, int]]:
    """Kind and number of layers of each entry of the caches.

    One layer each, in order. stacked: the stacked layers (``scanned_layers``) have one entry for each run of like layers in
    their group, with those of all groups; the others follow.
    """
    kinds, repeats = scanned_layers(config) if stacked else ((), 0)
    stacks = [(kind, repeats * count) for kind, count in runs_of(kinds)]
    return stacks + [(kind, 1) for kind in config.layer_types[repeats * len(kinds) :]]


def init_cache(
    config: ModelConfig,
    batch: int,
    max_length: int,
    draft_tokens: int = 0,
    dtype: str = "float32",
    stacked: bool = False,
) -> tuple[LayerCache, ...]:
    """Empty caches, one entry a layer, or fewer (``cache_entries``).

    Args:
      config: the model.
      batch: B.
      max_length: longest row, prompt and continuation together.
      draft_tokens: D, longest draft.
      dtype: one of ``CACHE_DTYPES``.
      stacked: see ``cache_entries``.

    Raises:
      ConfigError: unknown dtype.
    """
    if dtype not in CACHE_DTYPES:
        raise ConfigError(f"cache dtype is {dtype!r}; choices: {', '.join(CACHE_DTYPES)}")
    entries = []
    for kind, layers in cache_entries(config, stacked):
        layout, rows = kind_layout(config, kind), layers * batch
        local = kind == SLIDING
        slots = ring_slots(config, max_length, draft_tokens) if local else global_slots(max_length, draft_tokens)
        values = None if layout.compact else _empty(layout, rows, slots, (layout.head_width,), dtype)
        entries.append(LayerCache(_empty(layout, rows, slots, layout.key_parts, dtype), values))
    return tuple(entries)


def _empty(layout: KindLayout, rows: int, slots: int, parts: tuple[int, ...], dtype: str) -> Store:
    shape = (rows, layout.kv_heads, slots)
    scale = jnp.zeros((*shape, len(parts)), jnp.float32) if dtype == "int8" else None
    return Store(jnp.zeros((*shape, sum(parts)), CACHE_DTYPES[dtype]), scale)


def cache_bytes(
    config: ModelConfig, max_length: int, draft_tokens: int = 0, dtype: str = "bfloat16", batch: int = 1
) -> dict[str, int]:
    """Size in bytes without allocating: ``sliding_attention`` and ``full_attention`` totals, ``total``, and
    ``per_token``, by which the total grows for each further token once the rings are full."""
    shapes = jax.eval_shape(lambda: init_cache(config, batch, max_length, draft_tokens, dtype))
    size = {kind: 0 for kind in dict.fromkeys(config.layer_types)}
    for kind, layer in zip(config.layer_types, shapes, strict=True):
        size[kind] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))
    per_token = size.get(FULL, 0) // global_slots(max_length, draft_tokens)
    return {**size, "total": sum(size.values()), "per_token": per_token}


def layer_rows(cache: Any, first: jax.Array | int, batch: int) -> Any:
    """A ``Store`` or ``LayerCache`` with the B rows of one layer alone; what holds no others is given back as it is."""
    if all(len(x) == batch for x in jax.tree.leaves(cache)):
        return cache

    def cut(cache, first):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, batch), cache)

    # XLA would fuse it into each of its readers. One that came after a write would need a copy of the stack before it.
    return own_program(cut, cache, first)


def put_rows(cache: Any, rows: Any, first: jax.Array | int) -> Any:
    """The inverse of ``layer_rows``: the cache with the rows of one layer replaced."""

    def put(x, new):
        return new if len(x) == len(new) else jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=0)

    return jax.tree.map(put, cache, rows)


def ring_positions(length: jax.Array, slots: int) -> jax.Array:
    """The position that each slot of a ring holds once ``length`` positions are written; negative: none yet.

    length: int32 (B,) -> int32 (B, S). Slots that a rejected draft overwrote get the position they held before it,
    which lies outside of every window that is read at this length.
    """
    newest = length[:, None] - 1
    return newest - jnp.mod(newest - jnp.arange(slots, dtype=jnp.int32)[None], jnp.int32(slots))


# ---------------------------------------------------------------------------------------------------------------- forms


def _turned_dims(layout: KindLayout) -> np.ndarray:
    first = np.arange(layout.turned)
    return np.concatenate([first, first + layout.head_width // 2])


def stored_form(layout: KindLayout, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """New keys and values (B, T, K, H) in the form that is stored: (B, K, T, C), and None in the compact form."""
    if not layout.compact:
        return k.swapaxes(1, 2), v.swapaxes(1, 2)
    half, turned = layout.head_width // 2, layout.turned
    rotated = [k[..., :turned], k[..., half : half + turned]]
    return jnp.concatenate([v, *rotated], axis=-1).swapaxes(1, 2), None


def query_form(layout: KindLayout, q: jax.Array, key_norm: jax.Array | None) -> jax.Array:
    """Queries (B, T, N, H) as rows against stored keys: (B, K, M, C). key_norm: (H,), used by the compact form."""
    b, t, n, h = q.shape
    if layout.compact:
        half, turned = h // 2, layout.turned
        rotated = jnp.concatenate([q[..., :turned], q[..., half : half + turned]], axis=-1)
        factor = np.ones(h, np.float32)
        factor[_turned_dims(layout)] = 0.0
        plain = q * (key_norm.astype(jnp.float32) * factor).astype(q.dtype)
        q = jnp.concatenate([plain, rotated], axis=-1)
    group = n // layout.kv_heads
    q = q.reshape(b, t, layout.kv_heads, group, q.shape[-1]).swapaxes(1, 2)
    return q.reshape(b, layout.kv_heads, t * group, q.shape[-1])


def heads_of_rows(rows: jax.Array, length: int) -> jax.Array:
    """Outputs (B, K, M, H) back to (B, T, N, H)."""
    b, kv, m, h = rows.shape
    return rows.reshape(b, kv, length, m // length, h).swapaxes(1, 2).reshape(b, length, -1, h)


def quantize_parts(x: jax.Array, parts: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x (..., C) -> int8 (..., C) and f32 scales (..., number of parts): the largest number of a part becomes 127."""
    pieces, scales = [], []
    for piece in jnp.split(x.astype(jnp.float32), np.cumsum(parts)[:-1], axis=-1):
        scale = jnp.maximum(jnp.max(jnp.abs(piece), axis=-1, keepdims=True), 1e-30) / 127.0
        pieces.append(jnp.round(piece / scale).astype(jnp.int8))
        scales.append(scale)
    return jnp.concatenate(pieces, axis=-1), jnp.concatenate(scales, axis=-1)


def encode(x: jax.Array, like: Store, parts: tuple[int, ...]) -> Store:
    """New entries (B, K, T, C) in the storage dtype of ``like``."""
    if like.data.dtype == jnp.uint16:
        return Store(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16), None)
    if like.scale is None:
        return Store(x.astype(like.data.dtype), None)
    return Store(*quantize_parts(x, parts))


def read(store: Store, parts: tuple[int, ...], dtype) -> jax.Array:
    """Entries as numbers in the activation dtype."""
    if store.data.dtype == jnp.uint16 and dtype == jnp.float32:  # as XLA:CPU widens fastest
        return jax.lax.bitcast_convert_type(store.data.astype(jnp.uint32) << 16, jnp.float32)
    if store.data.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(store.data, jnp.bfloat16).astype(dtype)
    if store.scale is None:
        return store.data.astype(dtype)
    scale = jnp.repeat(store.scale, np.asarray(parts), axis=-1, total_repeat_length=sum(parts))
    return (store.data.astype(jnp.float32) * scale).astype(dtype)


def read_dtype(q: jax.Array, slots: int) -> Any:
    """What query rows (B, K, M, C) want to read so many slots of a cache as: their own dtype, or f32 where few rows meet a small
    cache on CPUs. XLA:CPU widens bf16 number by number inside of a product, which costs less only where memory is what counts."""
    numbers = q.size // q.shape[2] * slots
    return jnp.dtype(jnp.float32) if q.shape[2] <= FEW and numbers <= SMALL and runs_apart() else q.dtype


def read_both(layout: KindLayout, cache: LayerCache, dtype) -> tuple[jax.Array, jax.Array]:
    """Keys (B, K, S, C) and values (B, K, S, H) as numbers in the activation dtype."""
    keys = read(cache.keys, layout.key_parts, dtype)
    if cache.values is None:
        return keys, keys[..., : layout.head_width]
    return keys, read(cache.values, (layout.head_width,), dtype)


# --------------------------------------------------------------------------------------------------------- writing


def write_tokens(old: Entries, new: Entries, starts: jax.Array, ring: bool, first: jax.Array | int = 0) -> Entries:
    """Write T positions of every row from ``starts`` (B,) int32 on, in place inside a device loop.

    In a ring each position goes to its own slot; else they lie side by side. The caller sees to it that they fit.
    old, new: stores, or all stores of a layer, which are written in one loop. first: of the layer's rows.
    """
    slots, length, zero = _places(old), _places(new), jnp.int32(0)
    if jax.default_backend() == "gpu":
        return _scatter_tokens(old, new, starts, ring, first)

    def put(row, buffer, values):
        one = jax.lax.dynamic_slice_in_dim(values, row, 1, axis=0)
        start = jax.lax.dynamic_index_in_dim(starts, row, keepdims=False)
        if not ring:
            return jax.lax.dynamic_update_slice(buffer, one, (first + row, zero, start, zero))
        for t in range(length):
            slot = jnp.mod(start + jnp.int32(t), jnp.int32(slots))
            buffer = jax.lax.dynamic_update_slice(buffer, one[:, :, t : t + 1], (first + row, zero, slot, zero))
        return buffer

    return _row_by_row(put, old, new, starts)


def _scatter_tokens(old: Entries, new: Entries, starts: jax.Array, ring: bool, first: jax.Array | int) -> Entries:
    """``write_tokens`` as one scatter an array: on GPUs each turn of a loop waits for the host."""
    slots, length = _places(old), _places(new)
    places = starts[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    places = jnp.mod(places, jnp.int32(slots)) if ring else places
    rows = first + jnp.arange(len(starts), dtype=jnp.int32)[:, None]

    def put(buffer, values):
        at = buffer.at[rows, :, places]
        return at.set(values.swapaxes(1, 2), mode="promise_in_bounds", unique_indices=True)

    return jax.tree.map(put, old, new)


def _places(entries: Entries) -> int:
    """Slots or positions of arrays (B, K, S, C)."""
    return jax.tree.leaves(entries)[0].shape[2]


def _row_by_row(put: Callable[..., jax.Array], old: Entries, new: Entries, starts: jax.Array) -> Entries:
    """``put(row, buffer, values)`` for every row and array, in place.

    A loop even for one row, and with a bound that XLA cannot fold: a bare update would be repeated inside the product that
    reads it, and the whole ring copied for that.
    """
    zero = jnp.int32(0)
    bound = jnp.where(starts[0] >= 0, jnp.int32(len(starts)), zero)
    return jax.lax.fori_loop(zero, bound, lambda row, old: jax.tree.map(lambda b, v: put(row, b, v), old, new), old)


def write_chunk(
    old: Entries, new: Entries, starts: jax.Array, counts: jax.Array, ring: bool, first: jax.Array | int = 0
) -> Entries:
    """Write the first ``counts`` (B,) of T positions of every row from ``starts`` (B,) on; the others leave no trace.

    For prefill: T may exceed the ring (the newest stay) and the padded end may lie beyond the capacity. A ring is given
    alone (``layer_rows``); first: of the layer's rows in a global cache.
    """
    slots, length = _places(old), _places(new)
    if ring:
        position = ring_positions(starts + counts, slots)
        source = position - starts[:, None]
        fresh = source >= 0

        def mix(old, values):
            taken = jnp.take_along_axis(values, jnp.clip(source, 0, length - 1)[:, None, :, None], axis=2)
            return jnp.where(fresh[:, None, :, None], taken, old)

        return jax.tree.map(mix, old, new)
    width = min(length, slots)
    at = jnp.clip(starts, 0, slots - width)
    source = at[:, None] + jnp.arange(width, dtype=jnp.int32)[None] - starts[:, None]
    fresh = (source >= 0) & (source < counts[:, None])

    def put(row, buffer, values):
        taken = values[row][:, jnp.clip(source[row], 0, length - 1)]
        place = (first + row, jnp.int32(0), at[row], jnp.int32(0))
        kept = jax.lax.dynamic_slice(buffer, place, (1, buffer.shape[1], width, buffer.shape[3]))
        return jax.lax.dynamic_update_slice(buffer, jnp.where(fresh[row][None, None, :, None], taken, kept), place)

    return _row_by_row(put, old, new, starts)


# --------------------------------------------------------------------------------------------------------- reading


def attend_whole(layout: KindLayout, q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of query rows over whole buffers.

    Args:
      q: (B, K, M, C) from ``query_form``; keys (B, K, S, C), values (B, K, S, H); mask: bool (B, T, S).

    Returns:
      (B, K, M, H) in q's dtype. Rows without an allowed key are finite and meaningless.
    """
    scores = _masked(layout, _scores(q, keys), mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = product("bkms,bksh->bkmh", weights, values)
    return out.astype(q.dtype)


def _scores(q: jax.Array, keys: jax.Array) -> jax.Array:
    """f32 products of queries (B, K, M, C) and keys (B, K, S, C): (B, K, M, S)."""
    if keys.dtype == jnp.float32 and q.shape[2] <= FEW and runs_apart():
        columns = jax.lax.optimization_barrier(q.astype(jnp.float32).swapaxes(2, 3))
        return product("bksc,bkcm->bksm", keys, columns).swapaxes(2, 3)
    return product("bkmc,bksc->bkms", q, keys)


def _masked(layout: KindLayout, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """f32 scores (B, K, M, S), scaled, under a mask (B, T, S)."""
    b, kv, m, s = scores.shape
    t = mask.shape[1]
    if layout.scale != 1.0:
        scores = scores * layout.scale
    scores = jnp.where(mask[:, None, :, None, :], scores.reshape(b, kv, t, m // t, s), MASKED)
    return scores.reshape(b, kv, m, s)


def _block(rows: int) -> int:
    """Slots of a global cache that so many query rows read at once."""
    return max(BLOCK, min(GPU_BLOCK, GPU_SCORES // rows)) if jax.default_backend() == "gpu" else BLOCK


def attend_blocks(
    layout: KindLayout, q: jax.Array, cache: LayerCache, last: jax.Array, first: jax.Array | int = 0
) -> jax.Array:
    """Attention over a global cache in blocks: reads no more of it than the longest row has written.

    Args:
      q: (B, K, M, C) from ``query_form``.
      cache: slots are positions.
      last: int32 (B, T), the last position that each query may read; at least 0.
      first: of the layer's rows.

    Returns:
      (B, K, M, H) in q's dtype.
    """
    b, kv, m, _ = q.shape
    slots = cache.keys.data.shape[2]
    block = _block(m)
    if slots <= block:  # one block: no loop
        mask = jnp.arange(slots, dtype=jnp.int32) <= last[:, :, None]
        return attend_whole(layout, q, *read_both(layout, layer_rows(cache, first, b), read_dtype(q, slots)), mask)
    blocks = jnp.max(last) // block + 1
    index = jnp.arange(block, dtype=jnp.int32)

    def cut(x, start):
        place = (jnp.int32(first), jnp.int32(0), start, jnp.int32(0))
        return jax.lax.dynamic_slice(x, place, (b, x.shape[1], block, x.shape[3]))

    def step(i, carry):
        top, total, out = carry
        # The last block may begin earlier: what lies before its own positions has been read.
        start = jnp.minimum(i * block, slots - block)
        positions = start + index
        keys, values = read_both(layout, jax.tree.map(lambda x: cut(x, start), cache), read_dtype(q, block))
        unread = (positions >= i * block)[None, None]
        scores = _masked(layout, _scores(q, keys), unread & (positions[None, None] <= last[:, :, None]))
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top - new_top)
        add = product("bkms,bksh->bkmh", weights.astype(values.dtype), values)
        return new_top, total * shrink + jnp.sum(weights, axis=-1, keepdims=True), out * shrink + add

    # Block 0 holds a key of every query, so ``top`` is real from the first block on, and what ``out`` begins with is multiplied
    # by 0 there. Zeros would wait for nothing: XLA:CPU makes those of all layers at the start, and holds them.
    start = (
        jnp.full((b, kv, m, 1), MASKED, jnp.float32),
        jnp.zeros((b, kv, m, 1), jnp.float32),
        q[..., : layout.head_width].astype(jnp.float32),
    )
    _, total, out = jax.lax.fori_loop(jnp.int32(0), blocks.astype(jnp.int32), step, start)
    return (out / total).astype(q.dtype)
