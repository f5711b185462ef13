"""Building blocks against numpy, and the rounding of the embedding scale (fault 19)."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peers
import pytest
from flax import nnx

from gemma4_jax.model.layers import (
    Embedder,
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    embedding_scale,
    rms_normalize,
    soft_cap,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_linear_is_stored_out_by_in():
    layer = Linear(5, 3, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(normal(3))
    x = normal(2, 5)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.weight[...]).T + np.asarray(layer.bias[...]), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_computed_in_f32(dtype):
    x = (1000 * normal(4, 64)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    wide = x.astype(np.float64)
    norm = RMSNorm(64, 1e-6, dtype=jnp.float32)
    norm.weight[...] = jnp.asarray(normal(64))
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    tolerance = 1e-5 if dtype == "float32" else 2**-7
    found = norm(jnp.asarray(x))
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), expected * np.asarray(norm.weight[...]), rtol=tolerance)
    np.testing.assert_allclose(np.asarray(rms_normalize(jnp.asarray(x), 1e-6), np.float32), expected, rtol=tolerance)
    layer = LayerNorm(64, 1e-5, dtype=jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x)), np.float32), expected, rtol=tolerance, atol=1e-5)


def test_norm_weight_is_not_one_plus_weight():
    norm = RMSNorm(8, 1e-6, dtype=jnp.float32)
    norm.weight[...] = jnp.zeros(8)
    assert not np.any(norm(normal(2, 8)))


def test_feed_forward_is_gated_tanh_gelu():
    layer = FeedForward(6, 10, dtype=jnp.float32, rngs=nnx.Rngs(1))
    x = normal(3, 6).astype(np.float64)
    gate, up, down = (np.asarray(getattr(layer, f"{n}_proj").weight[...], np.float64) for n in ("gate", "up", "down"))
    g = x @ gate.T
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), (gelu * (x @ up.T)) @ down.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 62.0), ("float32", 61.967734)])
def test_embedding_scale_is_rounded_to_the_dtype_of_the_table(dtype, scale):
    """Fault 19: 3840 has no exact root; the output side takes the same table unscaled."""
    embedder = Embedder(4, 3840, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    embedder.table[...] = jnp.ones((4, 3840), dtype)
    rows = np.asarray(embedder.encode(jnp.asarray([[2]], jnp.int32), jnp.dtype(dtype)), np.float32)
    assert (rows == np.float32(scale)).all()
    assert float(embedding_scale(embedder.table[...])) == np.float32(scale)
    peer = peers.transformers.models.gemma4_unified.modeling_gemma4_unified.Gemma4UnifiedTextScaledWordEmbedding(
        4, 3840, 0, embed_scale=3840**0.5
    ).to(getattr(peers.torch, dtype))
    with peers.torch.no_grad():
        peer.weight.fill_(1.0)
        assert float(peer(peers.torch.tensor([2]))[0, 0]) == np.float32(scale)
    logits = embedder.decode(jnp.full((1, 3840), 0.5, dtype))
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(logits), np.full((1, 4), 1920.0, np.float32))


def test_soft_cap_values():
    """Fault 18."""
    found = soft_cap(jnp.asarray([124.0, 30.0, 1.0, -124.0]), 30.0)
    np.testing.assert_allclose(found, [29.98458, 22.84783, 0.99963, -29.98458], rtol=1e-5)
    np.testing.assert_array_equal(soft_cap(jnp.asarray([124.0]), None), [124.0])
