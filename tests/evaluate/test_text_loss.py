"""Likelihoods against the plain logits; sliding windows by their definition and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemma4_jax as g4
from gemma4_jax.errors import ConfigError, DataError, PromptError
from gemma4_jax.evaluate import Scorer, text_loss
from gemma4_jax.evaluate.text_loss import sliding_windows

TEXT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def scorer(bundle):
    return Scorer(bundle, batch_size=2, token_chunk=24)


def test_rows_of_any_length_equal_the_logits(bundle, scorer, log_probabilities):
    rows = [[2, 9, 8, 7], [2, *range(100, 140)], [5, 6]]
    scored = scorer.score(rows, [1, 30, 1])
    for row, first, found in zip(rows, [1, 30, 1], scored, strict=True):
        np.testing.assert_allclose(found.log_probabilities, log_probabilities(row)[first - 1 :], atol=1e-5)
        choice = np.asarray(g4.logits(bundle, [row])[0]).argmax(-1)[first - 1 : -1]
        np.testing.assert_array_equal(found.greedy, choice == row[first:])


def test_a_text_that_fits_is_one_plain_forward(bundle, scorer, log_probabilities):
    ids = bundle.tokenizer.encode(TEXT)
    loss = text_loss(scorer, bundle.tokenizer, [TEXT], window=len(ids), stride=4)
    assert loss.nats == pytest.approx(-log_probabilities(ids).sum(), abs=1e-4)
    assert (loss.tokens, loss.bytes) == (len(ids) - 1, len(TEXT))
    assert loss.bits_per_byte == pytest.approx(loss.nats / math.log(2) / len(TEXT))
    assert loss.perplexity == pytest.approx(math.exp(loss.nats / (len(ids) - 1)))


def test_a_long_text_is_scored_with_context(bundle, scorer, log_probabilities):
    """Every row recomputed by hand: bos, context, and only the new tokens counted."""
    ids = bundle.tokenizer.encode(TEXT)
    found = text_loss(scorer, bundle.tokenizer, [TEXT, "x"], window=9, stride=3)
    body, total, done = ids[1:], 0.0, 0
    while done < len(body):
        end = min(len(body), done + (8 if done == 0 else 3))
        row = [ids[0], *body[max(0, end - 8) : end]]
        total += log_probabilities(row)[-(end - done) :].sum()
        done = end
    total += log_probabilities(bundle.tokenizer.encode("x")).sum()
    assert found.nats == pytest.approx(-total, abs=1e-4)


@given(st.integers(1, 40), st.integers(2, 12), st.data())
def test_windows_score_each_token_once_with_the_promised_context(count, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids, seen = list(range(100, 100 + count)), []
    for row, first in sliding_windows(ids, 2, window, stride):
        assert row[0] == 2 and len(row) <= window
        start = row[1] - 100
        assert row[1:] == ids[start : start + len(row) - 1]
        assert start == 0 or first >= window - stride
        seen += row[first:]
    assert seen == ids


def test_refused(bundle, scorer):
    for window, stride in ((1, 1), (8, 8), (8, 0)):
        with pytest.raises(ConfigError, match=f"window {window} and stride {stride}"):
            sliding_windows([1, 2], 2, window, stride)
    with pytest.raises(DataError, match="no text"):
        text_loss(scorer, bundle.tokenizer, [], window=8, stride=4)
    with pytest.raises(PromptError, match="row 1 has 3 tokens; its first scored token must be in 1…2"):
        scorer.score([[2, 3], [2, 3, 4]], [1, 3])
    with pytest.raises(PromptError, match="the vocabulary has 512"):
        scorer.score([[2, 512]], [1])
