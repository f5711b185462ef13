"""The decoder: true sizes without memory, stacked against unstacked, remat, and what it hands to the drafter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma4_jax as g4
from gemma4_jax.config import FULL, SLIDING, get_preset
from gemma4_jax.model.attention import masked_attention
from gemma4_jax.model.decoder import Gemma4, layer_pattern, unstack
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.masks import make_masks
from gemma4_jax.model.rope import rope_table

SMALL = get_preset(
    "tiny", vocab_size=64, num_hidden_layers=5, sliding_window_pattern=2, vision=None, audio=None, drafter=None
)  # two groups of (sliding, global), and one more global layer


def count(module, kind=nnx.Param):
    return sum(int(np.prod(leaf.get_value().shape)) for _, leaf in nnx.to_flat_state(nnx.state(module, kind)))


@pytest.mark.parametrize("name", ["gemma4_12b", "tiny", "small", "bench"])
def test_true_sizes(name):
    """Counts of the real modules, without allocating, equal the closed form."""
    config = get_preset(name)
    model = nnx.eval_shape(lambda: Gemma4(config, rngs=nnx.Rngs(0)))
    drafter = nnx.eval_shape(lambda: Drafter(config, rngs=nnx.Rngs(0)))
    assert count(model) == config.num_parameters()
    assert count(drafter) == config.num_parameters(drafter=True)


def test_the_published_numbers():
    config = get_preset("gemma4_12b")
    parts = config.parameters_by_part()
    assert round(config.num_parameters() / 1e9, 2) == 11.96
    assert config.num_parameters(drafter=True) == 422_856_960
    assert round(parts[SLIDING] / 40e6, 1) == 224.1
    assert round(parts[FULL] / 8e6, 1) == 241.8
    assert round(parts["embedding"] / 1e6, 1) == 1006.6
    assert parts["vision"] == 35_176_704 + 3840 * 3840
    assert round(parts["audio"] / 1e6, 1) == 2.5


@pytest.mark.parametrize(
    ("types", "expected"),
    [("sssssf" * 8, ("sssssf", 8)), ("ssssssf", ("s", 6)), ("ssfssff", ("ssf", 2)), ("f", ("f", 1)), ("sf", ("sf", 1))],
)
def test_layer_pattern(types, expected):
    kinds, repeats = layer_pattern(tuple(types))
    assert ("".join(kinds), repeats) == expected


@pytest.fixture(scope="module")
def model():
    built = g4.init(SMALL, seed=3).model
    rng = np.random.default_rng(0)
    graph, state = nnx.split(built)
    leaves, tree = jax.tree.flatten(state)
    leaves = [x * jnp.asarray(rng.uniform(0.7, 1.3, x.shape), x.dtype) for x in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def tokens(batch, length):
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (batch, length)), jnp.int32)


def test_unstacked_blocks_give_the_same(model):
    ids = tokens(2, 12)
    blocks = unstack(model)
    assert [block.kind for block in blocks] == list(SMALL.layer_types)

    @jax.jit
    def both(state):
        stacked = nnx.merge(graph, state)
        out = stacked(ids)
        x, kv = stacked.embed(ids), {}
        masks = make_masks(SMALL, 12)
        for block in unstack(stacked):
            rope = rope_table(SMALL, block.kind, jnp.arange(12, dtype=jnp.int32)[None])

            def attend(_, q, k, v, mask=masks[block.kind]):
                return masked_attention(q, k, v, mask, 1.0), (k, v)

            x, kv[block.kind] = block(x, rope, attend)
        return (out.hidden, out.kv), (stacked.final_norm(x), kv)

    graph, state = nnx.split(model)
    stacked, plain = both(state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), stacked, plain)


def test_remat_changes_neither_value_nor_gradient(model):
    ids = tokens(1, 10)
    _, state = nnx.split(model)
    results = {}
    for remat in ("none", "dots", "mlp", "full"):
        config = dataclasses.replace(SMALL, remat=remat)
        other = nnx.split(nnx.eval_shape(lambda config=config: Gemma4(config, rngs=nnx.Rngs(0))))[0]

        def loss(state, other=other):
            return jnp.sum(jnp.square(nnx.merge(other, state)(ids).hidden)) / 100

        results[remat] = jax.jit(jax.value_and_grad(loss))(state)
    for remat in ("dots", "mlp", "full"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), results[remat], results["none"]
        )


def test_keys_values_and_padding_rows(model):
    """Global values are the unturned, unweighted norm: k on the dims that do not turn is k_norm times v, exactly."""
    graph, state = nnx.split(model)
    segments = jnp.asarray([[1] * 9, [0] * 9], jnp.int32)
    out = jax.jit(lambda state: nnx.merge(graph, state)(tokens(2, 9), segment_ids=segments))(state)
    assert np.isfinite(out.hidden).all()
    assert out.kv[SLIDING][0].shape == (2, 9, 2, 16)
    k, v = (np.asarray(x) for x in out.kv[FULL])
    assert k.shape == v.shape == (2, 9, 1, 32)
    last = unstack(model)[-1]
    assert last.kind == FULL
    np.testing.assert_allclose(np.square(v).mean(-1), 1.0, rtol=1e-4)
    still = [*range(4, 16), *range(20, 32)]
    weight = np.asarray(last.self_attn.k_norm.weight[...])
    np.testing.assert_allclose(k[..., still], (v * weight)[..., still], rtol=1e-6)


def test_layer_scalar_multiplies_the_whole_state(model):
    """Fault 5: the residual is scaled too."""
    block = unstack(model)[0]
    rope = rope_table(SMALL, block.kind, jnp.arange(4, dtype=jnp.int32)[None])

    def attend(_, q, k, v):
        return masked_attention(q, k, v, jnp.ones((1, 4, 4), bool), 1.0), None

    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, 64)), jnp.float32)
    block.layer_scalar[...] = jnp.ones((1,))
    whole, _ = block(x, rope, attend)
    block.layer_scalar[...] = jnp.full((1,), 0.25)
    np.testing.assert_allclose(block(x, rope, attend)[0], 0.25 * whole, rtol=1e-6)
