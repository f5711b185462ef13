"""Direct preference optimisation (DPO): make chosen answers likelier than rejected ones, measured from a reference model.

With r(y) = beta * (log p(y) - log p_reference(y)), summed over the tokens of an answer y, a pair's loss is
``-log sigmoid(r(chosen) - r(rejected))``. Pairs come packed (``gemma4_jax.data.preference``): segments 1, 3, 5 … of a row are
chosen, each followed by its rejected one.

Axis letters: B rows, T positions, P pairs of a row (those that are not there weigh nothing).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.chunked import chunked_log_probability
from gemma4_jax.losses import LossConfig, forward, next_token_weights, next_tokens

REWARDS = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")


def preference_denominators(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """f32 scalars that add over micro-batches: ``next_token``, the tokens of all answers; ``preference``, the pairs."""
    return {
        "next_token": next_token_weights(batch["loss_mask"], batch["segment_ids"]).sum(),
        "preference": pair_mask(batch["segment_ids"]).sum(dtype=jnp.float32),
    }


def pair_mask(segment_ids: jax.Array) -> jax.Array:
    """Which pairs a row holds: int32 (B, T) -> bool (B, P)."""
    count = jnp.max(segment_ids, axis=1, keepdims=True) // 2
    return jnp.arange(segment_ids.shape[1] // 2, dtype=jnp.int32)[None] < count


def answer_scores(model, batch: Mapping[str, Any], config: LossConfig) -> jax.Array:
    """log p of both answers of every pair: f32 (B, P, 2), chosen first; differentiable."""
    segments = batch["segment_ids"]
    weights = next_token_weights(batch["loss_mask"], segments)
    logs = chunked_log_probability(
        forward(model, batch).hidden,
        model.embedder.table[...],
        next_tokens(batch["tokens"]),
        softcap=model.config.final_logit_softcapping,
        spec=config.chunks,
    )
    logs = jnp.where(weights > 0, weights * logs, 0.0)
    pairs = segments.shape[1] // 2
    add = jax.vmap(lambda values, ids: jax.ops.segment_sum(values, ids, 2 * pairs + 1))
    return add(logs, segments)[:, 1:].reshape(-1, pairs, 2)


def preference_losses(
    model, reference, batch: Mapping[str, Any], config: LossConfig, denominators: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One micro-batch's share of the step's loss.

    Args:
      model: Gemma4, the one that is trained.
      reference: Gemma4, where training began; no gradient reaches it.
      batch: tokens, loss_mask, segment_ids, positions (B, T).
      config: with ``beta``.
      denominators: of the whole step, see ``preference_denominators``.

    Returns:
      f32 scalar; and summed over pairs (not divided) ``preference`` and each of ``REWARDS``, over tokens ``next_token``.
    """
    scores = answer_scores(model, batch, config)
    rewards = config.beta * (scores - jax.lax.stop_gradient(answer_scores(reference, batch, config)))
    margin = rewards[..., 0] - rewards[..., 1]
    there = pair_mask(batch["segment_ids"])

    def total(values):
        return jnp.where(there, values, 0.0).sum()

    sums = {
        "next_token": -scores.sum(),
        "preference": total(-jax.nn.log_sigmoid(margin)),
        "reward_margin": total(margin),
        "reward_accuracy": total((margin > 0).astype(jnp.float32)),
        "reward_chosen": total(rewards[..., 0]),
        "reward_rejected": total(rewards[..., 1]),
    }
    return sums["preference"] / jnp.maximum(denominators["preference"], 1.0), sums


def preference_means(sums: Mapping[str, Any], denominators: Mapping[str, Any]) -> dict[str, Any]:
    """Means from the sums of ``preference_losses``: ``next_token_loss`` (of both answers), ``preference_loss``, ``REWARDS``."""
    tokens, pairs = (jnp.maximum(denominators[name], 1.0) for name in ("next_token", "preference"))
    return {
        "next_token_loss": sums["next_token"] / tokens,
        "preference_loss": sums["preference"] / pairs,
        **{name: sums[name] / pairs for name in REWARDS},
    }
