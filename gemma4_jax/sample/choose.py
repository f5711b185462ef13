"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and a draw that drafts cannot bias.

Axis letters: B batch, T positions, V vocabulary.

A token at position m of a row is ``argmax(log p + g)`` with Gumbel noise ``g`` that only the row's seed and m decide:
an exact draw from p. The drafter proposes with the same noise, ``argmax(log q + g)``, and a proposal is accepted
exactly when it is the token that the target draws anyway. So speculative sampling emits, token by token, what plain
sampling emits for the same
seed, whatever the draft length, the drafter, or the rest of the batch: lossless by construction. At temperature 0 the
noise is off and both are argmax.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Controls(NamedTuple):
    """What each row asks for; all arrays (B,).

    temperature f32 (0: greedy), top_k int32 (0: off), top_p f32 (1: off), min_p f32 (0: off), repetition_penalty f32
    (1: off), seed uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array


@dataclasses.dataclass(frozen=True)
class Mode:
    """What any row asks for, so that nothing else is compiled in."""

    sampled: bool = False
    filtered: bool = False
    penalized: bool = False


def choose(logits: jax.Array, controls: Controls, mode: Mode, noise: jax.Array | None, seen: jax.Array | None):
    """The token of each position.

    Args:
      logits: f32 (B, T, V); -inf where a token must not be.
      noise: (B, T, V) from ``position_noise`` when ``mode.sampled``.
      seen: bool (B, T, V), tokens before each position, when ``mode.penalized``.

    Returns:
      int32 (B, T).
    """
    if mode.penalized:
        penalty = controls.repetition_penalty[:, None, None]
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if not mode.sampled:
        return first_largest(logits)
    temperature = controls.temperature[:, None, None]
    greedy = temperature <= 0.0
    scores = logits / jnp.where(greedy, 1.0, temperature)
    if mode.filtered:
        scores = filter_scores(scores, controls)
    return first_largest(jnp.where(greedy, logits, scores + noise))


def first_largest(scores: jax.Array) -> jax.Array:
    """Index of the largest entry of the last axis, the first of equals: int32."""
    # Two plain reductions; the combined (value, index) one of jnp.argmax does not vectorise on CPU.
    size = scores.shape[-1]
    largest = jnp.max(scores, axis=-1, keepdims=True)
    index = jnp.arange(size, dtype=jnp.int32)
    return jnp.minimum(jnp.min(jnp.where(scores == largest, index, size), axis=-1), size - 1).astype(jnp.int32)


def position_noise(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise of tokens to be drawn: seeds uint32 (B,), positions int32 (B, T) -> f32 (B, T, V)."""

    def one(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,), jnp.float32)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seeds, positions)


def filter_scores(scores: jax.Array, controls: Controls) -> jax.Array:
    """-inf for what top-k, then top-p, then min-p leave out; each works on what the one before left.

    Equal scores stay or go together. Thresholds are found by bisection on the bits of f32, exactly and without sorting.
    """
    top_k, top_p, min_p = (x[:, None, None] for x in (controls.top_k, controls.top_p, controls.min_p))
    order = _ordered_bits(scores)
    wanted = jnp.where(top_k <= 0, scores.shape[-1], jnp.minimum(top_k, scores.shape[-1]))
    count = _largest_threshold(lambda t: jnp.sum(order >= t, axis=-1, keepdims=True, dtype=jnp.int32) >= wanted, scores)
    scores = jnp.where(order >= count, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)

    def holds_mass(t):
        return jnp.sum(jnp.where(order >= t, weights, 0.0), axis=-1, keepdims=True) >= top_p * total

    scores = jnp.where((order >= _largest_threshold(holds_mass, scores)) | (top_p >= 1.0), scores, -jnp.inf)
    return jnp.where(weights >= min_p, scores, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that are ordered as the f32 are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = (bits >> 31).astype(jnp.bool_)
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(holds, scores: jax.Array) -> jax.Array:
    """The largest uint32 (B, T, 1) for which a monotone condition holds; 0 where it never does."""

    def step(i, found):
        bit = jnp.uint32(1 << 31) >> i.astype(jnp.uint32)
        return jnp.where(holds(found | bit), found | bit, found)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(32), step, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
