"""Layers that run in a loop over stacked packed weights, against the same layers one by one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import prompts_of, small_bundle

from gemma4_jax import quantize
from gemma4_jax.model import cache as kv
from gemma4_jax.model.decoder import layer_places
from gemma4_jax.sample import programs
from gemma4_jax.sample import sampler as sampling
from gemma4_jax.sample.sampler import Sampler

SLIDING, FULL = "sliding_attention", "full_attention"
GROUP = (SLIDING, SLIDING, FULL)


def packed_bundle(layer_types, scheme="int4", **changes):
    small = small_bundle(
        num_hidden_layers=len(layer_types), layer_types=layer_types, intermediate_size=64,
        max_position_embeddings=1024, **changes,
    )  # fmt: skip
    return quantize.quantize_model(small, scheme)


def both_ways(monkeypatch, bundle, **options):
    """A sampler whose layers run in a loop, and one whose layers do not."""
    looped = Sampler(bundle, **options)
    monkeypatch.setattr(sampling, "reads_blocks", lambda *_: False)
    return looped, Sampler(bundle, **options)


def layer_cache(config, caches, layer, batch):
    """What a stacked cache holds of one layer."""
    places = layer_places(config)
    path, index = places[layer]
    if not index:
        return caches[len(caches) - config.num_hidden_layers + layer]
    run = int(path.rpartition("/")[2])
    stack = caches[run]
    before = sum(other == path for other, _ in places[:layer])
    return jax.tree.map(lambda x: x[before * batch : (before + 1) * batch], stack)


@pytest.mark.parametrize("form", ["blocked", "columns"])
@pytest.mark.parametrize(("layer_types", "cache_dtype"), [(GROUP * 2 + (SLIDING,), "float32"), (GROUP * 2, "int8")])
def test_a_loop_does_what_its_layers_do(monkeypatch, layer_types, cache_dtype, form):
    """Uneven rows in chunks past the window, then rounds with drafts: hidden rows, every layer's cache, tokens."""
    bundle = packed_bundle(layer_types)
    looped, plain = both_ways(
        monkeypatch, bundle, max_length=64, draft_tokens=2, chunk=8, cache_dtype=cache_dtype, packed_product=form
    )
    assert looped._looped
    assert not plain._looped
    prompts = prompts_of([21, 3, 10])
    rows = [np.asarray(p, np.int32) for p in prompts]
    found, expected = looped.prefill(rows), plain.prefill(rows)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-5)
    assert len(found.caches) < len(expected.caches)
    for layer, (kind, want) in enumerate(zip(layer_types, expected.caches, strict=True)):
        got = layer_cache(bundle.config, found.caches, layer, len(rows))
        parts = kv.kind_layout(bundle.config, kind).key_parts
        numbers = [kv.read(cache.keys, parts, jnp.float32) for cache in (got, want)]
        # A number at the edge of two int8 steps may fall to either.
        np.testing.assert_allclose(*numbers, atol=1e-5 if cache_dtype == "float32" else 0.05)
    answers = [s.generate(prompts, max_new_tokens=16, stop_ids=[]) for s in (looped, plain)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].stats.accepted_per_step == answers[1].stats.accepted_per_step


def test_what_is_looped():
    """Only what reads its matrices block by block: of other products a slice of a stack would be a copy."""
    for scheme, form, looped in (
        ("int4", "integer", True), ("int4", "blocked", True), ("int4", "unpacked", False), ("int4", "columns", True),
        ("int8", "integer", False), ("int8", "blocked", True), ("int8", "columns", False),
    ):  # fmt: skip
        sampler = Sampler(packed_bundle(GROUP, scheme), max_length=32, draft_tokens=0, packed_product=form)
        assert sampler._looped is looped, (scheme, form)
    assert not Sampler(small_bundle(), max_length=32, draft_tokens=0)._looped


def lowered_programs(sampler, rows=2, steps=2):
    """Prefill of 32 tokens and rounds that draft."""
    prompts = [np.zeros(5, np.int32)] * rows
    wanted, mode = sampler._request(prompts, 4, (0.0, 0, 1.0, 0.0, 1.0), 0, [])
    prefix = sampler.empty(rows)
    numbers, tokens = jnp.full((rows,), 32, jnp.int32), jnp.zeros((rows, 32), jnp.int32)
    state = sampler.begin(sampler.empty(rows), wanted, mode)
    return (
        programs.text_chunk.lower(*sampler._target, prefix, numbers, tokens),
        programs.rounds.lower(
            *sampler._target, *sampler._drafter, state, wanted, jnp.int32(4), steps=steps, mode=mode, buffer=256
        ),
    ), prefix.caches


@pytest.mark.parametrize("form", ["blocked", "columns"])
def test_no_stack_is_copied(form):
    """Neither caches nor packed weights: a copy for each layer would cost as much as all layers."""
    bundle = packed_bundle(GROUP * 3, sliding_window=100)
    sampler = Sampler(bundle, max_length=700, draft_tokens=2, packed_product=form)
    lowered, caches = lowered_programs(sampler)
    stacks = jax.tree.leaves(caches) + [x for x in jax.tree.leaves(sampler._target[1]) if x.ndim == 4]
    shapes = {",".join(map(str, x.shape)) for x in stacks}
    assert len(shapes) > 8
    for one in lowered:
        text = one.compile().as_text()
        assert any(f"[{shape}]" in text for shape in shapes)
        assert not shapes & set(re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text))


def test_programs_do_not_grow_with_depth():
    sizes = []
    for groups in (2, 4):
        lowered, _ = lowered_programs(Sampler(packed_bundle(GROUP * groups), max_length=64, draft_tokens=2))
        sizes.append([one.as_text().count(" = ") for one in lowered])
    assert sizes[0] == sizes[1]


@given(
    layer=st.integers(0, 2), starts=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4)), ring=st.booleans(), chunked=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_writes_touch_one_layer(layer, starts, counts, ring, chunked):
    """A write into a stack is the write into that layer's own cache, and leaves the others as they were."""
    rng = np.random.default_rng(0)
    slots, batch = 14, 2
    stack = kv.Store(jnp.asarray(rng.standard_normal((3 * batch, 1, slots, 2)), jnp.float32), None)
    new = kv.Store(jnp.asarray(rng.standard_normal((batch, 1, 4, 2)), jnp.float32), None)
    first = jnp.int32(layer * batch)
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    found = _write_stacked(stack, new, starts, counts, first, ring, chunked)
    own = kv.Store(stack.data[layer * batch : (layer + 1) * batch], None)
    expected = np.array(stack.data)
    expected[layer * batch : (layer + 1) * batch] = _write_alone(own, new, starts, counts, ring, chunked).data
    np.testing.assert_array_equal(found.data, expected)


@jax.jit(static_argnames=("ring", "chunked"))
def _write_stacked(stack, new, starts, counts, first, ring, chunked):
    if not chunked:
        return kv.write_tokens(stack, new, starts, ring, first)
    if not ring:
        return kv.write_chunk(stack, new, starts, counts, ring, first)
    old = kv.layer_rows(stack, first, len(starts))
    return kv.put_rows(stack, kv.write_chunk(old, new, starts, counts, ring), first)


@jax.jit(static_argnames=("ring", "chunked"))
def _write_alone(store, new, starts, counts, ring, chunked):
    if chunked:
        return kv.write_chunk(store, new, starts, counts, ring)
    return kv.write_tokens(store, new, starts, ring)
