"""What sampling does otherwise on GPUs, run on the CPU: the same tokens, and the same numbers piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import prompts_of, small_bundle, small_config

import gemma4_jax as g4
from gemma4_jax import quantize
from gemma4_jax.config import FULL
from gemma4_jax.model import attention
from gemma4_jax.model import cache as kv
from gemma4_jax.packed import pack, unpack
from gemma4_jax.sample import packed as reads
from gemma4_jax.sample import programs, reduced, weights


def as_on_gpu(patch):
    """Take the GPU's branches, with blocks so short that small models have several."""
    patch.setattr(jax, "default_backend", lambda: "gpu")
    patch.setattr(weights, "_on_host", lambda leaf: False)
    patch.setattr(kv, "GPU_BLOCK", 24)
    patch.setattr(kv, "BLOCK", 16)
    patch.setattr(attention, "GPU_QUERY_BLOCK", 8)


def forget_programs():
    """Programs that were compiled for another backend are not taken over."""
    for program in (programs.empty, programs.text_chunk, programs.begin, programs.rounds):
        program.clear_cache()


@pytest.fixture
def no_programs():
    """None from before, and none left behind."""
    forget_programs()
    yield
    forget_programs()


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_the_same_tokens(scheme, no_programs):
    """Uneven rows of a batch and one row, drafts and none, rings that have wrapped, a cache of two blocks that overlap."""
    bundle = small_bundle(seed=41, intermediate_size=64)
    if scheme is not None:
        bundle = quantize.quantize_model(bundle, scheme)
    prompts = prompts_of([3, 20, 31])

    def answers():
        sampler = g4.Sampler(bundle, max_length=43, draft_tokens=3, chunk=16)
        plain = sampler.with_draft_tokens(0)
        sampled = plain.generate(prompts[1:], max_new_tokens=10, stop_ids=[], temperature=1.0, seed=7)
        runs = [
            s.generate(some, max_new_tokens=10, stop_ids=[])
            for s in (sampler, plain)
            for some in (prompts, prompts[2:])
        ]
        return sampler.packed_product, [sampled.tokens, *(run.tokens for run in runs)]

    form, expected = answers()
    assert form in (None, "integer")
    forget_programs()
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpu(patch)
        form, found = answers()
    assert form == (None if scheme is None else "reduced")
    assert found == expected


@given(
    rows=st.integers(1, 3), length=st.integers(1, 5), slots=st.integers(5, 11), layers=st.integers(1, 2), ring=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_scattered_writes_equal_writes_in_a_loop(rows, length, slots, layers, ring, seed):
    """In rings and global caches, alone and in a stack."""
    rng = np.random.default_rng(seed)
    starts = jnp.asarray(rng.integers(0, 40 if ring else slots - length + 1, rows), jnp.int32)
    first = (layers - 1) * rows

    def store(count, places):
        return kv.Store(jnp.asarray(rng.standard_normal((count, 2, places, 3)), jnp.float32), None)

    old, new = kv.LayerCache(store(layers * rows, slots), None), kv.LayerCache(store(rows, length), None)
    expected = kv.write_tokens(old, new, starts, ring, first)
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpu(patch)
        found = kv.write_tokens(old, new, starts, ring, first)
    np.testing.assert_array_equal(found.keys.data, expected.keys.data)


@pytest.mark.parametrize("slots", [24, 25, 47, 48, 60])
def test_blocks_that_do_not_divide_a_cache(slots):
    """The last one begins earlier: no key counts twice, and none beyond the row's length counts."""
    config = small_config()
    layout = kv.kind_layout(config, FULL)
    rng = np.random.default_rng(slots)
    width = sum(layout.key_parts)
    q = jnp.asarray(rng.standard_normal((2, layout.kv_heads, 4, width)), jnp.float32)
    store = kv.Store(jnp.asarray(rng.standard_normal((2, layout.kv_heads, slots, width)), jnp.float32), None)
    cache = kv.LayerCache(store, None if layout.compact else store)
    last = jnp.asarray([[slots - 2, slots - 1], [3, 4]], jnp.int32)
    mask = jnp.arange(slots, dtype=jnp.int32) <= last[:, :, None]
    expected = kv.attend_whole(layout, q, *kv.read_both(layout, cache, jnp.float32), mask)
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpu(patch)
        found = kv.attend_blocks(layout, q, cache, last)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_blocks_shrink_where_there_are_many_queries(monkeypatch):
    assert kv._block(1 << 15) == kv.BLOCK
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kv._block(16) == kv.GPU_BLOCK
    assert kv._block(1 << 15) == kv.GPU_SCORES >> 15 == 2048
    assert kv._block(1 << 30) == kv.BLOCK


@given(groups=st.integers(1, 9), outputs=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_products_of_one_row(groups, outputs, seed):
    """Plain weights, int8 with a scale for each row or group, int4: against f64."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((1, 32 * groups)), jnp.float32)
    plain = jnp.asarray(rng.standard_normal((outputs, 32 * groups)), jnp.float32)
    grouped = (
        rng.integers(-127, 128, plain.shape, dtype=np.int8),
        rng.standard_normal((outputs, groups)).astype(np.float16),
    )
    for packed in (pack(plain, "int8"), tuple(map(jnp.asarray, grouped)), pack(plain, "int4")):
        rows = np.asarray(unpack(*packed), np.float64)
        bound = 2e-6 * (np.abs(np.asarray(x, np.float64)) @ np.abs(rows).T) + 1e-6
        for found in (reduced.row_product(x, *packed), reads.read_packed(x, *packed, "reduced")):
            assert found.dtype == jnp.float32
            assert (np.abs(found - np.asarray(x, np.float64) @ rows.T) <= bound).all()
    np.testing.assert_allclose(reduced.row_product(x, plain), x @ plain.T, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 16, 65])
def test_products_of_more_rows(rows):
    """int8 is padded to the rows of a matrix unit, int4 goes through the kernel, or is unpacked for many."""
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, 64)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((72, 64)), jnp.float32)
    grouped = jnp.asarray(rng.integers(-127, 128, (72, 64)), jnp.int8), jnp.ones((72, 2), jnp.float16)
    for packed in (pack(weight, "int8"), grouped, pack(weight, "int4")):
        expected = np.asarray(x, np.float64) @ np.asarray(unpack(*packed), np.float64).T
        found = reads.read_packed(x, *packed, "reduced")
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_maps_of_one_input_become_one_matrix_and_are_freed(no_programs):
    """q, k and v, gate and up: with ``release`` what they were made of is gone."""
    bundle = quantize.quantize_model(small_bundle(seed=42, intermediate_size=64, scan_layers=False), "int8")
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpu(patch)
        target = weights.ReadTarget(bundle.model)
        reads.set_form([target], "reduced", release=True)
    config = bundle.config
    for block in target.blocks:
        assert len(block.mlp.gate_up_proj.values) == len(block.self_attn.qkv_proj.values) == 1
        assert block.mlp.gate_up_proj.values[0][...].shape == (2 * config.intermediate_size, config.hidden_size)
        assert not block.self_attn.o_proj.values[0][...].is_deleted()
    assert bundle.model.tail[0].mlp.gate_proj.values[...].is_deleted()
