"""Random prompts, windows, cache dtypes, chunk sizes, draft lengths and patterns of acceptance."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import prompts_of, script, script_weights, small_bundle, uncached_greedy, uncached_logits

from gemma4_jax.sample.prefill import plan_chunks
from gemma4_jax.sample.sampler import Sampler

pytestmark = pytest.mark.usefixtures("short_query_blocks")

ROWS, NEW = 3, 18
LENGTHS = st.lists(st.integers(1, 24), min_size=ROWS, max_size=ROWS)
CASES = [(1, 2, "float32"), (3, 5, "int8"), (5, 1, "bfloat16")]  # window, draft length, cache


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    """A bundle with this window, and samplers without and with drafts, over the same cache."""
    window, draft, cache = request.param
    bundle = small_bundle(sliding_window=window)
    options = dict(max_length=48, cache_dtype=cache, chunk=8)
    return bundle, Sampler(bundle, draft_tokens=0, **options), Sampler(bundle, draft_tokens=draft, **options)


@given(lengths=LENGTHS, seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.2, 0.6, 1.0]))
@settings(max_examples=12, deadline=None)
def test_drafts_change_no_token(case, lengths, seed, share):
    """Any window, cache dtype and prompt length, and drafts that are right with any frequency, row by row."""
    _, plain, fast = case
    prompts = prompts_of(lengths, seed=seed)
    answers = plain.generate(prompts, max_new_tokens=NEW, stop_ids=[]).tokens
    wrong = np.random.default_rng(seed).random((ROWS, 96)) < share
    weights = script_weights(prompts, answers, wrong_at=wrong)
    if fast._drafter[0] is script:
        fast._drafter = script, weights  # the same program with other numbers
    else:
        fast.replace_drafter(script, weights)
    out = fast.generate(prompts, max_new_tokens=NEW, stop_ids=[])
    assert out.tokens == answers
    if share == 0.0:
        steps = fast.draft_tokens
        assert out.stats.rounds == ROWS * -(-(NEW - 1) // (steps + 1))
    if share == 1.0:
        assert out.stats.accepted == 0


def test_plain_tokens_are_those_of_recomputing(case):
    """What the property above compares with, against no cache at all (int8 is near, not equal)."""
    bundle, plain, _ = case
    prompts = prompts_of([2, 7, 20], seed=4)
    got = plain.generate(prompts, max_new_tokens=8, stop_ids=[]).tokens
    want = [uncached_greedy(bundle.model, p, 8) for p in prompts]
    if plain.cache_dtype == "float32":
        assert got == want
    else:
        assert [row[0] for row in got] == [row[0] for row in want]


@given(data=st.data(), lengths=LENGTHS)
@settings(max_examples=12, deadline=None)
def test_any_pieces_give_the_same_logits(data, lengths):
    """Every row cut anywhere, into pieces of its own, whatever the window."""
    window = data.draw(st.sampled_from([1, 3, 8]), label="window")
    bundle = small_bundle(sliding_window=window)
    prompts = [np.asarray(p, np.int32) for p in prompts_of(lengths, seed=window)]
    pieces = []
    for prompt in prompts:
        cuts = data.draw(st.sets(st.integers(1, 23), max_size=4), label="cuts")
        edges = [0, *sorted(c for c in cuts if c < len(prompt)), len(prompt)]
        pieces.append(np.diff(edges).tolist())
    chunks = [chunk._replace(size=24) for chunk in plan_chunks(pieces, 24)]
    sampler = Sampler(bundle, max_length=48, draft_tokens=0)
    hidden = sampler.prefill(prompts, chunks=chunks).hidden
    want = np.stack([uncached_logits(bundle.model, p.tolist())[-1] for p in prompts])
    np.testing.assert_allclose(bundle.model.logits(jnp.asarray(hidden)), want, atol=1e-5)
