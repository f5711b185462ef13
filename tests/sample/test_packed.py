"""Sampling with packed weights: every form of the product, and whole generations, against the unpacked model."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import prompts_of, small_bundle

import gemma4_jax as g4
from gemma4_jax import quantize
from gemma4_jax.errors import ConfigError
from gemma4_jax.packed import pack, unpack
from gemma4_jax.sample import blocks, packed_columns, programs
from gemma4_jax.sample import packed as reads
from gemma4_jax.sample.packed_columns import by_columns
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
    for form in ("integer", "blocked", "unpacked") + (("columns",) if scheme == "int8" else ()):
        found = jax.jit(reads.read_packed, static_argnums=3)(x[None], values, scale, form)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], expected, atol=2e-5 * np.abs(expected).max())


@given(
    rows=st.integers(1, 14), groups=st.integers(1, 9), outputs=st.integers(1, 300), layers=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_products_by_columns(rows, groups, outputs, layers, seed):
    """Any matrix of a stack: one row, pairs and what is left, blocks (the last of 80 columns begins early), odd numbers of
    groups; weights of all sixteen values and scales of either sign."""
    rng = np.random.default_rng(seed)
    values = jnp.asarray(rng.integers(0, 256, (layers, 1, outputs, groups * 16)), jnp.uint8)
    scale = jnp.asarray(rng.standard_normal((layers, 1, outputs, groups)), jnp.float16)
    x = jnp.asarray(rng.standard_normal((rows, groups * 32)) * 10.0 ** rng.integers(-3, 4, (rows, 1)), jnp.float32)
    laid_out = by_columns(values, scale)
    assert [part.shape for part in laid_out] == [(layers, 1, groups * 16, outputs), (layers, 1, groups, outputs)]
    place = layers - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_columns, "COLUMNS", 80)
        patch.setattr(packed_columns, "PAIRED_ROWS", 5)
        found = jax.jit(lambda *args: reads.read_packed(*args[:3], "columns", args[3]))(x, *laid_out, jnp.int32(place))
    weights = np.asarray(unpack(values[place, 0], scale[place, 0]), np.float64)
    bound = (
        np.abs(np.asarray(x, np.float64)) @ np.abs(weights).T
        + 8 * np.abs(x).sum(1, keepdims=True) * np.abs(scale).max()
    )
    assert found.dtype == jnp.float32
    assert (np.abs(found - np.asarray(x, np.float64) @ weights.T) <= 2e-6 * bound).all()


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize(("scheme", "form"), [("int8", "integer"), ("int4", "blocked"), ("int4", "columns")])
def test_prompts_of_bf16_use_the_units_for_it(scheme, form, units, monkeypatch):
    """int8 exactly, int4 with weights rounded to bf16. A round's few rows stay in f32, so that one row and several agree."""
    monkeypatch.setattr(blocks, "has_bf16_units", lambda: units)
    monkeypatch.setattr(reads, "BLOCK_NUMBERS", 80 * 192)
    for rows, narrow in ((blocks.MANY + 1, units), (blocks.MANY, False)):
        x, values, scale, _ = product_case(scheme, rows)
        x = x.astype(jnp.bfloat16)
        weights = np.asarray(unpack(values, scale), np.float64)
        if form == "columns":
            values, scale = by_columns(values, scale)
        run = jax.jit(lambda *args: reads.read_packed(*args, form))
        dots = [line for line in run.lower(x, values, scale).as_text().splitlines() if "stablehlo.dot_general" in line]
        assert dots and all(("xbf16" in dot) == narrow for dot in dots)
        found = run(x, values, scale)
        assert found.dtype == jnp.float32
        rounding = 2**-9 if narrow and scheme == "int4" else 1e-6
        bound = rounding * np.abs(np.asarray(x, np.float64)) @ np.abs(weights).T
        assert (np.abs(found - np.asarray(x, np.float64) @ weights.T) <= bound).all()


