"""Cached, chunked, batched and padded decoding against a network that recomputes everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import prompts_of, small_bundle, uncached_greedy, uncached_logits

from gemma4_jax.config import FULL
from gemma4_jax.model.cache import kind_layout
from gemma4_jax.sample import programs
from gemma4_jax.sample.prefill import chunk_sizes, cut_row, plan_chunks
from gemma4_jax.sample.sampler import Sampler

TOLERANCE = 1e-5


def last_logits(sampler, prompts):
    """Logits behind each prompt, after prefill into caches."""
    prefix = sampler.prefill([np.asarray(p, np.int32) for p in prompts])
    return np.asarray(sampler._model.logits(prefix.hidden))


def test_every_prompt_length_around_the_window():
    """Fault 6: one pass, all in one batch of uneven rows, against no cache. Window 8, lengths 1 to 25."""
    bundle = small_bundle()
    assert kind_layout(bundle.config, FULL).compact
    prompts = prompts_of(range(1, 26))
    got = last_logits(Sampler(bundle, max_length=64, draft_tokens=0), prompts)
    want = np.stack([uncached_logits(bundle.model, p)[-1] for p in prompts])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_every_chunk_size():
    """Pieces of 1 to 20 tokens, in one compiled size."""
    bundle = small_bundle()
    prompts = [np.asarray(p, np.int32) for p in prompts_of([25, 3, 9, 16])]
    want = np.stack([uncached_logits(bundle.model, p)[-1] for p in prompts])
    sampler = Sampler(bundle, max_length=64, draft_tokens=0)
    for largest in range(1, 21):
        pieces = [[min(largest, len(p) - i) for i in range(0, len(p), largest)] for p in prompts]
        chunks = [chunk._replace(size=32) for chunk in plan_chunks(pieces, largest)]
        prefix = sampler.prefill(prompts, chunks=chunks)
        np.testing.assert_allclose(bundle.model.logits(prefix.hidden), want, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7])
def test_compiled_chunk_sizes(chunk):
    """The same with programs of just that size."""
    bundle = small_bundle()
    prompts = prompts_of([25, 3, 9, 16])
    got = last_logits(Sampler(bundle, max_length=64, draft_tokens=0, chunk=chunk), prompts)
    want = np.stack([uncached_logits(bundle.model, p)[-1] for p in prompts])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_a_first_chunk_looks_at_nothing_but_itself():
    """Not at the caches, empty then: what they hold costs nothing. A later chunk does."""
    bundle = small_bundle()
    sampler = Sampler(bundle, max_length=64, draft_tokens=0)
    tokens = jnp.asarray(prompts_of([20, 32])[1])[None]
    for start, finite in ((0, True), (1, False)):
        empty = sampler.empty(1)
        dirty = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (empty.caches, empty.hidden))
        prefix = empty._replace(caches=dirty[0], hidden=dirty[1], lengths=jnp.full((1,), start, jnp.int32))
        prefix = programs.text_chunk(*sampler._target, prefix, jnp.full((1,), 32, jnp.int32), tokens)
        assert np.isfinite(prefix.hidden).all() == finite, start


SIX = ("sliding_attention",) * 5 + ("full_attention",)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 6, "layer_types": SIX},
        {"attention_k_eq_v": False, "attention_scale": 0.5},
        {"value_norm": False, "num_global_key_value_heads": 2, "partial_rotary_factor": 1.0},
    ],
)
def test_greedy_equals_recomputing(changes):
    """Past the window, a batch of uneven rows."""
    bundle = small_bundle(**changes)
    prompts = prompts_of([5, 8, 13])
    out = Sampler(bundle, max_length=64, draft_tokens=0).generate(prompts, max_new_tokens=20, stop_ids=[])
    assert out.tokens == [uncached_greedy(bundle.model, p, 20) for p in prompts]
    assert out.finish_reasons == ["length"] * 3


def test_logits_while_decoding():
    """Every step's hidden row, through the rings' first and second turn, against no cache."""
    bundle = small_bundle()
    (prompt,) = prompts_of([6])
    sampler = Sampler(bundle, max_length=64, draft_tokens=0)
    answer = sampler.generate([prompt], max_new_tokens=30, stop_ids=[]).tokens[0]
    want = uncached_logits(bundle.model, prompt + answer)
    for cut in range(1, 30, 3):
        prefix = sampler.prefill([np.asarray(prompt + answer[:cut], np.int32)])
        got = np.asarray(bundle.model.logits(prefix.hidden))[0]
        np.testing.assert_allclose(got, want[len(prompt) + cut - 1], atol=TOLERANCE)


def test_rows_do_not_see_each_other():
    """A row's tokens depend on its prompt, settings and seed alone: other companions, another place, the same row."""
    bundle = small_bundle()
    prompts, others = prompts_of([4, 17, 9, 1]), prompts_of([21, 2, 5, 11], seed=1)
    sampler = Sampler(bundle, max_length=64, draft_tokens=2)
    controls = [(0.0, 0, 1.0, 5), (1.0, 0, 1.0, 6), (0.7, 10, 0.9, 7), (1.5, 0, 0.8, 8)]

    def run(prompts, controls):
        temperature, top_k, top_p, seed = (list(column) for column in zip(*controls, strict=True))
        return sampler.generate(
            prompts, max_new_tokens=12, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_ids=[]
        ).tokens

    together = run(prompts, controls)
    assert run(prompts[::-1], controls[::-1]) == together[::-1]
    for row in range(4):
        mixed = run([prompts[row], *others[1:]], [controls[row], *controls[1:]])
        assert mixed[0] == together[row]
    assert together[0] == uncached_greedy(bundle.model, prompts[0], 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_caches_are_near(dtype):
    bundle = small_bundle()
    prompts = prompts_of([20, 9])
    exact = last_logits(Sampler(bundle, max_length=64, draft_tokens=0, chunk=4), prompts)
    narrow = last_logits(Sampler(bundle, max_length=64, draft_tokens=0, chunk=4, cache_dtype=dtype), prompts)
    assert np.abs(narrow - exact).max() < 0.05 * np.ptp(exact)
    assert np.abs(narrow - exact).max() > 0  # it is in use


def test_bfloat16_network():
    """bf16 weights, activations and caches against the same network without a cache."""
    half = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    prompts = prompts_of([20, 9])
    sampler = Sampler(half, max_length=64, draft_tokens=0)
    assert len(sampler.generate(prompts[:1], max_new_tokens=8, stop_ids=[]).tokens[0]) == 8
    got = last_logits(sampler, prompts)
    want = np.stack([uncached_logits(half.model, p)[-1] for p in prompts])
    assert np.abs(got - want).max() < 0.05 * np.ptp(want)


def test_ordered_embedding_drafter():
    """A drafter with centroids drafts within its clusters and changes nothing."""
    values = {"drafter.use_ordered_embeddings": True, "drafter.num_centroids": 8,
              "drafter.centroid_intermediate_top_k": 3}  # fmt: skip
    bundle = small_bundle(**values)
    prompts = prompts_of([7])
    plain = Sampler(bundle, max_length=64, draft_tokens=0).generate(prompts, max_new_tokens=10, stop_ids=[])
    fast = Sampler(bundle, max_length=64, draft_tokens=2).generate(prompts, max_new_tokens=10, stop_ids=[])
    assert fast.tokens == plain.tokens


@given(
    length=st.integers(1, 300),
    largest=st.integers(1, 64),
    images=st.lists(st.tuples(st.integers(0, 250), st.integers(1, 90)), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_plans_cover_and_never_cut_a_run(length, largest, images):
    runs = np.full(length, -1)
    for number, (start, size) in enumerate(images):
        if np.all(runs[max(start - 1, 0) : start + size + 1] == -1):
            runs[start : start + size] = number
    pieces = cut_row(length, largest, runs)
    assert sum(pieces) == length
    assert min(pieces) > 0
    for edge in np.cumsum(pieces)[:-1]:
        assert runs[edge] == -1 or runs[edge] != runs[edge - 1]
    longest_run = max([int((runs == n).sum()) for n in range(4)])
    assert max(pieces) <= max(largest, longest_run)
    chunks = plan_chunks([pieces, cut_row(5, largest)], largest)
    assert sum(int(chunk.counts[0]) for chunk in chunks) == length
    assert all(chunk.counts.max() <= chunk.size for chunk in chunks)


def test_few_chunk_sizes():
    assert chunk_sizes(512) == (32, 64, 128, 256, 512)
    used = {chunk.size for n in range(1, 3000) for chunk in plan_chunks([cut_row(n, 512)], 512)}
    assert used <= set(chunk_sizes(512))


def test_image_runs_in_chunks():
    """Token types go through prefill: every chunk size gives the network's own bidirectional result."""
    bundle = small_bundle()
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, 60, (2, 30)).astype(np.int32)
    types = np.zeros((2, 30), np.int32)
    types[0, 4:16] = 1  # longer than the window
    types[0, 17:20] = 1
    types[1, 2:6] = 2
    lengths = np.asarray([30, 23], np.int32)
    segments = (np.arange(30)[None] < lengths[:, None]).astype(np.int32)
    forward = nnx.jit(lambda model, t, s, y: model(t, segment_ids=s, token_types=y))
    output = forward(bundle.model, tokens, segments, types)
    want = np.asarray(output.hidden)[np.arange(2), lengths - 1]

    class Batch:
        media = object()
        token_types = types

    Batch.tokens = tokens
    for chunk in (3, 13):
        sampler = Sampler(bundle, max_length=64, draft_tokens=0, chunk=chunk)
        sampler._embed = lambda prepared: bundle.model.embed(jnp.asarray(prepared.tokens))
        prefix = sampler.prefill([tokens[0], tokens[1, :23]], Batch)
        np.testing.assert_allclose(np.asarray(prefix.hidden), want, atol=TOLERANCE)
