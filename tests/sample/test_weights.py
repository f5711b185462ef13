"""Maps laid out for reading: their form by size and dtype, and what they give, against f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import prompts_of, small_bundle

import gemma4_jax as g4
from gemma4_jax.model.layers import Embedder, Linear
from gemma4_jax.sample import weights as reading


def map_of(dtype, outputs=96, width=64, seed=0):
    rng = np.random.default_rng(seed)
    source = Linear(width, outputs, dtype=dtype, rngs=nnx.Rngs(0))
    source.weight = nnx.Param(jnp.asarray(rng.standard_normal((outputs, width)), dtype))
    return source


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("small", [True, False])
def test_products_of_every_form(small, dtype, activations, rows):
    """Operands count as they are stored, weights rounded to the activations' dtype, sums are f32; the result has x's dtype."""
    source = map_of(dtype)
    read = reading.ReadLinear(source, small=96 * 64 if small else 96 * 64 - 1)
    assert (read.turned, read.widened) == (small, small and dtype == "bfloat16")
    assert read.weight[...].dtype == ("float32" if small else dtype)
    assert read.weight[...].shape == ((64, 96) if small else (96, 64))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, rows, 64)), activations)
    found = jax.jit(read)(x)
    assert found.dtype == activations
    assert found.shape == (1, rows, 96)
    weight = np.asarray(source.weight[...].astype(activations), np.float64)
    expected = np.asarray(x, np.float64) @ weight.T
    tolerance = 2e-6 if activations == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


def test_a_drafter_is_turned_up_to_a_bound_of_its_own(monkeypatch):
    """Its matrices are read several times a round: larger ones than the target's are worth a form of their own."""
    monkeypatch.setattr(reading, "OFTEN", 1 << 11)  # 64 outputs of 32 inputs
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    read = reading.ReadDrafter(bundle.drafter)
    maps = [node for _, node in nnx.iter_modules(read) if isinstance(node, reading.ReadLinear)]
    assert {node.widened for node in maps} == {True, False}
    assert all(node.turned == (node.weight[...].size <= 1 << 11) for node in maps)


@pytest.mark.parametrize("small", [True, False])
def test_a_bf16_table_is_read_alike_in_either_form(monkeypatch, small):
    """Rows are the table's own numbers scaled, logits f32 of exact products."""
    monkeypatch.setattr(reading, "SMALL", 1 << 19 if small else 0)
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    source = bundle.model.embedder
    assert type(source) is Embedder
    read = reading.ReadEmbedder(source)
    assert read.widened is small
    tokens = jnp.asarray([[3, 9, 0]], jnp.int32)
    np.testing.assert_array_equal(read.encode(tokens, jnp.bfloat16), source.encode(tokens, jnp.bfloat16))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, source.table[...].shape[1])), jnp.bfloat16)
    expected = np.asarray(hidden, np.float64) @ np.asarray(source.table[...], np.float64).T
    found = read.decode(hidden)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_widening_stays_far_within_bf16(monkeypatch):
    """bf16 numbers are exact in f32: sums differ in their order alone, and what that adds up to over all layers is small."""
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    prompt = [np.asarray(prompts_of([9])[0], np.int32)]
    hidden = []
    for size in (1 << 19, 0):
        monkeypatch.setattr(reading, "SMALL", size)
        sampler = g4.Sampler(bundle, max_length=32, draft_tokens=0)
        hidden.append(np.asarray(sampler.prefill(prompt).hidden, np.float32))
    np.testing.assert_allclose(*hidden, atol=0.03 * np.abs(hidden[1]).max())
