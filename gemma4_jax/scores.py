"""Logits of whole rows: the target's, and the drafter's for what comes after them. Without caches; for sampling see ``sample``.

Axis letters: B batch, T positions, V vocabulary, J draft steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.bundle import Bundle
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import ConfigError, PromptError
from gemma4_jax.model.drafter import draft_rollout

_LENGTH_STEP = 16  # rows are padded to a multiple, so that few lengths are compiled


def logits(
    bundle: Bundle,
    tokens: Sequence[Sequence[int]],
    images: Sequence[Any] | None = None,
    audio: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
) -> jax.Array:
    """The target's soft-capped logits of whole rows.

    Args:
      tokens: rows of token ids; they may differ in length.
      images, audio, videos: per row a list of sources for the row's soft tokens, or None.

    Returns:
      f32 (B, T, V) with T the longest row; what lies behind a shorter row's end is finite and meaningless.

    Raises:
      PromptError: an empty row or an id out of range, naming the row. MediaError: media that do not fit the
        placeholders.
    """
    media_ids = _media_ids(bundle.config) if any(m is not None for m in (images, audio, videos)) else ()
    rows = _checked_rows(tokens, bundle.config.vocab_size, media_ids)
    longest = max(map(len, rows))
    batch = bundle.processor(rows, images, audio, videos, length=_padded(longest))
    segments = (np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).astype(np.int32)
    graph, state = nnx.split(bundle.model)
    return _logits(graph, state, batch.tokens, segments, batch.token_types, batch.media)[:, :longest]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, tokens, segments, token_types, media):
    model = nnx.merge(graph, state)
    output = model(tokens, segment_ids=segments, token_types=token_types, media=media)
    return model.logits(output.hidden)


def draft_logits(bundle: Bundle, tokens: Sequence[Sequence[int]], steps: int = 4) -> jax.Array:
    """The drafter's logits for the tokens after each row, feeding back its own argmax (mtp.md: forward, one draft
    step).

    Args:
      tokens: rows of at least two ids; the last of a row is the newest token, whose keys and values the target has not
        computed. Rows may differ in length.
      steps: J.

    Returns:
      f32 (J, B, V), not soft-capped.

    Raises:
      ConfigError: no drafter. PromptError: a row of fewer than two ids, an id out of range, or steps below 1.
    """
    if bundle.drafter is None:
        raise ConfigError("draft_logits: this bundle has no drafter")
    if steps < 1:
        raise PromptError(f"draft_logits: steps is {steps}; it must be at least 1")
    rows = _checked_rows(tokens, bundle.config.vocab_size)
    for index, row in enumerate(rows):
        if len(row) < 2:
            raise PromptError(f"row {index} has 1 token; drafting needs the newest token and at least one before it")
    length = _padded(max(map(len, rows)))
    # Padding goes in front, so that all rows have their newest token in the same column.
    padded = np.full((len(rows), length), bundle.config.pad_token_id, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        padded[index, length - len(row) :] = row
        segments[index, length - len(row) :] = 1
    graph, state = nnx.split((bundle.model, bundle.drafter))
    return _draft_logits(graph, steps, state, padded, segments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draft_logits(graph, steps, state, tokens, segments):
    model, drafter = nnx.merge(graph, state)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1, dtype=jnp.int32) - 1, 0)

    def own_tokens(y):
        return model.embedder.encode(jnp.argmax(drafter.logits(y), axis=-1).astype(jnp.int32), y.dtype)

    ys = draft_rollout(
        drafter,
        model.embed(tokens),
        model(tokens, positions=positions, segment_ids=segments),
        queries=jnp.asarray([tokens.shape[1] - 1], jnp.int32),
        steps=steps,
        positions=positions,
        segment_ids=segments,
        next_embedding=own_tokens,
    )
    return jnp.stack([drafter.logits(y)[:, 0] for y in ys])


def _padded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _media_ids(config: ModelConfig) -> tuple[int, ...]:
    """Ids that are looked up as padding, so they may lie outside of the table."""
    return config.image_token_id, config.audio_token_id, config.video_token_id


def _checked_rows(tokens: Sequence[Sequence[int]], vocab_size: int, also: Sequence[int] = ()) -> list[np.ndarray]:
    rows = [np.asarray(row) for row in tokens]
    if not rows:
        raise PromptError("no rows of tokens were given")
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise PromptError(f"row {index} has shape {row.shape}; a row of at least one token id is needed")
        if not np.issubdtype(row.dtype, np.integer):
            raise PromptError(f"row {index} holds {row.dtype} values; token ids are whole numbers")
        wrong = (row < 0) | (row >= vocab_size) & ~np.isin(row, list(also))
        if wrong.any():
            raise PromptError(f"row {index} has token id {row[wrong][0]}; the vocabulary has {vocab_size} entries")
    return rows
