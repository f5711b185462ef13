"""Attention in runs of query rows, each over the keys that its mask can allow at all, against attention over all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_jax.config import FULL, SLIDING, get_preset
from gemma4_jax.model.attention import masked_attention, query_blocks
from gemma4_jax.model.masks import Band, attention_band, make_masks

pytestmark = pytest.mark.usefixtures("short_query_blocks")


@given(
    length=st.integers(1, 70),
    window=st.integers(1, 12),
    kind=st.sampled_from([FULL, SLIDING]),
    media=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_no_allowed_key_lies_outside(length, window, kind, media, seed):
    """Runs cover every row once, and hold all that the mask allows."""
    config = dataclasses.replace(get_preset("tiny"), sliding_window=window)
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 2, (1, length)).astype(np.int32) if media else None
    mask = np.asarray(make_masks(config, length, None, types)[kind])[0]
    rows, outside = [], mask.copy()
    for queries, keys in query_blocks(length, attention_band(config, kind, media)):
        rows += range(length)[queries]
        outside[queries, keys] = False
    assert rows == list(range(length))
    assert not outside.any()


@pytest.mark.parametrize(("kind", "media"), [(FULL, False), (SLIDING, False), (SLIDING, True)])
def test_value_and_gradient(kind, media):
    """Two packed examples, one of padding behind them, images in one."""
    config = dataclasses.replace(get_preset("tiny"), sliding_window=6)
    rng = np.random.default_rng(0)
    segments = np.repeat(np.asarray([[1, 2, 0]], np.int32), [11, 13, 2], axis=1)
    types = np.repeat(np.asarray([[0, 1, 0]], np.int32), [3, 7, 16], axis=1) if media else None
    mask = make_masks(config, 26, segments, types)[kind]
    band = attention_band(config, kind, media)
    assert len(query_blocks(26, band)) == 7
    q, k, v = (jnp.asarray(rng.normal(size=(1, 26, n, 8)), jnp.float32) for n in (4, 2, 2))
    weight = jnp.asarray(rng.normal(size=q.shape) * (segments > 0)[:, :, None, None], jnp.float32)

    def total(arrays, band):
        return jnp.sum(masked_attention(*arrays, mask, 0.5, band) * weight)

    got, want = (jax.jit(jax.value_and_grad(lambda x, b=b: total(x, b)))((q, k, v)) for b in (band, None))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)
    assert all(np.isfinite(x).all() for x in got[1])


def test_how_many_runs():
    """At least QUERY_BLOCK rows each, at most MOST_BLOCKS of them, and one where nothing is gained."""
    assert [len(query_blocks(n, Band(None, 0))) for n in (1, 4, 5, 64, 65, 4096)] == [1, 1, 2, 16, 9, 16]
    assert query_blocks(64, Band()) == [(slice(0, 64), slice(0, 64))]
    assert query_blocks(12, Band(2, 0))[2] == (slice(8, 12), slice(6, 12))