def test_rows_by_columns_do_not_touch_each_other():
    """NaN and infinity in one row of a pair stay there; a row of zeros gives zeros."""
    x, values, scale, _ = product_case("int4", 6)
    x = x.at[1, 3].set(jnp.nan).at[2].set(0).at[4, 5].set(jnp.inf)
    found = reads.read_packed(x, *by_columns(values, scale), "columns")
    assert np.isfinite(found[jnp.array([0, 2, 3, 5])]).all()
    np.testing.assert_array_equal(found[2], 0)
    assert np.isnan(found[1]).all() and not np.isfinite(found[4]).any()


def test_layouts_are_transposed_whole():
    """More rows than are moved together, and not a multiple of them."""
    values = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3, 300, 48)), jnp.uint8)
    scale = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 300, 3)), jnp.float16)
    for found, source in zip(by_columns(values, scale), (values, scale), strict=True):
        np.testing.assert_array_equal(found, np.swapaxes(source, -1, -2))


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
    for scheme, form, rows, least in (
        ("int4", "blocked", 1, 4), ("int8", "blocked", 1, 4), ("int8", "integer", 1, 64),
        ("int4", "columns", 1, 16), ("int4", "columns", 5, 6), ("int4", "columns", 16, 6),
    ):  # fmt: skip
        x, values, scale, _ = product_case(scheme, rows, outputs=4096, width=1024)
        parts = {form: (values, scale), "unpacked": (values, scale)}
        if form == "columns":
            parts[form] = by_columns(values, scale)
        sizes = {
            name: run.lower(x, *packed, name).compile().memory_analysis().temp_size_in_bytes
            for name, packed in parts.items()
        }
        assert sizes["unpacked"] >= 4 * 4096 * 1024
        assert sizes[form] < sizes["unpacked"] / least, (form, rows, sizes)


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
    for form in (None, "columns"):
        for steps in (0, 2):
            sampler = g4.Sampler(small, max_length=64, draft_tokens=steps, packed_product=form)
            found = sampler.generate(prompts, max_new_tokens=12, stop_ids=[])
            assert found.tokens == expected.tokens
        assert found.stats.drafted > 0


def test_the_form_is_chosen_and_logged(caplog):
    small = quantize.quantize_model(small_bundle(intermediate_size=64), "int8")
    target = ReadTarget(small.model)
    with caplog.at_level(logging.INFO):
        form = reads.chosen_form(None, "int8")
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


def test_int4_is_laid_out_by_columns_when_it_may_be_released(caplog):
    # A seed that no other test has: the bundle is used up.
    small = quantize.quantize_model(small_bundle(seed=21, intermediate_size=64), "int4")
    tokens = jnp.asarray([[2, 7, 9]], jnp.int32)
    expected = small.model(tokens).hidden
    answers = []

    def answer(sampler):
        answers.append(sampler.generate([[2, 7, 9]], max_new_tokens=8, stop_ids=[]).tokens)
        return sampler.packed_product

    with caplog.at_level(logging.INFO):
        assert answer(g4.Sampler(small, max_length=32, draft_tokens=0)) == "integer"
        assert "release=True or packed_product='columns'" in caplog.text
        assert answer(g4.Sampler(small, max_length=32, draft_tokens=0, packed_product="columns")) == "columns"
        np.testing.assert_array_equal(small.model(tokens).hidden, expected)  # the bundle is as it was
        caplog.clear()
        assert answer(g4.Sampler(small, max_length=32, draft_tokens=0, release=True)) == "columns"
        assert "packed products in form 'columns' ('integer' for int8)" in caplog.text
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(RuntimeError, match="deleted"):
        small.model(tokens)
    whole_rows = quantize.quantize_model(small_bundle(seed=22), "int8")
    assert g4.Sampler(whole_rows, max_length=32, release=True).packed_product == "integer"


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
    structure, arrays = sampler._target
    found = structure.merge(arrays).logits(sampler.prefill([np.asarray(prompt[0], np.int32)]).hidden)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(jnp.ptp(expected)))
