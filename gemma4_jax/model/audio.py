"""Encoder-free sound input: one frame of raw 16 kHz samples is one soft token.

Axis letters: B batch, A audio frames, S samples in a frame, D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.layers import Linear, rms_normalize


class AudioEmbedder(nnx.Module):
    """``RMSNorm(no weight) -> Linear`` (spec: encoder-free inputs). embedding_projection.weight (D, S)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.eps = config.audio.rms_norm_eps
        self.dtype = jnp.dtype(config.dtype)
        self.embedding_projection = Linear(
            config.audio.audio_embed_dim, config.hidden_size, dtype=jnp.dtype(config.param_dtype), rngs=rngs
        )

    def __call__(self, frames: jax.Array) -> jax.Array:
        """frames (..., S) f32 samples in [-1, 1] -> (..., D) in the activation dtype; a frame of zeros stays finite."""
        normed = rms_normalize(frames.astype(jnp.float32), self.eps)
        return self.embedding_projection(normed.astype(self.dtype))
