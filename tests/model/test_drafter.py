"""The drafter's own rules (fault 11): what each layer reads, the order of its inputs, ordered embeddings."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma4_jax as g4
from gemma4_jax.config import FULL, SLIDING, get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.model import drafter as drafters
from gemma4_jax.model.attention import masked_attention
from gemma4_jax.model.drafter import Drafter, cross_attend
from gemma4_jax.model.rope import rope_table

CONFIG = get_preset(
    "tiny", vocab_size=64, num_hidden_layers=2, sliding_window_pattern=2, vision=None, audio=None,
    **{"drafter.use_ordered_embeddings": True, "drafter.num_centroids": 8, "drafter.centroid_intermediate_top_k": 2},
)  # fmt: skip
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def drafter():
    built = g4.init(CONFIG, seed=2).drafter
    built.token_ordering[...] = jnp.asarray(RNG.permutation(64), jnp.int32)
    return built


@pytest.fixture(scope="module")
def keys():
    return {
        kind: (normal(1, 6, CONFIG.kv_heads(kind), width), normal(1, 6, CONFIG.kv_heads(kind), width))
        for kind, width in ((SLIDING, 16), (FULL, 32))
    }


EMBEDDING, HIDDEN = normal(1, 1, 64), normal(1, 1, 64)


def step(drafter, keys, position=6, embedding=EMBEDDING, hidden=HIDDEN, allowed=6):
    masks = {kind: jnp.arange(6)[None, None] < allowed for kind in keys}
    ropes = {kind: rope_table(CONFIG, kind, jnp.asarray([[position]], jnp.int32)) for kind in keys}
    return drafter.step(drafter.project_embedding(embedding), hidden, ropes, cross_attend(keys, masks, 1.0))


def moved(a, b):
    return float(jnp.max(jnp.abs(a[0] - b[0])))


def test_each_layer_reads_the_keys_of_its_kind(drafter, keys):
    base = step(drafter, keys)
    assert base[0].shape == (1, 1, 32)
    assert base[1].shape == (1, 1, 64)
    for kind in keys:
        other = {**keys, kind: tuple(normal(*x.shape) for x in keys[kind])}
        assert moved(step(drafter, other), base) > 1e-3
    hidden_rows = {kind: (k.at[:, 4:].add(9.0), v.at[:, 4:].add(9.0)) for kind, (k, v) in keys.items()}
    assert moved(step(drafter, hidden_rows, allowed=4), step(drafter, keys, allowed=4)) == 0.0


def test_position_order_and_feedback_matter(drafter, keys):
    base = step(drafter, keys)
    assert moved(step(drafter, keys, position=5), base) > 1e-4
    assert moved(step(drafter, keys, embedding=HIDDEN, hidden=EMBEDDING), base) > 1e-3
    again = step(drafter, keys, hidden=base[1])
    assert moved(again, base) > 1e-3
    np.testing.assert_allclose(base[1], base[0] @ drafter.post_projection.weight[...].T, rtol=1e-4, atol=1e-6)


def test_the_embedding_comes_first(drafter):
    weight = np.asarray(drafter.pre_projection.weight[...])
    assert weight.shape == (32, 128)
    np.testing.assert_allclose(
        drafter.project_embedding(EMBEDDING)[0, 0], weight[:, :64] @ np.asarray(EMBEDDING[0, 0]), rtol=1e-4, atol=1e-6
    )


def test_ordered_embeddings_are_exact_in_the_chosen_clusters(drafter):
    y = normal(3, 32)
    logits, dense = np.asarray(drafter.logits(y)), np.asarray(y @ drafter.embedder.table[...].T)
    clusters = np.asarray(drafter.token_ordering[...]).reshape(8, 8)
    scores = np.asarray(y @ drafter.centroids[...].T)
    for row in range(3):
        chosen = clusters[np.argsort(-scores[row])[:2]].reshape(-1)
        np.testing.assert_allclose(logits[row, chosen], dense[row, chosen], rtol=1e-5, atol=1e-6)
        rest = np.setdiff1d(np.arange(64), chosen)
        np.testing.assert_allclose(logits[row, rest], dense[row, chosen].min() - 1.0, rtol=1e-5)


def test_centroids_and_orderings_are_not_trained():
    abstract = nnx.eval_shape(lambda: Drafter(CONFIG, rngs=nnx.Rngs(0)))
    trained = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    assert not any(name.endswith(("centroids", "token_ordering", "layer_scalar")) for name in trained)


def test_no_drafter_to_build():
    with pytest.raises(ConfigError, match="drafter is None"):
        Drafter(get_preset("tiny", drafter=None), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_runs_of_queries(remat, monkeypatch):
    """Attention over runs of queries, the last one padded, gives what all queries at once give, and so do its gradients."""
    monkeypatch.setattr(drafters, "QUERY_RUN", 4)
    config = dataclasses.replace(CONFIG, remat=remat)
    k, v, q = normal(2, 12, 2, 16), normal(2, 12, 2, 16), normal(2, 11, 4, 16)
    mask = jnp.asarray(RNG.random((1, 11, 12)) < 0.6).at[:, :, 0].set(True)
    weight = normal(*q.shape)
    layer = types.SimpleNamespace(kind=SLIDING, config=config)

    def total(arrays, split):
        if split:
            attend = cross_attend({SLIDING: arrays[1:]}, {SLIDING: mask}, 0.5)
            return jnp.sum(attend(layer, arrays[0])[0] * weight)
        return jnp.sum(masked_attention(*arrays, mask, 0.5) * weight)

    got, want = (jax.jit(jax.value_and_grad(lambda x, s=s: total(x, s)))((q, k, v)) for s in (True, False))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)
    loops = jax.jit(jax.grad(lambda x: total(x, True))).lower((q, k, v)).as_text().count("stablehlo.while")
    assert (loops > 0) is (remat != "none")
