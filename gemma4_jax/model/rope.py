"""Rotary position embedding: full on sliding layers, "proportional" on global ones (spec: one decoder layer).

Axis letters: B batch, T positions, N heads, H head width, R rotated angles (R <= H/2).
Dimension ``i`` turns with dimension ``i + H/2`` (halves, not interleaved pairs). In the proportional form only the first
R = fraction * H/2 angles are non-zero, on the frequencies of the *full* head width; the other dimensions pass through
bit for bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import FULL, ModelConfig
from gemma4_jax.model.apart import apart_if_traced


def inverse_frequencies(head_dim: int, theta: float, fraction: float = 1.0, scaling_factor: float = 1.0) -> np.ndarray:
    """The non-zero angles per position step: f32 (R,), R = int(fraction * head_dim / 2)."""
    rotated = int(fraction * head_dim // 2)
    exponents = np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / (np.float32(theta) ** exponents) / np.float32(scaling_factor)).astype(np.float32)


def rope_table(config: ModelConfig, kind: str, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a layer kind: positions (B, T) int32 -> two f32 (B, T, R)."""
    if kind == FULL:
        frequencies = inverse_frequencies(
            config.global_head_dim,
            config.global_rope_theta,
            config.partial_rotary_factor,
            config.global_rope_scaling_factor,
        )
    else:
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta)

    def turns(positions):
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    # XLA:CPU fuses a cosine into whatever reads it, and so computes it anew for every head of every layer.
    return apart_if_traced(turns, positions)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x (B, T, N, H) by rope = (cos, sin), each (B, T, R); in x's dtype."""
    cos, sin = (t[:, :, None, :].astype(x.dtype) for t in rope)
    rotated, half = cos.shape[-1], x.shape[-1] // 2
    if rotated == half:  # nothing is joined, so that XLA:CPU makes one loop of it, and what reads it joins in
        halves = x.reshape(*x.shape[:-1], 2, half)
        signed = sin[..., None, :] * jnp.asarray([[-1], [1]], x.dtype)
        return (halves * cos[..., None, :] + jnp.flip(halves, axis=-2) * signed).reshape(x.shape)
    first, second = x[..., :rotated], x[..., half : half + rotated]
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    return jnp.concatenate([turned_first, x[..., rotated:half], turned_second, x[..., half + rotated :]], axis=-1)
