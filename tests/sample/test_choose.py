"""Filters against sorting, and the distribution of what is emitted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_bundle, uncached_logits

from gemma4_jax.sample.choose import Controls, Mode, choose, filter_scores, first_largest
from gemma4_jax.sample.sampler import Sampler

VOCAB = 16
CHI_SQUARE_LIMIT = 5.0  # standard deviations of the statistic; a wrong distribution gives tens to thousands


def controls(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0):
    def full(value, dtype):
        return jnp.full((rows,), value, dtype)

    return Controls(full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32),
                    full(min_p, jnp.float32), full(penalty, jnp.float32), full(0, jnp.uint32))  # fmt: skip


def filtered_by_sorting(scores, top_k, top_p, min_p):
    """Probabilities after the three filters, for distinct scores."""
    kept = np.ones(len(scores), bool)
    order = np.argsort(-scores)
    if top_k:
        kept[order[top_k:]] = False
    p = np.where(kept, np.exp(scores - scores.max()), 0.0).astype(np.float64)
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        kept[order[before >= top_p]] = False
    kept &= p >= min_p * p.max()
    p = np.where(kept, p, 0.0)
    return p / p.sum()


@given(
    seed=st.integers(0, 2**31), size=st.integers(2, 40), top_k=st.integers(0, 45), top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_filters_equal_sorting(seed, size, top_k, top_p, min_p):
    scores = np.full(40, -np.inf, np.float32)
    scores[:size] = np.random.default_rng(seed).normal(0, 3, size)
    p = filtered_by_sorting(scores.astype(np.float64), min(top_k, 40), top_p, min_p)
    borders = np.cumsum(np.sort(p)[::-1])
    got = np.asarray(_filter(jnp.asarray(scores)[None, None], controls(1, 1.0, top_k, top_p, min_p)))[0, 0]
    # A border within rounding of top_p may fall on either side.
    if np.min(np.abs(borders - top_p)) > 1e-4 or top_p == 1:
        assert (np.isfinite(got) == (p > 0)).sum() >= 39
    assert np.isfinite(got[scores.argmax()])


_filter = jax.jit(filter_scores)


def test_filters_by_hand():
    scores = jnp.log(jnp.asarray([[[0.4, 0.3, 0.2, 0.1]]], jnp.float32))

    def kept(**options):
        return np.isfinite(np.asarray(_filter(scores, controls(1, **options)))[0, 0]).tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.65) == [True, True, False, False]
    assert kept(top_p=0.75) == [True, True, True, False]
    assert kept(top_p=1e-6) == [True, False, False, False]
    assert kept(min_p=0.4) == [True, True, True, False]
    assert kept(top_k=3, top_p=0.75) == [True, True, False, False]  # 0.4 and 0.3 of the 0.9 that top-k left
    assert kept(top_k=100) == [True] * 4


def test_first_of_equals():
    scores = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, 0.0]], jnp.float32)
    assert first_largest(scores).tolist() == [1, 2]
    assert int(first_largest(jnp.full((1, 4), jnp.nan, jnp.float32))[0]) < 4


def test_repetition_penalty():
    """Seen tokens: positive logits divided, negative ones multiplied."""
    logits = jnp.asarray([[[2.0, 1.5, -1.0, -1.9]]], jnp.float32)
    seen = jnp.asarray([[[True, False, True, False]]])
    mode = Mode(penalized=True)
    assert int(choose(logits, controls(1, 0.0, penalty=1.3), mode, None, seen)[0, 0]) == 0
    assert int(choose(logits, controls(1, 0.0, penalty=1.4), mode, None, seen)[0, 0]) == 1
    low = jnp.asarray([[[-5.0, -9.0, -1.0, -1.9]]], jnp.float32)
    assert int(choose(low, controls(1, 0.0, penalty=1.95), mode, None, seen)[0, 0]) == 3


@pytest.fixture(scope="module")
def bundle():
    return small_bundle(vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("draft", "options"),
    [
        (2, dict(temperature=1.0)),
        (2, dict(temperature=2.5, top_k=9, top_p=0.9)),
    ],
)
def test_emitted_distribution(bundle, draft, options):
    """Chi-square of 20 000 pairs of neighbouring tokens of one prompt against the target's own probabilities. The
    drafter is random, so it is wrong most of the time."""
    prompt, draws, rows = [3, 5, 7, 4], 20_000, 2000
    sampler = Sampler(bundle, max_length=10, draft_tokens=draft)
    got = np.zeros((VOCAB, VOCAB), np.int64)
    accepted = 0
    first = int(uncached_logits(bundle.model, prompt)[-1].argmax())
    whole = [*prompt, first]
    for batch in range(draws // rows):
        out = sampler.generate([whole] * rows, max_new_tokens=3, seed=batch * rows, stop_ids=[], **options)
        pairs = np.asarray(out.tokens)
        np.add.at(got, (pairs[:, 0], pairs[:, 1]), 1)
        accepted += out.stats.accepted
    assert (accepted > 0) == (draft > 0)

    def probabilities(tokens):
        scores = uncached_logits(bundle.model, tokens)[-1].astype(np.float64) / options["temperature"]
        return filtered_by_sorting(scores, options.get("top_k", 0), options.get("top_p", 1.0), 0.0)

    second = probabilities(whole)
    expected = draws * np.stack([second[i] * probabilities([*whole, i]) for i in range(VOCAB)])
    assert got[expected == 0].sum() == 0
    rare = (expected < 5) & (expected > 0)
    cells = [(got[~rare & (expected > 0)], expected[~rare & (expected > 0)])]
    observed = np.append(cells[0][0], got[rare].sum())
    wanted = np.append(cells[0][1], max(expected[rare].sum(), 1e-9))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    statistic, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert freedom > 10
    assert (statistic - freedom) / np.sqrt(2 * freedom) < CHI_SQUARE_LIMIT


def test_equal_seeds_and_different_seeds(bundle):
    sampler = Sampler(bundle, max_length=32, draft_tokens=0)
    options = dict(max_new_tokens=20, temperature=1.0, stop_ids=[])
    one = sampler.generate([[3, 4]] * 2, seed=7, **options).tokens
    assert one == sampler.generate([[3, 4]] * 2, seed=7, **options).tokens
    assert one[0] != one[1]
    assert sampler.generate([[3, 4]] * 2, seed=[8, 7], **options).tokens == one[::-1]
    assert dataclasses.asdict(Mode()) == dict(sampled=False, filtered=False, penalized=False)
