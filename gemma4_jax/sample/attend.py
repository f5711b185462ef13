"""``attend`` functions that read and write caches: the decoder's blocks run unchanged over them.

Axis letters: B batch, T new positions, S slots, N query heads, K key/value heads, H head width.
Each returns (output, new LayerCache); one object serves one pass over all layers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.config import FULL, SLIDING, ModelConfig
from gemma4_jax.model import cache as kv
from gemma4_jax.model.attention import query_blocks
from gemma4_jax.model.cache import LayerCache
from gemma4_jax.model.masks import attention_band, attention_mask

OUTSIDE = -1  # image run of a token outside of runs


@dataclasses.dataclass(frozen=True)
class DecodeAttend:
    """T new positions of every row, all of them written (T is at most draft length + 1)."""

    config: ModelConfig
    lengths: jax.Array  # (B,) int32: positions already in the cache

    def layer(self, cache: LayerCache, first: jax.Array | int = 0):
        """The ``attend`` of one layer, whose rows of the cache begin at ``first``."""

        def attend(attention, q, k, v):
            layout = kv.kind_layout(self.config, attention.kind)
            length, ring = q.shape[1], attention.kind == SLIDING
            new = _write(layout, cache, k, v, lambda old, x: kv.write_tokens(old, x, self.lengths, ring, first))
            rows = kv.query_form(layout, q, attention.k_norm.weight[...])
            last = self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
            if ring:
                positions = kv.ring_positions(self.lengths + length, new.keys.data.shape[2])
                mask = attention_mask(SLIDING, self.config.sliding_window, last, positions)
                mask = mask & (positions >= 0)[:, None]
                read = kv.layer_rows(new, first, len(q))
                keys, values = kv.read_both(layout, read, kv.read_dtype(rows, positions.shape[1]))
                out = kv.attend_whole(layout, rows, keys, values, mask)
            else:
                out = kv.attend_blocks(layout, rows, new, last, first)
            return kv.heads_of_rows(out, length), new

        return attend


@dataclasses.dataclass(frozen=True)
class PrefillAttend:
    """A chunk of T positions a row, of which the first ``counts`` are real. Image runs lie whole inside a chunk."""

    config: ModelConfig
    starts: jax.Array  # (B,) int32: positions already in the cache
    counts: jax.Array  # (B,) int32
    runs: jax.Array | None = None  # (B, T) int32: image run of each position, -1 outside

    def layer(self, cache: LayerCache, first: jax.Array | int = 0):
        """The ``attend`` of one layer, whose rows of the cache begin at ``first``."""

        def attend(attention, q, k, v):
            layout = kv.kind_layout(self.config, attention.kind)
            length, ring = q.shape[1], attention.kind == SLIDING
            key_norm = attention.k_norm.weight[...]

            def put(old, x):
                return kv.write_chunk(old, x, self.starts, self.counts, ring, first)

            if ring:
                old = kv.layer_rows(cache, first, len(q))
                new = kv.put_rows(cache, _write(layout, old, k, v, put), first)
            else:
                new = _write(layout, cache, k, v, put)

            def look_back():
                rows = kv.query_form(layout, q, key_norm)
                if ring:
                    return self._over_chunk(layout, rows, k, v, old)
                offsets = jnp.minimum(jnp.arange(length, dtype=jnp.int32)[None], self.counts[:, None] - 1)
                return kv.attend_blocks(layout, rows, new, jnp.maximum(self.starts[:, None] + offsets, 0), first)

            def alone():
                plain = dataclasses.replace(layout, compact=False)
                return self._over_chunk(plain, kv.query_form(plain, q, None), k, v)

            if jax.default_backend() == "gpu":  # a choice waits for the host, and both sides have to be compiled
                return kv.heads_of_rows(look_back(), length), new
            return kv.heads_of_rows(jax.lax.cond(jnp.any(self.starts > 0), look_back, alone), length), new

        return attend

    def _over_chunk(self, layout, rows, k, v, ring: LayerCache | None = None):
        """Over the chunk and, before it, the ring as it was: early queries need keys that the chunk overwrites."""
        config, length = self.config, k.shape[1]
        offsets = jnp.arange(length, dtype=jnp.int32)[None]
        positions = self.starts[:, None] + offsets
        runs = jnp.full_like(positions, OUTSIDE) if self.runs is None else self.runs
        chunk = _Keys(k.swapaxes(1, 2), v.swapaxes(1, 2), positions, offsets < self.counts[:, None], runs)
        if ring is not None:
            old = kv.ring_positions(self.starts, ring.keys.data.shape[2])
            before = _Keys(*kv.read_both(layout, ring, k.dtype), old, old >= 0, jnp.full_like(old, OUTSIDE))
        group, out = rows.shape[2] // length, []
        for queries, keys in query_blocks(length, attention_band(config, layout.kind, self.runs is not None)):
            read = chunk.cut(keys)
            if ring is not None and queries.start < config.sliding_window:  # later queries see nothing that far back
                read = before.before(read)
            mask = attention_mask(
                layout.kind, config.sliding_window, positions[:, queries], read.positions, runs[:, queries], read.runs
            )
            some = rows[:, :, queries.start * group : queries.stop * group]
            out.append(kv.attend_whole(layout, some, read.keys, read.values, mask & read.exists[:, None]))
        return jnp.concatenate(out, axis=2)


class _Keys(NamedTuple):
    """What queries may see. keys, values: (B, K, S, H); positions, runs: int32 (B, S); exists: bool (B, S)."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    exists: jax.Array
    runs: jax.Array

    def cut(self, part: slice) -> _Keys:
        return _Keys(self.keys[:, :, part], self.values[:, :, part], *(x[:, part] for x in self[2:]))

    def before(self, other: _Keys) -> _Keys:
        axes = (2, 2, 1, 1, 1)
        return _Keys(*(jnp.concatenate(p, axis=a) for *p, a in zip(self, other, axes, strict=True)))


def _write(layout, cache: LayerCache, k, v, put) -> LayerCache:
    keys, values = kv.stored_form(layout, k, v)
    new = LayerCache(kv.encode(keys, cache.keys, layout.key_parts), None)
    if values is not None:
        new = new._replace(values=kv.encode(values, cache.values, (layout.head_width,)))
    return put(cache, new)


def drafter_attend(
    config: ModelConfig, caches: dict[str, tuple[LayerCache, int]], key_norms: dict[str, jax.Array], lengths
):
    """The drafter's ``attend``: the target's caches as they are, keys before each row's newest token only.

    Sliding drafter layers see the last W+1 rows (mtp.md: forward).

    Args:
      caches: layer kind -> cache of the target's last layer of that kind, and where its rows begin there.
      key_norms: layer kind -> that layer's key norm (H,), for the compact form.
      lengths: (B,) int32, positions in the cache, at least 1.
    """

    def attend(attention, q):
        kind = attention.kind
        layout, (cache, first) = kv.kind_layout(config, kind), caches[kind]
        rows = kv.query_form(layout, q, key_norms[kind])
        if kind == FULL:
            out = kv.attend_blocks(layout, rows, cache, lengths[:, None] - 1, first)
        else:
            positions = kv.ring_positions(lengths, cache.keys.data.shape[2])
            mask = (positions >= 0) & (positions >= lengths[:, None] - 1 - config.sliding_window)
            read = kv.layer_rows(cache, first, len(q))
            keys, values = kv.read_both(layout, read, kv.read_dtype(rows, positions.shape[1]))
            out = kv.attend_whole(layout, rows, keys, values, mask[:, None])
        return kv.heads_of_rows(out, q.shape[1]), None

    return attend
