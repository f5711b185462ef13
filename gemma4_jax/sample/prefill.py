"""Prefill: prompts go through in chunks of a few fixed sizes.

Axis letters: B batch, T chunk length, D model width. Memory is bounded by the chunk: attention runs over blocks of the
cache, and only the last real row of each prompt leaves the network.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.model.cache import LayerCache
from gemma4_jax.model.rope import rope_table
from gemma4_jax.sample.attend import PrefillAttend
from gemma4_jax.sample.weights import ReadTarget

SMALLEST_CHUNK = 32


class Prefix(NamedTuple):
    """What prefill leaves. lengths: int32 (B,); hidden: (B, D), the final hidden row of each newest position."""

    caches: tuple[LayerCache, ...]
    lengths: jax.Array
    hidden: jax.Array


class Chunk(NamedTuple):
    """One call. size: T of the compiled shape; starts and counts: int32 (B,), the real positions of each row."""

    size: int
    starts: np.ndarray
    counts: np.ndarray


def chunk_sizes(largest: int) -> tuple[int, ...]:
    """The compiled sizes: doublings from ``SMALLEST_CHUNK`` up to ``largest``."""
    sizes = []
    size = min(SMALLEST_CHUNK, largest)
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


def cut_row(length: int, largest: int, runs: np.ndarray | None = None) -> list[int]:
    """Lengths of a prompt's pieces: at most ``largest``, except that an image run is never cut.

    Args:
      length: of the prompt.
      largest: chunk size.
      runs: int (length,), the image run of each position, -1 outside; None: no images.
    """
    sizes, pieces, start = chunk_sizes(largest), [], 0
    while start < length:
        rest = length - start
        # A padded row costs as much as a real one: pad by a third at most, else take the next smaller size first.
        fitting = [s for s in sizes if s <= rest]
        covering = [s for s in sizes if s >= rest and 4 * rest >= 3 * s]
        count = rest if covering else fitting[-1] if fitting else rest
        if runs is not None and start + count < length:
            count = _whole_runs(runs, start, start + count) - start
        pieces.append(count)
        start += count
    return pieces


def _whole_runs(runs: np.ndarray, start: int, end: int) -> int:
    """The cut nearest to ``end`` that leaves image runs whole: before a run if that leaves a piece, else behind it."""
    run = runs[end]
    if run < 0 or runs[end - 1] != run:
        return end
    first = end
    while first > start and runs[first - 1] == run:
        first -= 1
    if first > start:
        return first
    while end < len(runs) and runs[end] == run:
        end += 1
    return end


def plan_chunks(rows: list[list[int]], largest: int) -> list[Chunk]:
    """Calls for a batch: the i-th takes the i-th piece of every row that has one."""
    sizes = chunk_sizes(largest)
    starts, chunks = np.zeros(len(rows), np.int32), []
    for i in range(max(len(pieces) for pieces in rows)):
        counts = np.asarray([pieces[i] if i < len(pieces) else 0 for pieces in rows], np.int32)
        longest = int(counts.max())
        size = next((s for s in sizes if s >= longest), -(-longest // largest) * largest)
        chunks.append(Chunk(size, starts.copy(), counts))
        starts = starts + counts
    return chunks


def prefill_chunk(
    target: ReadTarget, prefix: Prefix, counts: jax.Array, x: jax.Array, runs: jax.Array | None = None
) -> Prefix:
    """Run T more positions of every row.

    Args:
      target: the network.
      prefix: what the chunks before left.
      counts: int32 (B,), real positions of each row; the others leave no trace.
      x: (B, T, D) decoder inputs.
      runs: int32 (B, T), image run of each position, -1 outside; None: no images.
    """
    config, length = target.config, x.shape[1]
    positions = prefix.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    ropes = {kind: rope_table(config, kind, positions) for kind in dict.fromkeys(config.layer_types)}
    attend = PrefillAttend(config, prefix.lengths, counts, runs)
    x, caches = target.layers(x, ropes, attend, prefix.caches)
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where((counts > 0)[:, None], target.final_norm(last), prefix.hidden)
    return Prefix(caches, prefix.lengths + counts, hidden)
