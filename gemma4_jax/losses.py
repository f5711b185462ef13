"""Next-token and multi-token loss (spec: mtp.md, training it), over vocabulary chunks.

Axis letters: B batch, T positions, Q drafter queries, D width, V vocabulary, J draft steps.

Every term is a sum over supervised tokens divided by a count that belongs to the whole optimiser step, so micro-batches and
devices with different numbers of supervised tokens weigh what they should: ``loss_denominators`` counts, the
``compute_losses`` of each micro-batch divides by the step's counts, and the parts simply add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_jax.chunked import ChunkSpec, chunked_argmax, chunked_cross_entropy, chunked_kl, chunked_log_probability
from gemma4_jax.config import unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.drafter import draft_rollout

LOSSES = ("next_token", "dpo")
PAIRINGS = {"inference": -1, "same_row": 0}  # which hidden row meets the newest token; the first is what sampling does


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Fields of ``config.loss``.

    name (``next_token``, with the multi-token term, or ``dpo`` on preference pairs, without it) and beta (of dpo: how much a
    reward weighs against staying near the reference).
    mtp_weight λ and mtp_steps K (0: no multi-token term), mtp_decay (step j weighs decay^j, normalised), mtp_distill
    (KL to the target's soft-capped distribution instead of hard labels), mtp_stop_gradient (train the drafter only),
    mtp_query_stride (rounds start at every n-th position), mtp_teacher_forcing (False: the drafter reads its own greedy
    tokens), mtp_pairing (``inference`` or the ablation ``same_row``), token_chunk and vocab_chunk (rows and entries of
    logits held at once), vocab_shards (devices over which the table's vocabulary axis is split).
    """

    name: str = "next_token"
    beta: float = 0.1
    mtp_weight: float = 1.0
    mtp_steps: int = 3
    mtp_decay: float = 0.8
    mtp_distill: bool = False
    mtp_stop_gradient: bool = False
    mtp_query_stride: int = 1
    mtp_teacher_forcing: bool = True
    mtp_pairing: str = "inference"
    token_chunk: int = 1024
    vocab_chunk: int = 32_768
    vocab_shards: int = 1

    def __post_init__(self):
        if self.name not in LOSSES:
            raise unknown_name("loss.name", self.name, LOSSES)
        if self.beta <= 0:
            raise ConfigError(f"loss.beta is {self.beta}; it must be positive")
        for name in ("mtp_query_stride", "token_chunk", "vocab_chunk", "vocab_shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}; it must be at least 1")
        if self.mtp_steps < 0 or self.mtp_weight < 0 or self.mtp_decay <= 0:
            raise ConfigError(
                f"loss.mtp_steps {self.mtp_steps}, mtp_weight {self.mtp_weight} must not be negative, "
                f"mtp_decay {self.mtp_decay} must be positive"
            )
        if self.mtp_pairing not in PAIRINGS:
            raise ConfigError(f"loss.mtp_pairing is {self.mtp_pairing!r}; choices: {', '.join(PAIRINGS)}")

    @property
    def chunks(self) -> ChunkSpec:
        """How logits are cut."""
        return ChunkSpec(self.token_chunk, self.vocab_chunk, self.vocab_shards)

    @property
    def uses_drafter(self) -> bool:
        """Whether there is a multi-token term."""
        return self.name == "next_token" and self.mtp_steps > 0 and self.mtp_weight > 0

    def step_weights(self) -> list[float]:
        """Normalised weight of each draft step."""
        raw = [self.mtp_decay**j for j in range(1, self.mtp_steps + 1)]
        return [w / sum(raw) for w in raw]


