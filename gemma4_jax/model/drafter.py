"""The multi-token drafter: a small query-only decoder on its target's keys and values (spec: mtp.md).

Axis letters: B batch, Q drafter queries (each the newest token of some prefix), S target keys, D target width,
h drafter width, V vocabulary, N drafter heads, K target key/value heads, H head width, J draft steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.chunked import cut_positions, uncut_positions
from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.attention import QueryAttention, Rope, masked_attention
from gemma4_jax.model.decoder import Block, DecoderOutput
from gemma4_jax.model.layers import Embedder, Linear, RMSNorm
from gemma4_jax.model.masks import drafter_masks
from gemma4_jax.model.rope import rope_table

QUERY_RUN = 256  # drafter queries whose scores are held at once while training


class TokenOrdering(nnx.Variable):
    """Token ids grouped by centroid, (V,) int32; loaded from checkpoints, never trained."""


class Centroids(nnx.Variable):
    """Centroid weights (C, h) of the ordered embedding. The top-k choice passes no gradient, so it is not a Param."""


class Drafter(nnx.Module):
    """Attributes: embedder (its own table, used only as output head), pre_projection, post_projection, layers, final_norm.

    Raises:
      ConfigError: the configuration has no drafter.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.drafter is None:
            raise ConfigError("drafter is None in this configuration: there is nothing to build")
        self.config = config
        dr, dtype = config.drafter, jnp.dtype(config.param_dtype)
        width = dr.hidden_size
        self.embedder = Embedder(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.pre_projection = Linear(2 * config.hidden_size, width, dtype=dtype, rngs=rngs)
        self.post_projection = Linear(width, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                Block(
                    width,
                    dr.intermediate_size,
                    config.rms_norm_eps,
                    QueryAttention(config, kind, rngs=rngs),
                    dtype=dtype,
                    rngs=rngs,
                )
                for kind in dr.layer_types
            ]
        )
        self.final_norm = RMSNorm(width, config.rms_norm_eps, dtype=dtype)
        if dr.use_ordered_embeddings:
            draw = jax.random.normal(rngs.params(), (dr.num_centroids, width), jnp.float32)
            self.centroids = Centroids((draw * width**-0.5).astype(dtype))
            self.token_ordering = TokenOrdering(jnp.arange(config.vocab_size, dtype=jnp.int32))

    def project_embedding(self, embedding: jax.Array) -> jax.Array:
        """The embedding half of ``pre_projection``: scaled target embeddings (B, Q, D) -> (B, Q, h)."""
        return self.pre_projection.product(embedding, slice(None, self.config.hidden_size))

    def project_hidden(self, hidden: jax.Array) -> jax.Array:
        """The other half: hidden rows of the target or of the step before (B, Q, D) -> (B, Q, h)."""
        return self.pre_projection.product(hidden, slice(self.config.hidden_size, None))

    def step(
        self, projected_embedding: jax.Array, hidden: jax.Array, ropes: dict[str, Rope], attend: Callable[..., Any]
    ) -> tuple[jax.Array, jax.Array]:
        """One draft step.

        Args:
          projected_embedding: (B, Q, h), ``project_embedding`` of the newest tokens.
          hidden: (B, Q, D): the target's final hidden row of the token before, or the last step's second result.
          ropes: layer kind -> (cos, sin) at the newest tokens' positions; constant within a round.
          attend: ``attend(attention_module, q) -> (o, aux)`` over the target's keys of the module's kind.

        Returns:
          y (B, Q, h), normed, for ``logits``; and the projected state (B, Q, D) that the next step takes as hidden.
        """
        x = projected_embedding + self.project_hidden(hidden)
        for block in self.layers:
            x, _ = block(x, ropes[block.kind], attend)
        y = self.final_norm(x)
        return y, self.post_projection(y)

    def logits(self, y: jax.Array) -> jax.Array:
        """f32 logits (..., V) of y (..., h), not soft-capped; with ordered embeddings only chosen clusters are exact."""
        dense = self.embedder.decode(y)
        if not self.config.drafter.use_ordered_embeddings:
            return dense
        selected = self.selected_tokens(y)
        below = jnp.min(jnp.where(selected, dense, jnp.inf), axis=-1, keepdims=True) - 1.0
        return jnp.where(selected, dense, below)

    def selected_tokens(self, y: jax.Array) -> jax.Array:
        """Tokens in the top clusters of each row: y (..., h) -> bool (..., V)."""
        dr = self.config.drafter
        scores = jnp.einsum("...h,ch->...c", y, self.centroids[...].astype(y.dtype))
        _, top = jax.lax.top_k(scores, dr.centroid_intermediate_top_k)
        chosen = jnp.any(jax.nn.one_hot(top, dr.num_centroids, dtype=jnp.bool_), axis=-2)
        per_cluster = self.config.vocab_size // dr.num_centroids
        cluster_of_slot = jnp.arange(self.config.vocab_size, dtype=jnp.int32) // per_cluster
        cluster_of_token = jnp.zeros_like(cluster_of_slot).at[self.token_ordering[...]].set(cluster_of_slot)
        return jnp.take(chosen, cluster_of_token, axis=-1)


