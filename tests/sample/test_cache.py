"""Cache layouts, writes and reads against plain numpy bookkeeping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config

from gemma4_jax.config import FULL, SLIDING, get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.model import cache as kv
from gemma4_jax.model.attention import masked_attention


def store_of(values):
    """A store (1, 1, S, 1) that holds the given numbers."""
    return kv.Store(jnp.asarray(values, jnp.float32)[None, None, :, None], None)


def contents(store, length):
    """Numbers of a ring by position."""
    position = np.asarray(kv.ring_positions(jnp.asarray([length], jnp.int32), store.data.shape[2]))[0]
    order = np.argsort(position)
    return [float(np.asarray(store.data)[0, 0, s, 0]) for s in order if position[s] >= 0]


def test_writing_the_last_free_slot_evicts_nothing():
    """Fault 6: six keys 10.0…10.5 and two more fill a ring of 8 exactly; the ninth evicts the first alone."""
    ring = store_of(np.zeros(8))
    for i in range(9):
        ring = kv.write_tokens(ring, store_of([10 + i / 10]), jnp.asarray([i], jnp.int32), ring=True)
        want = [10 + j / 10 for j in range(max(0, i - 7), i + 1)]
        np.testing.assert_allclose(contents(ring, i + 1), want, rtol=1e-6)


@given(
    slots=st.integers(3, 12),
    pieces=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    chunked=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rings_of_uneven_rows(slots, pieces, chunked):
    """Any sequence of writes leaves the newest positions of each row, in both ways of writing."""
    ring = kv.Store(jnp.zeros((2, 1, slots, 1), jnp.float32), None)
    lengths = np.zeros(2, np.int32)
    for piece in pieces:
        counts = np.asarray(piece, np.int32)
        if chunked:
            new = np.full((2, 1, 9, 1), np.nan, np.float32)  # what is not counted must leave no trace
            for row in range(2):
                new[row, 0, : counts[row], 0] = lengths[row] + np.arange(counts[row])
            ring = _write_chunk(ring, kv.Store(jnp.asarray(new), None), lengths, counts)
        else:
            counts[:] = counts.min()
            for t in range(int(counts[0])):
                new = (lengths + t).astype(np.float32)[:, None, None, None]
                ring = _write_one(ring, kv.Store(jnp.asarray(new), None), lengths + t)
        lengths = lengths + counts
    for row in range(2):
        position = np.asarray(kv.ring_positions(jnp.asarray(lengths), slots))[row]
        written = np.asarray(ring.data)[row, 0, :, 0]
        np.testing.assert_array_equal(written[position >= 0], position[position >= 0])
        want = set(range(max(0, lengths[row] - slots), lengths[row]))
        assert set(position[position >= 0].tolist()) == want


_write_chunk = jax.jit(lambda s, n, a, c: kv.write_chunk(s, n, a, c, ring=True))
_write_one = jax.jit(lambda s, n, a: kv.write_tokens(s, n, a, ring=True))


@pytest.mark.parametrize(("start", "count"), [(0, 4), (3, 2), (6, 4), (8, 2), (9, 0)])
def test_chunk_at_the_end_of_a_global_cache(start, count):
    """A padded chunk that reaches beyond the capacity writes its real part at its place."""
    old = store_of(-1 - np.arange(10.0))
    new = store_of([start, start + 1, start + 2, start + 3])
    got = kv.write_chunk(old, new, jnp.asarray([start], jnp.int32), jnp.asarray([count], jnp.int32), ring=False)
    want = -1 - np.arange(10.0)
    want[start : start + count] = np.arange(start, start + count)
    np.testing.assert_array_equal(np.asarray(got.data)[0, 0, :, 0], want)


@pytest.mark.parametrize("compact", [True, False])
def test_blocks_equal_plain_attention(compact):
    """Attention over blocks of 256 with rows of uneven length, against the network's own function."""
    config = small_config(attention_k_eq_v=compact)
    layout = kv.kind_layout(config, FULL)
    assert layout.compact is compact
    rng = np.random.default_rng(0)
    b, t, s, n, h = 2, 3, 600, config.num_attention_heads, config.global_head_dim
    norm = rng.uniform(0.5, 1.5, h).astype(np.float32)
    v = rng.normal(size=(b, s, 1, h)).astype(np.float32)
    k = v * norm if compact else rng.normal(size=(b, s, 1, h)).astype(np.float32)
    if compact:
        half = h // 2
        for at in (0, half):
            k[..., at : at + layout.turned] = rng.normal(size=(b, s, 1, layout.turned))
    q = rng.normal(size=(b, t, n, h)).astype(np.float32) * 0.3
    last = np.asarray([[10, 11, 12], [597, 598, 599]], np.int32)
    keys, values = kv.stored_form(layout, jnp.asarray(k), jnp.asarray(v))
    padded = [None if x is None else jnp.pad(x, ((0, 0), (0, 0), (0, 768 - s), (0, 0))) for x in (keys, values)]
    cache = kv.LayerCache(kv.Store(padded[0], None), None if values is None else kv.Store(padded[1], None))
    rows = kv.query_form(layout, jnp.asarray(q), jnp.asarray(norm))
    got = kv.heads_of_rows(jax.jit(kv.attend_blocks, static_argnums=0)(layout, rows, cache, last), t)
    mask = np.arange(s)[None, None] <= last[:, :, None]
    np.testing.assert_allclose(got, masked_attention(q, k, v, mask, 1.0), atol=1e-5)


def test_int8_has_a_scale_for_each_part():
    """A part of small numbers beside one of large numbers keeps its precision."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(1, 1, 5, 6)) * 100, rng.normal(size=(1, 1, 5, 4)) * 0.01], -1)
    like = kv.Store(jnp.zeros((1, 1, 5, 10), jnp.int8), jnp.zeros((1, 1, 5, 2), jnp.float32))
    stored = kv.encode(jnp.asarray(x, jnp.float32), like, (6, 4))
    assert stored.data.dtype == jnp.int8
    back = np.asarray(kv.read(stored, (6, 4), jnp.float32))
    assert np.abs(back[..., :6] - x[..., :6]).max() < 3
    assert np.abs(back[..., 6:] - x[..., 6:]).max() < 3e-4
    assert np.all(np.isfinite(kv.read(kv.encode(jnp.zeros((1, 1, 5, 10)), like, (6, 4)), (6, 4), jnp.float32)))


def test_size_of_the_12b():
    """640 numbers a token and global layer; under 3.2 GB in bf16 at the full context with every ring."""
    config = get_preset("gemma4_12b")
    assert kv.kind_layout(config, FULL).numbers_per_token() == 640
    assert kv.kind_layout(config, SLIDING).numbers_per_token() == 2 * 8 * 256
    size = kv.cache_bytes(config, 262_144, draft_tokens=8, dtype="bfloat16")
    assert size["per_token"] == 8 * 640 * 2
    assert size["total"] < 3.2e9
    assert size["total"] == size[SLIDING] + size[FULL]
    assert kv.cache_bytes(config, 262_144, 8, "int8")["total"] < 0.53 * size["total"]
    plain = dataclasses.replace(config, attention_k_eq_v=False)
    assert kv.cache_bytes(plain, 262_144, 8)["per_token"] == 8 * 1024 * 2


def test_unknown_dtype():
    with pytest.raises(ConfigError, match="float32, bfloat16, int8"):
        kv.init_cache(small_config(), 1, 16, dtype="float8")
