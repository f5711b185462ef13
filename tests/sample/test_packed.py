"""Sampling with packed weights: every form of the product, and whole generations, against the unpacked model."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import prompts_of, small_bundle

import gemma4_jax as g4
from gemma4_jax import quantize
from gemma4_jax.errors import ConfigError
from gemma4_jax.packed import pack, unpack
from gemma4_jax.sample import packed as reads
from gemma4_jax.sample import programs
from gemma4_jax.sample.packed_kernel import packed_product
from gemma4_jax.sample.sampler import Sampler
from gemma4_jax.sample.weights import ReadTarget


def product_case(scheme, rows, outputs=200, width=192, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
    values, scale = pack(jnp.asarray(rng.standard_normal((outputs, width)), jnp.float32), scheme)
    expected = np.asarray(x, np.float64) @ np.asarray(unpack(values, scale), np.float64).T
    return x, values, scale, expected


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 5])
def test_blocked_products(scheme, rows, monkeypatch):
    """200 outputs in blocks of 80: the last one begins early."""
    monkeypatch.setattr(reads, "BLOCK_NUMBERS", 80 * 192)
    x, values, scale, expected = product_case(scheme, rows)
    for form in ("integer", "blocked", "unpacked"):
        found = jax.jit(reads.read_packed, static_argnums=3)(x[None], values, scale, form)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", [192, 15360])
def test_integer_products_are_close(width):
    """An input is rounded at 2^-23 of the row's largest: beside an outlier of 1000 times the rest, and all at their largest."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, width)).astype(np.float32)
    x[1, 7] = 1000
    x[2] = np.abs(x).max()
    values = rng.integers(-127, 128, (64, width), dtype=np.int8)
    values[0] = 127
    scale = jnp.asarray(np.full((64, 1), 2**-7), jnp.float16)
    expected = x.astype(np.float64) @ values.T.astype(np.float64) * 2**-7
    sizes = np.abs(values.T).astype(np.float64) * 2**-7
    bound = np.abs(x).max(axis=1, keepdims=True) * sizes.sum(axis=0) * 2**-23 + np.abs(x) @ sizes * 2**-22
    found = jax.jit(reads.read_packed, static_argnums=3)(jnp.asarray(x), jnp.asarray(values), scale, "integer")
    assert np.all(np.abs(found - expected) <= bound)


def test_integer_products_do_not_depend_on_their_neighbours():
    """Bit for bit: a draft is verified with the very numbers of plain decoding."""
    x, values, scale, _ = product_case("int8", reads.INTEGER_ROWS)
    run = jax.jit(reads.read_packed, static_argnums=3)
    together = run(x, values, scale, "integer")
    for row in range(len(x)):
        np.testing.assert_array_equal(run(x[row : row + 1], values, scale, "integer")[0], together[row])


def test_integer_products_of_nothing_and_of_no_number():
    x, values, scale, _ = product_case("int8", 4)
    x = x.at[1].set(0).at[2, 3].set(jnp.nan).at[3].set(1e-42)
    found = reads.read_packed(x, values, scale, "integer")
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[1], 0)
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[3], 0, atol=1e-38)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 70])
def test_the_kernel_interpreted(scheme, rows):
    """Outputs that fill no tile, rows of input beyond one tile, several steps along a row."""
    x, values, scale, expected = product_case(scheme, rows, outputs=100, width=768)
    np.testing.assert_allclose(packed_product(x, values, scale), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("platform", "backend"), [("cuda", "triton"), ("tpu", "mosaic_tpu")])
def test_the_kernel_lowers_for_accelerators(scheme, platform, backend):
    x, values, scale, _ = product_case(scheme, 16, outputs=128, width=1024)
    run = jax.jit(lambda *args: packed_product(*args, backend=backend))
    assert run.trace(x.astype(jnp.bfloat16), values, scale).lower(lowering_platforms=(platform,)).as_text()


