"""Masks: the table of fault 1, and every rule against a plain loop over queries and keys."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_jax.config import FULL, SLIDING, get_preset
from gemma4_jax.model.masks import drafter_masks, image_runs, make_masks

CONFIG = get_preset("tiny")
TYPES = [0, 1, 1, 1, 1, 0, 1, 1, 0]


def masks(window, types, segments=None, **changes):
    config = dataclasses.replace(CONFIG, sliding_window=window, **changes)
    types, segments = (None if x is None else np.asarray([x], np.int32) for x in (types, segments))
    length = next(x for x in (types, segments) if x is not None).shape[1]
    return {kind: np.asarray(mask)[0] for kind, mask in make_masks(config, length, segments, types).items()}


def test_table_of_fault_1():
    found = masks(3, TYPES)
    ranges = [(0, 0), (0, 4), (0, 4), (1, 4), (2, 4), (3, 5), (4, 7), (5, 7), (6, 8)]
    for row, (first, last) in enumerate(ranges):
        assert set(np.flatnonzero(found[SLIDING][row])) == set(range(first, last + 1)), row
    assert found[SLIDING].sum(1).tolist() == [1, 5, 5, 4, 3, 3, 4, 3, 3]
    np.testing.assert_array_equal(found[FULL], np.tri(9, dtype=bool))


def test_an_image_longer_than_the_window_stays_open():
    """Fault 1, the other form: dropping the two-way block when the run is longer than the window."""
    found = masks(3, [1] * 9)[SLIDING]
    np.testing.assert_array_equal(found, ~np.tri(9, k=-3, dtype=bool))


def test_audio_and_switched_off_vision_are_causal():
    audio = masks(20, [0, 3, 3, 3, 0])
    np.testing.assert_array_equal(audio[SLIDING], np.tri(5, dtype=bool))
    off = masks(20, [0, 1, 1, 1, 0], use_bidirectional_attention=None)
    np.testing.assert_array_equal(off[SLIDING], np.tri(5, dtype=bool))


def test_runs_end_where_examples_end():
    runs = np.asarray(
        image_runs(np.asarray([[1, 1, 1, 2, 0, 1]], np.int32), np.asarray([[1, 1, 2, 2, 2, 2]], np.int32))
    )
    assert runs.tolist() == [[0, 0, 1, 1, -1, 2]]


def plain_rule(kind, window, types, segments, q, k):
    """The rule for one pair, by walking along the row."""
    if segments[q] == 0 or segments[q] != segments[k]:
        return False
    low, high = min(q, k), max(q, k)
    same_run = all(types[i] in (1, 2) and segments[i] == segments[q] for i in range(low, high + 1))
    if kind == FULL:
        return k <= q
    return (k <= q or same_run) and k > q - window


rows = st.sampled_from([1, 6, 12]).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0, 0, 1, 1, 2, 3]), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.integers(0, n),
    )
)


@given(rows, st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_against_a_triple_loop(row, window):
    types, starts, padding = row
    segments = (1 + np.cumsum(starts)).astype(int)
    segments[len(types) - padding :] = 0
    found = masks(window, types, segments.tolist())
    for kind in (FULL, SLIDING):
        for q in range(len(types)):
            for k in range(len(types)):
                expected = plain_rule(kind, window, types, segments, q, k)
                assert found[kind][q, k] == expected, (kind, q, k)


@given(st.integers(1, 5), st.lists(st.booleans(), min_size=10, max_size=10))
@settings(max_examples=25, deadline=None)
def test_drafter_masks_against_a_loop(window, starts):
    """Keys before the query; sliding layers see W + 1 of them."""
    segments = 1 + np.cumsum(starts)
    config = dataclasses.replace(CONFIG, sliding_window=window)
    queries = np.arange(1, len(starts), dtype=np.int32)
    found = drafter_masks(config, queries, len(starts), segments[None].astype(np.int32))
    for i, q in enumerate(queries):
        for k in range(len(starts)):
            before = k < q and segments[k] == segments[q]
            assert bool(found[FULL][0, i, k]) == before
            assert bool(found[SLIDING][0, i, k]) == (before and q - k <= window + 1)


@pytest.mark.parametrize("length", [1, 5])
def test_without_segments_rows_are_whole(length):
    found = make_masks(CONFIG, length)
    assert found[FULL].shape == (1, length, length)
