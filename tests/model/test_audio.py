"""Audio embedder against transformers."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedTextConfig,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedMultimodalEmbedder

from gemma4_jax.config import get_preset
from gemma4_jax.media import prepare_audio
from gemma4_jax.model.audio import AudioEmbedder


def test_parity_with_silence_and_a_half_empty_frame():
    config = get_preset("tiny")
    peer = Gemma4UnifiedMultimodalEmbedder(Gemma4UnifiedAudioConfig(), Gemma4UnifiedTextConfig(hidden_size=64))
    module = AudioEmbedder(config, rngs=nnx.Rngs(0))
    module.embedding_projection.weight[...] = jnp.asarray(peer.embedding_projection.weight.detach().numpy())
    sound = np.concatenate([np.zeros(640), 0.01 * np.random.default_rng(0).standard_normal(1000)]).astype(np.float32)
    frames = prepare_audio(sound)
    with torch.no_grad():
        want = peer(torch.from_numpy(frames)).numpy()
    np.testing.assert_allclose(module(jnp.asarray(frames)), want, atol=1e-5)


def test_real_sizes():
    module = nnx.eval_shape(lambda: AudioEmbedder(get_preset("gemma4_12b"), rngs=nnx.Rngs(0)))
    assert module.embedding_projection.weight.shape == (3840, 640)
    out = nnx.eval_shape(lambda m, x: m(x), module, jnp.zeros((2, 750, 640)))
    assert (out.shape, out.dtype) == ((2, 750, 3840), jnp.bfloat16)
