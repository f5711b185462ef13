"""Encoder-free image input, and the placing of media rows over their placeholder tokens.

Axis letters: B batch, T positions, P patches, A audio frames, X = 6912 numbers of a patch, E embedder width, D model
width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemma4_jax.config import ModelConfig
from gemma4_jax.model.audio import AudioEmbedder
from gemma4_jax.model.layers import LayerNorm, Linear, rms_normalize

PADDING_POSITION = -1


class MediaInputs(NamedTuple):
    """The media of a batch, in fixed shapes: row b's soft tokens take row b's entries in order of position.

    patches: (B, P, X) f32 in [0, 1], of images and video frames together in the order in which their soft tokens stand
      in the row; padding (zeros) after the real ones. None: no row has an image or a video.
    patch_positions: (B, P, 2) int32, (x, y) inside the image; (-1, -1) marks padding.
    audio_frames: (B, A, S) f32, in the order of the soft tokens; padding after the real ones. None: no sound.

    A packed row holds the media of all its examples one after the other. P and A are bucketed
    (``gemma4_jax.media.bucket``) so that few shapes are compiled.
    """

    patches: jax.Array | None = None
    patch_positions: jax.Array | None = None
    audio_frames: jax.Array | None = None


class VisionEmbedder(nnx.Module):
    """Pixels straight into the decoder: ``LN -> Dense -> LN -> + x and y position -> LN -> RMSNorm -> Linear``.

    Attributes: patch_ln1 (X), patch_dense (E, X) with bias, patch_ln2 (E), pos_embedding (N, 2, E), pos_norm (E),
    embedding_projection (D, E). Source: spec, encoder-free inputs. Norms are f32 whatever the activation dtype, and so
    is the accumulation of the 6912-wide product (fp16 would overflow there).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision, dtype = config.vision, jnp.dtype(config.param_dtype)
        width, eps = vision.mm_embed_dim, vision.layer_norm_eps
        self.rms_eps = vision.rms_norm_eps
        self.dtype = jnp.dtype(config.dtype)
        self.patch_ln1 = LayerNorm(vision.patch_dim, eps, dtype=dtype)
        self.patch_dense = Linear(vision.patch_dim, width, bias=True, dtype=dtype, rngs=rngs)
        # A tile of one colour is zero after the first norm, so the second one sees the bias alone: with a bias of zeros it
        # would multiply that tile's gradients by eps**-0.5.
        self.patch_dense.bias[...] = _normal(rngs, (width,), dtype)
        self.patch_ln2 = LayerNorm(width, eps, dtype=dtype)
        self.pos_embedding = nnx.Param(_normal(rngs, (vision.mm_posemb_size, 2, width), dtype))
        self.pos_norm = LayerNorm(width, eps, dtype=dtype)
        self.embedding_projection = Linear(width, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, patches: jax.Array, positions: jax.Array) -> jax.Array:
        """patches (..., P, X) f32, positions (..., P, 2) int32 -> (..., P, D) in the activation dtype.

        Rows of padding patches (position -1) are finite and meaningless.
        """
        # The first norm takes pixels in f32: bf16 has only 128 steps between 0.5 and 1.
        x = self.patch_ln1(patches.astype(jnp.float32)).astype(self.dtype)
        x = self.patch_ln2(self.patch_dense(x))
        x = self.pos_norm(x + self._position_rows(positions).astype(x.dtype))
        return self.embedding_projection(rms_normalize(x, self.rms_eps))

    def _position_rows(self, positions: jax.Array) -> jax.Array:
        table = self.pos_embedding[...]
        rows = table[jnp.maximum(positions, 0), jnp.arange(2, dtype=jnp.int32)]  # (..., P, 2, E)
        return jnp.sum(jnp.where((positions != PADDING_POSITION)[..., None], rows, 0), axis=-2)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype) -> jax.Array:
    return (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def embed_media(
    vision: VisionEmbedder | None, audio: AudioEmbedder | None, media: MediaInputs
) -> tuple[jax.Array | None, jax.Array | None]:
    """Rows for the soft tokens of a batch: patches -> (B, P, D), frames -> (B, A, D); None where there are none."""
    patch_rows = None if media.patches is None else vision(media.patches, media.patch_positions)
    audio_rows = None if media.audio_frames is None else audio(media.audio_frames)
    return patch_rows, audio_rows


def place_rows(embeddings: jax.Array, is_soft: jax.Array, rows: jax.Array) -> jax.Array:
    """Replace the j-th marked position of each batch row by that batch row's j-th media row.

    Args:
      embeddings: (B, T, D).
      is_soft: (B, T) bool. More marked positions than rows repeat the last one: counts are checked where media enter
        (``gemma4_jax.media.check_counts``), since shapes under jit cannot tell.
      rows: (B, R, D).

    Returns:
      (B, T, D) in the dtype of ``embeddings``.
    """
    index = jnp.cumsum(is_soft, axis=1, dtype=jnp.int32) - 1
    index = jnp.clip(index, 0, rows.shape[1] - 1)
    taken = jnp.take_along_axis(rows, index[:, :, None], axis=1)
    return jnp.where(is_soft[:, :, None], taken.astype(embeddings.dtype), embeddings)


def soft_token_masks(config: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which positions take patches (image and video soft tokens) and which take sound: two bool arrays like tokens."""
    is_vision = (tokens == config.image_token_id) | (tokens == config.video_token_id)
    return is_vision, tokens == config.audio_token_id


def place_media(model, tokens: jax.Array, media: MediaInputs) -> jax.Array:
    """Decoder inputs of whole rows: scaled text embeddings with media rows, unscaled, in their placeholders.

    Chunked prefill calls this once for the row and slices the result. Placeholders are looked up as the pad token, so
    their ids may lie outside of a small vocabulary.

    Args:
      model: holds embedder, vision, audio and config.
      tokens: (B, T) int32.
      media: the batch's media.

    Returns:
      (B, T, D) in the activation dtype.
    """
    config = model.config
    is_vision, is_audio = soft_token_masks(config, tokens)
    text = jnp.where(is_vision | is_audio, jnp.int32(config.pad_token_id), tokens)
    x = model.embedder.encode(text, jnp.dtype(config.dtype))
    patch_rows, audio_rows = embed_media(model.vision, model.audio, media)
    if patch_rows is not None:
        x = place_rows(x, is_vision, patch_rows)
    if audio_rows is not None:
        x = place_rows(x, is_audio, audio_rows)
    return x