def cross_attend(kv: dict[str, tuple[jax.Array, jax.Array]], masks: dict[str, jax.Array], scale: float):
    """An ``attend`` for drafter layers over whole keys/values (B, S, K, H) under masks bool (B or 1, Q, S)."""

    def attend(attention, q):
        k, v = kv[attention.kind]
        function = masked_attention if attention.config.remat == "none" else _attend_in_runs
        return function(q, k, v, masks[attention.kind], scale), None

    return attend


def _attend_in_runs(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """``masked_attention`` over runs of queries in a loop that makes their scores again in the backward pass.

    Else the scores of every draft step and layer, each Q x S, wait for it together.
    """
    count = q.shape[1]
    runs = -(-count // QUERY_RUN)

    @jax.checkpoint
    def one(rows):
        return masked_attention(rows[0], k, v, rows[1], scale)

    if runs == 1:
        return one((q, mask))
    return uncut_positions(jax.lax.map(one, (cut_positions(q, runs), cut_positions(mask, runs))), count)


def draft_rollout(
    drafter: Drafter,
    embeddings: jax.Array,
    output: DecoderOutput,
    *,
    queries: jax.Array,
    steps: int,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    hidden_offset: int = -1,
    next_embedding: Callable[[jax.Array], jax.Array] | None = None,
) -> list[jax.Array]:
    """All draft steps of many rounds at once, teacher-forced: one round starts at every query (mtp.md: training it).

    The round at row index t takes (E[x_t], h_{t-1}) with keys before t and predicts x_{t+1}; its step j takes
    (E[x_{t+j-1}], the last projected state) with the same keys and position, and predicts x_{t+j}.

    Args:
      embeddings: (B, T, D), the target's scaled input embeddings.
      output: the target's pass over the same rows.
      queries: (Q,) int32 row indices t >= 1.
      steps: J >= 1.
      positions: (B, T) int32 positions of the rows.
      segment_ids: (B, T) int32 or None.
      hidden_offset: which hidden row starts a round; -1 is what inference does, 0 the pairing of an ablation.
      next_embedding: y (B, Q, h) -> scaled embeddings (B, Q, D) of the drafter's own tokens, instead of teacher forcing.

    Returns:
      J arrays y (B, Q, h).
    """
    config, length = drafter.config, embeddings.shape[1]
    position = jnp.broadcast_to(positions, embeddings.shape[:2])[:, queries]
    masks = drafter_masks(config, queries, length, segment_ids)
    ropes = {kind: rope_table(config, kind, position) for kind in masks}
    attend = cross_attend(output.kv, masks, config.attention_scale)
    projected = drafter.project_embedding(embeddings) if next_embedding is None else None
    hidden, ys, newest = output.hidden[:, queries + hidden_offset], [], None
    for j in range(steps):
        if next_embedding is None:
            newest = projected[:, jnp.minimum(queries + j, length - 1)]
        elif j == 0:
            newest = drafter.project_embedding(embeddings[:, queries])
        else:
            newest = drafter.project_embedding(next_embedding(ys[-1]))
        y, hidden = drafter.step(newest, hidden, ropes, attend)
        ys.append(y)
    return ys