def test_no_weights_are_unpacked_whole():
    """The compiled program of a large product holds no buffer of the matrix's size in f32."""
    run = jax.jit(reads.read_packed, static_argnums=3)
    for scheme, form in (("int4", "blocked"), ("int8", "blocked"), ("int8", "integer")):
        x, values, scale, _ = product_case(scheme, 1, outputs=4096, width=1024)
        sizes = {
            name: run.lower(x, values, scale, name).compile().memory_analysis().temp_size_in_bytes
            for name in (form, "unpacked")
        }
        assert sizes["unpacked"] >= 4 * 4096 * 1024
        assert sizes[form] < sizes["unpacked"] / (64 if form == "integer" else 4)


def test_prefill_holds_one_layer_at_a_time(monkeypatch):
    """Each further layer adds no more than a fraction of what its widest product gives."""
    monkeypatch.setattr(reads, "BLOCK_NUMBERS", 1 << 12)  # several blocks, as wide layers have
    rows, used = 64, {}
    for groups in (1, 3):
        kinds = ("sliding_attention", "sliding_attention", "full_attention") * groups
        small = small_bundle(num_hidden_layers=len(kinds), layer_types=kinds, intermediate_size=1024)
        sampler = Sampler(quantize.quantize_model(small, "int4"), max_length=rows, draft_tokens=0)
        prefix = sampler.prefill([np.zeros(rows, np.int32)])
        inputs = prefix, jnp.full((1,), rows, jnp.int32), jnp.zeros((1, rows), jnp.int32)
        memory = programs.text_chunk.lower(*sampler._target, *inputs).compile().memory_analysis()
        used[groups] = memory.temp_size_in_bytes
    assert used[3] - used[1] < 6 * 0.2 * (rows * 2 * 1024 * 4), used


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_generations_equal_those_of_the_unpacked_model(scheme):
    small = quantize.quantize_model(small_bundle(intermediate_size=64), scheme)
    plain = quantize.dequantize(small)
    prompts = prompts_of([9, 14])
    expected = g4.Sampler(plain, max_length=64, draft_tokens=0).generate(prompts, max_new_tokens=12, stop_ids=[])
    for steps in (0, 2):
        found = g4.Sampler(small, max_length=64, draft_tokens=steps).generate(prompts, max_new_tokens=12, stop_ids=[])
        assert found.tokens == expected.tokens
    assert found.stats.drafted > 0


def test_the_form_is_chosen_and_logged(caplog):
    small = quantize.quantize_model(small_bundle(intermediate_size=64), "int8")
    target = ReadTarget(small.model)
    with caplog.at_level(logging.INFO):
        form = reads.chosen_form(None)
        assert form == "integer"
        reads.set_form([target], form)
    assert "packed products in form 'integer' ('blocked' where" in caplog.text
    forms = {node.form for _, node in nnx.iter_modules(target) if isinstance(node, reads.ReadPacked)}
    assert forms == {"integer"}
    with pytest.raises(ConfigError, match="unknown packed_product 'fast'"):
        g4.Sampler(small, max_length=32, packed_product="fast")
    sampler = g4.Sampler(small, max_length=32, draft_tokens=0, packed_product="unpacked")
    assert sampler.packed_product == "unpacked"
    assert g4.Sampler(small_bundle(), max_length=32, draft_tokens=0).packed_product is None


def test_adapters_stay_beside_packed_weights():
    from gemma4_jax.bundle import add_lora, bundle_weights
    from gemma4_jax.config import LoraConfig
    from gemma4_jax.train.state import Network

    small = add_lora(quantize.quantize_model(small_bundle(intermediate_size=64), "int4"), LoraConfig(rank=2))
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, leaf.dtype) if name.endswith("lora/b") else leaf
        for name, leaf in bundle_weights(small).items()
    }
    model, drafter = Network(small.config).merge(weights)
    small = dataclasses.replace(small, model=model, drafter=drafter)
    prompt = prompts_of([9])
    expected = small.model.logits(small.model(jnp.asarray(prompt, jnp.int32)).hidden)[0, -1]
    sampler = g4.Sampler(small, max_length=32, draft_tokens=0)
    found = nnx.merge(*sampler._target).logits(sampler.prefill([np.asarray(prompt[0], np.int32)]).hidden)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(jnp.ptp(expected)))
