"""Log-likelihoods of token rows, in batches of few compiled shapes.

Axis letters: B batch, T positions, D model width, V vocabulary, C chunks of t positions each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma4_jax.errors import PromptError

SHORTEST = 32  # rows are padded to a power of two from here on, so that few lengths are compiled


class Scored(NamedTuple):
    """The scored tokens of one row. log_probabilities: f32 (n,), nats; greedy: bool (n,), the token is the most probable
    one (the lowest id among equals)."""

    log_probabilities: np.ndarray
    greedy: np.ndarray


class Scorer:
    """Scores rows with a bundle's target: the log-softmax of ``g4.logits``, without holding all logits.

    Args:
      bundle: has config and model.
      batch_size: rows of a forward pass.
      token_chunk: positions whose logits are held at once, over all rows.
    """

    def __init__(self, bundle, *, batch_size: int = 8, token_chunk: int = 1024):
        self.config, self.batch_size, self.token_chunk = bundle.config, batch_size, token_chunk
        self._graph, self._state = nnx.split(bundle.model)

    def score(self, rows: Sequence[Sequence[int]], first: Sequence[int]) -> list[Scored]:
        """Log-probabilities of the ends of rows, each token given all before it.

        Args:
          rows: token ids, used as they are (no bos is added).
          first: for each row the index of its first scored token, at least 1; all later ones are scored too.

        Raises:
          PromptError: a row with nothing to score, an id out of range, or a row beyond max_position_embeddings.
        """
        rows = [np.asarray(row, np.int32) for row in rows]
        for index, (row, start) in enumerate(zip(rows, first, strict=True)):
            self._check(index, row, start)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        found: list[Scored | None] = [None] * len(rows)
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            logs, greedy = self._batch([rows[index] for index in chosen])
            for place, index in enumerate(chosen):
                part = slice(first[index] - 1, len(rows[index]) - 1)
                found[index] = Scored(logs[place, part], greedy[place, part])
        return found

    def _check(self, index: int, row: np.ndarray, first: int) -> None:
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        if not 1 <= first < len(row):
            raise PromptError(f"row {index} has {len(row)} tokens; its first scored token must be in 1…{len(row) - 1}")
        if len(row) - 1 > limit:  # the last token is scored, not read
            raise PromptError(f"row {index} has {len(row)} tokens; max_position_embeddings is {limit}")
        if row.min() < 0 or row.max() >= vocab:
            raise PromptError(f"row {index} has token ids {row.min()}…{row.max()}; the vocabulary has {vocab} entries")

    def _batch(self, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tokens, segments = padded_rows([row[:-1] for row in rows], self.batch_size, self.config.pad_token_id)
        targets = np.zeros_like(tokens)
        for place, row in enumerate(rows):
            targets[place, : len(row) - 1] = row[1:]
        chunk = max(1, min(tokens.shape[1], self.token_chunk // self.batch_size))
        return jax.device_get(_score(self._graph, chunk, self._state, tokens, segments, targets))


def padded_rows(rows: Sequence[np.ndarray], count: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and segments (0: padding) of ``count`` rows, right-padded to a common power of two."""
    length = SHORTEST
    while length < max(map(len, rows)):
        length *= 2
    tokens, segments = np.full((count, length), pad, np.int32), np.zeros((count, length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], segments[place, : len(row)] = row, 1
    return tokens, segments


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graph, chunk, state, tokens, segments, targets):
    """f32 log-probabilities and bool greedy hits (B, T) of the targets behind each token."""
    model = nnx.merge(graph, state)
    hidden = model(tokens, segment_ids=segments).hidden

    def part(piece):
        h, target = piece
        logits = model.logits(h)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target

    found = jax.lax.map(part, (_cut(hidden, chunk), _cut(targets, chunk)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, : targets.shape[1]], found)


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """(B, T, …) -> (C, B, t, …), zero-padded behind T."""
    batch, length = x.shape[:2]
    chunks = -(-length // chunk)
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)