def next_token_weights(loss_mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Weight of each position's prediction: that of the token after it, 0 at each example's end.

    Args:
      loss_mask: (B, T), weight of token i as a target.
      segment_ids: (B, T) int32, 0 padding.

    Returns:
      f32 (B, T).
    """
    return shifted_weights(loss_mask, segment_ids, 1)


def shifted_weights(loss_mask: jax.Array, segment_ids: jax.Array, shift: int) -> jax.Array:
    """f32 (B, T): weight at i of the token ``shift`` places later, 0 where that leaves i's example or the row."""
    later_mask, later_segment = _shift(loss_mask, shift), _shift(segment_ids, shift)
    return jnp.where((later_segment == segment_ids) & (segment_ids != 0), later_mask.astype(jnp.float32), 0.0)


def next_tokens(tokens: jax.Array) -> jax.Array:
    """What each position predicts, int32 (B, T); 0 at the end of a row."""
    return _shift(tokens, 1)


def _shift(x, shift):
    return jnp.pad(x[:, shift:], ((0, 0), (0, min(shift, x.shape[1]))))


def _queries(length: int, config: LossConfig) -> jax.Array:
    """Row indices that start a drafter round: from 1 on, since index 0 has no keys."""
    return jnp.arange(1, length, config.mtp_query_stride, dtype=jnp.int32)


def _draft_targets(batch, config: LossConfig, step: int) -> tuple[jax.Array, jax.Array]:
    """Targets and weights (B, Q) of draft step ``step`` (from 1) at every query."""
    ahead = step + (PAIRINGS[config.mtp_pairing] + 1)
    queries = _queries(batch["tokens"].shape[1], config)
    segments = batch["segment_ids"]
    weights = shifted_weights(batch["loss_mask"], segments, ahead)[:, queries]
    has_keys = segments[:, queries] == segments[:, queries - 1]  # the first token of an example has none
    return _shift(batch["tokens"], ahead)[:, queries], jnp.where(has_keys, weights, 0.0)


def loss_denominators(batch: Mapping[str, jax.Array], config: LossConfig) -> dict[str, jax.Array]:
    """Supervised tokens of each loss term, f32 scalars: ``next_token``, ``mtp_1`` … ``mtp_K``. They add over micro-batches."""
    counts = {"next_token": next_token_weights(batch["loss_mask"], batch["segment_ids"]).sum()}
    if config.uses_drafter:
        for j in range(1, config.mtp_steps + 1):
            counts[f"mtp_{j}"] = _draft_targets(batch, config, j)[1].sum()
    return counts


def compute_losses(
    model, drafter, batch: Mapping[str, Any], config: LossConfig, denominators: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One micro-batch's share of the step's loss ``CE + λ Σ_j w_j CE_j``.

    Args:
      model, drafter: Gemma4 and Drafter (None when the config has no multi-token term).
      batch: tokens, loss_mask, segment_ids, positions (B, T), optionally token_types and media.
      denominators: supervised tokens of the whole step, see ``loss_denominators``; a zero count gives loss 0.

    Returns:
      f32 scalar; and the summed (not divided) loss of each term under the keys of ``denominators``.
    """
    output = forward(model, batch)
    drafts = _roll(model, drafter, batch, output, config) if config.uses_drafter else None
    sums = _loss_sums(model, drafter, batch, output, drafts, config)
    scales = {"next_token": 1.0}
    for j, weight in enumerate(config.step_weights(), start=1):
        scales[f"mtp_{j}"] = config.mtp_weight * weight
    loss = sum(scales[k] * sums[k] / jnp.maximum(denominators[k], 1.0) for k in sums)
    return loss, sums


def evaluation_sums(model, drafter, batch: Mapping[str, Any], config: LossConfig) -> dict[str, jax.Array]:
    """The summed loss of each term and, with a drafter, the counts of ``draft_agreement``, from one pass over the rows."""
    output = forward(model, batch)
    if not config.uses_drafter:
        return _loss_sums(model, drafter, batch, output, None, config)
    drafts = _roll(model, drafter, batch, output, config)
    sums = _loss_sums(model, drafter, batch, output, drafts, config)
    # However a drafter was trained, agreement is measured as it is used and with the true tokens, so that numbers compare.
    measured = dataclasses.replace(config, mtp_teacher_forcing=True, mtp_pairing="inference")
    if measured != config:
        drafts = _roll(model, drafter, batch, output, measured)
    return sums | _agreement(model, drafter, batch, output, drafts, measured)


def forward(model, batch: Mapping[str, Any]):
    """The target's pass over a batch's rows: a ``DecoderOutput``."""
    return model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        token_types=batch.get("token_types"),
        media=batch.get("media"),
    )


def _loss_sums(model, drafter, batch, output, drafts, config: LossConfig) -> dict[str, jax.Array]:
    """Summed loss of each term; ``drafts`` is what ``_roll`` gave, or None without a multi-token term."""
    weights = next_token_weights(batch["loss_mask"], batch["segment_ids"])
    cap = model.config.final_logit_softcapping
    table = model.embedder.table[...]
    sums = {
        "next_token": chunked_cross_entropy(
            output.hidden, table, next_tokens(batch["tokens"]), weights, softcap=cap, spec=config.chunks
        )
    }
    return sums if drafts is None else sums | _multi_token_sums(model, drafter, batch, output, drafts, config)


def _multi_token_sums(model, drafter, batch, output, drafts, config: LossConfig) -> dict[str, jax.Array]:
    """Summed loss of each draft step."""
    queries, ys = drafts
    sums = {}
    for j, y in enumerate(ys, start=1):
        targets, weights = _draft_targets(batch, config, j)
        if config.mtp_distill:
            row = _same_target_rows(queries, j, output, config)
            sums[f"mtp_{j}"] = chunked_kl(
                y,
                drafter.embedder.table[...],
                output.hidden[:, row],
                model.embedder.table[...],
                weights,
                teacher_softcap=model.config.final_logit_softcapping,
                spec=config.chunks,
            )
        else:
            sums[f"mtp_{j}"] = chunked_cross_entropy(
                y, drafter.embedder.table[...], targets, weights, softcap=None, spec=config.chunks
            )
    return sums


def _same_target_rows(queries, step: int, output, config: LossConfig) -> jax.Array:
    """The target's rows that predict what draft step ``step`` does; its last row stands in where weights are 0 anyway."""
    return jnp.minimum(queries + step + PAIRINGS[config.mtp_pairing], output.hidden.shape[1] - 1)


def _roll(model, drafter, batch, output, config: LossConfig):
    embeddings = model.embed(batch["tokens"], batch.get("media"))
    if config.mtp_stop_gradient:
        embeddings, output = jax.lax.stop_gradient((embeddings, output))
    queries = _queries(batch["tokens"].shape[1], config)

    def own_tokens(y):
        tokens = chunked_argmax(y, drafter.embedder.table[...], spec=config.chunks)
        own = model.embedder.encode(tokens, embeddings.dtype)
        return jax.lax.stop_gradient(own) if config.mtp_stop_gradient else own

    ys = draft_rollout(
        drafter,
        embeddings,
        output,
        queries=queries,
        steps=config.mtp_steps,
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        hidden_offset=PAIRINGS[config.mtp_pairing],
        next_embedding=None if config.mtp_teacher_forcing else own_tokens,
    )
    return queries, ys


def draft_agreement(model, drafter, batch: Mapping[str, Any], config: LossConfig) -> dict[str, jax.Array]:
    """Teacher-forced acceptance counts: where the drafter's argmax equals its target's (f32 scalars, to be summed).

    Returns:
      ``agree_j`` and ``count_j`` for each draft step j: agreeing and supervised positions; ``probability_1``: the summed
      probability that the target gives to the first drafted token (what sampling at temperature 1 would accept).
    """
    output = forward(model, batch)
    drafts = _roll(model, drafter, batch, output, config)
    return _agreement(model, drafter, batch, output, drafts, config)


def _agreement(model, drafter, batch, output, drafts, config: LossConfig) -> dict[str, jax.Array]:
    queries, ys = drafts
    table, cap = model.embedder.table[...], model.config.final_logit_softcapping
    choice = chunked_argmax(output.hidden, table, spec=config.chunks)
    counts = {}
    for j, y in enumerate(ys, start=1):
        _, weights = _draft_targets(batch, config, j)
        valid = weights > 0
        row = _same_target_rows(queries, j, output, config)
        drafted = chunked_argmax(y, drafter.embedder.table[...], spec=config.chunks)
        counts[f"agree_{j}"] = jnp.sum(valid & (drafted == choice[:, row]), dtype=jnp.float32)
        counts[f"count_{j}"] = jnp.sum(valid, dtype=jnp.float32)
        if j == 1:
            picked = chunked_log_probability(output.hidden[:, row], table, drafted, softcap=cap, spec=config.chunks)
            counts["probability_1"] = jnp.sum(jnp.where(valid, jnp.exp(picked), 0.0))
    return counts
