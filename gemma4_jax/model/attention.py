"""Grouped-query attention with q/k/v norms; the caller decides what is attended to.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N/K, X = G*T, H head
width, D model width. The scale is 1.0 by default: queries and keys are normalised instead of divided by sqrt(H).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.layers import Linear, RMSNorm, rms_normalize
from gemma4_jax.model.masks import Band
from gemma4_jax.model.products import product
from gemma4_jax.model.rope import apply_rope

MASKED = -1e30  # finite: a row with no allowed key gives a uniform softmax, not NaN

QUERY_BLOCK = 128  # query rows at least that share one run of keys
GPU_QUERY_BLOCK = 512  # each run takes seconds to compile there, and masked products cost little
MOST_BLOCKS = 16

Rope = tuple[jax.Array, jax.Array]
Attend = Callable[..., tuple[jax.Array, Any]]


def query_blocks(length: int, band: Band) -> list[tuple[slice, slice]]:
    """Runs of query rows, and the keys that any of a run may see: slices of 0…length.

    One run where the band is open on both sides or the rows are few. Runs are at most ``MOST_BLOCKS``: each is code of its
    own.
    """
    least = GPU_QUERY_BLOCK if jax.default_backend() == "gpu" else QUERY_BLOCK
    size = max(least, -(-length // MOST_BLOCKS // least) * least)
    if band == Band():
        size = length
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if band.back is None else max(0, start - band.back)
        last = length if band.ahead is None else min(length, end + band.ahead)
        blocks.append((slice(start, end), slice(first, last)))
    return blocks


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, band: Band | None = None
) -> jax.Array:
    """Plain attention with an f32 softmax.

    Args:
      q: (B, T, N, H); k, v: (B, S, K, H); mask: bool (B or 1, T, S).
      band: of the mask, where queries and keys are the same rows (T = S): products and memory shrink to it. None: none.

    Returns:
      (B, T, N, H) in q's dtype. Rows without an allowed key are finite and meaningless.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    # Head-major throughout, the G query heads of one key head stacked along T: every product is then a plain batched
    # matrix product, and the T x S scores are never transposed.
    q = q.transpose(0, 2, 1, 3).reshape(b, kv_heads, n // kv_heads, t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if band is None:
        out = _attend_head_major(q, k, v, mask, scale)
    else:
        parts = [
            _attend_head_major(q[:, :, :, rows], k[:, :, keys], v[:, :, keys], mask[:, rows, keys], scale)
            for rows, keys in query_blocks(t, band)
        ]
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)


def _attend_head_major(q, k, v, mask, scale: float) -> jax.Array:
    """q (B, K, G, T, H), k and v (B, K, S, H) -> (B, K, G, T, H)."""
    b, kv_heads, group, t, h = q.shape
    scores = product("BKXH,BKSH->BKXS", q.reshape(b, kv_heads, -1, h), k)
    if scale != 1.0:
        scores = scores * scale
    scores = jnp.where(mask[:, None, None], scores.reshape(b, kv_heads, group, t, -1), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, kv_heads, group * t, -1)
    out = product("BKXS,BKSH->BKXH", weights, v)
    return out.reshape(q.shape).astype(q.dtype)


class Attention(nnx.Module):
    """Self-attention of one decoder layer.

    Global layers may have no value projection (``attention_k_eq_v``): then ``v = rms(k_proj x)``, taken before the key
    norm and RoPE, and k = rope(k_norm * v).
    """

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.param_dtype), config.hidden_size
        self.config, self.kind = config, kind
        n, kv, h = config.num_attention_heads, config.kv_heads(kind), config.head_width(kind)
        self.q_proj = Linear(width, n * h, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(width, kv * h, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(width, kv * h, dtype=dtype, rngs=rngs) if config.separate_values(kind) else None
        self.o_proj = Linear(n * h, width, dtype=dtype, rngs=rngs)
        # The scale is 1, so H**-0.25 on both sides starts the scores at unit variance.
        initial = h**-0.25 if config.attention_scale == 1.0 else 1.0
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype, initial=initial)
        self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype, initial=initial)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The projections alone: x (B, T, D) -> (B, T, N*H), (B, T, K*H) and (B, T, K*H)."""
        k = self.k_proj(x)
        return self.q_proj(x), k, k if self.v_proj is None else self.v_proj(x)

    def qkv(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B, T, D) -> q (B, T, N, H), k and v (B, T, K, H); q and k normalised and turned."""
        config, h = self.config, self.config.head_width(self.kind)
        heads = (*x.shape[:-1], -1, h)
        q, k, v = (y.reshape(heads) for y in self.project(x))
        if config.value_norm:
            v = rms_normalize(v, config.rms_norm_eps)
        return apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope), v

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """x (B, T, D) -> (B, T, D), aux. ``attend(self, q, k, v) -> (o (B, T, N, H), aux)``."""
        o, aux = attend(self, *self.qkv(x, rope))
        return self.o_proj(o.reshape(*x.shape[:-1], -1)), aux


class QueryAttention(nnx.Module):
    """Attention of one drafter layer: queries only, on keys and values of the target (mtp.md: sizes)."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.param_dtype), config.drafter.hidden_size
        self.config, self.kind = config, kind
        n, h = config.drafter.num_attention_heads, config.head_width(kind)
        self.q_proj = Linear(width, n * h, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(n * h, width, dtype=dtype, rngs=rngs)
        initial = h**-0.25 if config.attention_scale == 1.0 else 1.0
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype, initial=initial)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """x (B, Q, h) -> (B, Q, h), aux. ``attend(self, q) -> (o (B, Q, N, H), aux)``."""
        q = self.q_proj(x).reshape(*x.shape[:-1], -1, self.config.head_width(self.kind))
        o, aux = attend(self, apply_rope(self.q_norm(q), rope))
        return self.o_proj(o.reshape(*x.shape[:-1], -1)), aux
