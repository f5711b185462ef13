"""Cutting and packing: every token in exactly one place, learnt exactly once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_jax.data.packing import cut_documents, empty_batch, pack, plan_rows
from gemma4_jax.data.token_store import TokenStore
from gemma4_jax.errors import DataError

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def store_of(lengths, learnt=None):
    """Documents whose every token is different."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint32)
    summary = {
        "source": "test",
        "documents": len(lengths),
        "bytes": 1,
        "empty_documents": 0,
        "tokens": int(offsets[-1]),
    }
    return TokenStore(Path("test"), tokens, offsets, learnt, summary)


def all_rows(plan):
    batch = empty_batch(len(plan), plan.seq_len)
    rows = np.arange(len(plan))
    plan.fill(rows, batch, rows)
    return batch


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(2, 17), st.data())
def test_every_token_is_learnt_exactly_once(lengths, seq_len, data):
    overlap = data.draw(st.integers(1, seq_len - 1))
    store = store_of(lengths)
    plan = plan_rows(store, seq_len, overlap, "split", seed=data.draw(st.integers(0, 3)))
    batch = all_rows(plan)
    firsts = set(store.tokens[store.offsets[:-1][np.diff(store.offsets) > 0]])
    learnt = batch["tokens"][batch["loss_mask"]]
    assert sorted(learnt) == sorted(set(store.tokens) - firsts)
    assert set(batch["tokens"][batch["segment_ids"] > 0]) == set(store.tokens)
    assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
    assert not batch["tokens"][batch["segment_ids"] == 0].any()
    assert plan.report["learnt_tokens"] == len(learnt)
    filled = (batch["segment_ids"] > 0).sum()
    assert plan.report["packing_efficiency"] == pytest.approx(filled / max(1, batch["tokens"].size))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 17), st.data())
def test_segments_are_stretches_of_documents(lengths, seq_len, data):
    overlap = data.draw(st.integers(1, seq_len - 1))
    store = store_of(lengths)
    batch = all_rows(plan_rows(store, seq_len, overlap, "split", seed=0))
    document = np.searchsorted(store.offsets, store.tokens, side="left")
    for tokens, segments, positions, mask in zip(
        *(batch[name] for name in ("tokens", "segment_ids", "positions", "loss_mask")), strict=True
    ):
        used = segments > 0
        assert not np.any(np.diff(used.astype(int)) > 0)  # padding is at the end
        assert list(dict.fromkeys(segments[used])) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            assert np.array_equal(positions[where], np.arange(where.sum()))
            assert np.all(np.diff(tokens[where]) == 1)
            assert len(set(document[tokens[where] - 1])) == 1
            assert not mask[where][0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=200), st.integers(20, 25))
def test_packing_fits_and_wastes_little(lengths, capacity):
    lengths = np.asarray(lengths, np.int64)
    rows = pack(lengths, capacity)
    assert rows.shape == lengths.shape
    filled = np.bincount(rows, weights=lengths) if len(rows) else np.zeros(0)
    assert np.all(filled <= capacity)
    assert np.all(filled > 0)
    # Two rows that fit into one would be a fault of best fit: at most one row is half empty.
    assert (filled <= capacity / 2).sum() <= 1


def test_packing_equals_best_fit_one_by_one():
    rng = np.random.default_rng(1)
    for _ in range(20):
        capacity = int(rng.integers(8, 40))
        lengths = rng.integers(1, capacity + 1, size=60)
        free: list[int] = []
        for length in sorted(lengths, reverse=True):
            fitting = [i for i, room in enumerate(free) if room >= length]
            if not fitting:
                free.append(capacity)
                fitting = [len(free) - 1]
            free[min(fitting, key=lambda i: free[i])] -= length
        assert pack(lengths, capacity).max() + 1 == len(free)


def test_pieces_of_a_long_document():
    pieces = cut_documents(np.asarray([0, 10, 10, 14]), seq_len=4, overlap=1)
    assert pieces.start.tolist() == [0, 3, 6, 10]
    assert pieces.length.tolist() == [4, 4, 4, 4]
    assert pieces.context.tolist() == [1, 1, 1, 1]
    assert pieces.document.tolist() == [0, 0, 0, 2]
    pieces = cut_documents(np.asarray([0, 7]), seq_len=4, overlap=2)
    assert (pieces.start.tolist(), pieces.length.tolist()) == ([0, 2, 4], [4, 4, 3])
    assert pieces.context.tolist() == [1, 2, 2]


def test_documents_that_are_too_long():
    store = store_of([10, 4, 3])
    with pytest.raises(DataError, match=r"test: 1 of 3 examples are longer than data.seq_len 4 \(longest: 10 tokens\)"):
        plan_rows(store, 4, 1, "error", 0)
    plan = plan_rows(store, 4, 1, "truncate", 0)
    assert plan.report["tokens_cut_off"] == 6
    assert plan.report["long_documents"] == 1
    assert sorted(all_rows(plan)["tokens"][all_rows(plan)["segment_ids"] > 0]) == [
        1,
        2,
        3,
        4,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
    ]


def test_masks_are_kept_and_idle_pieces_dropped():
    learnt = np.zeros(12, np.uint8)
    learnt[[2, 10, 11]] = 1  # the second of three pieces teaches nothing
    plan = plan_rows(store_of([12], learnt), 5, 1, "split", 0)
    batch = all_rows(plan)
    assert sorted(batch["tokens"][batch["loss_mask"]]) == [3, 11, 12]
    assert plan.report["pieces"] == 2


def test_examples_cut_to_nothing_are_counted():
    learnt = np.asarray([0, 0, 0, 1, 0, 1, 0, 0, 0, 1], np.uint8)
    store = store_of([4, 2, 4], learnt)
    assert plan_rows(store, 4, 1, "truncate", 0).report["learnt_tokens"] == 3
    with pytest.raises(DataError, match=r"2 of 3 examples have no token left .*seq_len 3 .*first is example 0\)"):
        plan_rows(store, 3, 1, "truncate", 0)
    assert plan_rows(store, 3, 1, "split", 0).report["learnt_tokens"] == 3


def test_lengths_0_1_2_do_no_harm():
    batch = all_rows(plan_rows(store_of([0, 1, 2, 0, 1]), 2, 1, "split", 0))
    assert batch["loss_mask"].sum() == 1
    assert (batch["segment_ids"] > 0).sum() == 4


def test_seed_decides_the_company():
    store = store_of([3] * 40)
    same, other = all_rows(plan_rows(store, 9, 1, "split", 5)), all_rows(plan_rows(store, 9, 1, "split", 6))
    assert np.array_equal(all_rows(plan_rows(store, 9, 1, "split", 5))["tokens"], same["tokens"])
    assert not np.array_equal(same["tokens"], other["tokens"])
