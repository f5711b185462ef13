"""Attention masks: causal AND window AND segment, with image runs open in both directions on sliding layers.

Axis letters: B batch, T query positions, S key positions. True means "may attend". The rule (spec: one decoder layer):
global layers are causal; sliding layers allow ``(key <= query OR same image run) AND key > query - window``. Padding
(segment 0) and packing are further ANDs, never replacements.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma4_jax.config import FULL, SLIDING, ModelConfig

TEXT, IMAGE, VIDEO, AUDIO = 0, 1, 2, 3  # token types


class Band(NamedTuple):
    """Which keys a mask may allow at all, known while tracing: ``t - back … t + ahead`` for the query at row index t; None:
    no bound. What lies outside is neither multiplied nor stored (``attention.masked_attention``)."""

    back: int | None = None
    ahead: int | None = None


def attention_band(config: ModelConfig, kind: str, has_media: bool) -> Band:
    """The band of a layer kind's mask; image runs look ahead by a length that is not known while tracing."""
    if kind == FULL:
        return Band(None, 0)
    return Band(config.sliding_window - 1, None if has_media else 0)


def image_runs(token_types: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Number the maximal runs of vision tokens inside one packed example.

    Args:
      token_types: (B, T) int32, 1 image and 2 video frame are vision.
      segment_ids: (B, T) int32 or None.

    Returns:
      (B, T) int32: the run's number, -1 outside of runs.
    """
    vision = (token_types == IMAGE) | (token_types == VIDEO)
    before = jnp.pad(vision[:, :-1], ((0, 0), (1, 0)))
    starts = vision & ~before
    if segment_ids is not None:
        changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        starts = vision & (~before | changed)
    return jnp.where(vision, jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1, -1)


def attention_mask(
    kind: str,
    window: int,
    query_index: jax.Array,
    key_index: jax.Array,
    query_run: jax.Array | None = None,
    key_run: jax.Array | None = None,
) -> jax.Array:
    """The rule above between indices of one row, without padding.

    Args:
      kind: layer kind.
      window: W; a query sees itself and W-1 earlier keys on sliding layers.
      query_index, key_index: (B or 1, T) and (B or 1, S) int32.
      query_run, key_run: image runs of the same shapes, or None.

    Returns:
      bool (B or 1, T, S).
    """
    q, k = query_index[:, :, None], key_index[:, None, :]
    allowed = k <= q
    if kind == FULL:
        return allowed
    if query_run is not None:
        same = (query_run[:, :, None] == key_run[:, None, :]) & (query_run >= 0)[:, :, None]
        allowed = allowed | same
    return allowed & (k > q - window)


def make_masks(
    config: ModelConfig, length: int, segment_ids: jax.Array | None = None, token_types: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Masks of whole rows for each layer kind: bool (B or 1, T, T).

    Args:
      config: gives window and whether vision is bidirectional.
      length: T.
      segment_ids: (B, T) int32, 0 is padding; None: one example fills each row.
      token_types: (B, T) int32; None: all text.
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    runs = None
    if token_types is not None and config.use_bidirectional_attention == "vision":
        runs = image_runs(token_types, segment_ids)
    masks = {}
    for kind in dict.fromkeys(config.layer_types):
        mask = attention_mask(kind, config.sliding_window, index, index, runs, runs)
        masks[kind] = mask if segment_ids is None else mask & same_segment(segment_ids, segment_ids)
    return masks


def same_segment(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """True where both are of one packed example: (B, T), (B, S) int32 -> bool (B, T, S). Segment 0 matches nothing."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_segments != 0)[:, None, :]


def drafter_masks(
    config: ModelConfig, queries: jax.Array, length: int, segment_ids: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What drafter queries may read of their target's keys (mtp.md: forward): keys strictly before the query.

    Sliding drafter layers see the last W+1 of those rows, one more than the target's own window.

    Args:
      queries: (Q,) int32, row indices of the newest tokens.
      length: S, keys in a row.
      segment_ids: (B, S) int32 or None.

    Returns:
      bool (B or 1, Q, S) for each layer kind of the drafter.
    """
    q, k = queries[None, :, None], jnp.arange(length, dtype=jnp.int32)[None, None, :]
    before = k < q
    masks = {FULL: before, SLIDING: before & (k >= q - 1 - config.sliding_window)}
    if segment_ids is not None:
        same = same_segment(segment_ids[:, queries], segment_ids)
        masks = {kind: mask & same for kind, mask in masks.items()}
    return {kind: masks[kind] for kind in dict.fromkeys(config.drafter.layer_types)}
