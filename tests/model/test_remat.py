"""Layers as programs of their own: values, gradients, what is not computed, what is not kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import mini_train
import numpy as np
import pytest

from gemma4_jax.losses import LossConfig
from gemma4_jax.model import apart
from gemma4_jax.model.decoder import layer_places
from gemma4_jax.train import step as steps
from gemma4_jax.train.state import Network

LOSS = LossConfig(mtp_steps=2)
STACKED = mini_train.mini_config(num_hidden_layers=5, sliding_window_pattern=2, remat="dots")
FLAT = dataclasses.replace(STACKED, scan_layers=False)


BATCH = jax.tree.map(jnp.asarray, mini_train.random_batch(2))


def flattened(stacked):
    """The same weights by the names of the layout without stacks."""
    places = dict(zip(layer_places(STACKED), layer_places(FLAT), strict=True))
    named = {name: leaf for name, leaf in stacked.items() if "/groups/" not in name and "/tail/" not in name}
    for (place, index), (own, _) in places.items():
        prefix = f"model/{place}/"
        for name, leaf in stacked.items():
            if name.startswith(prefix):
                named[f"model/{own}/{name.removeprefix(prefix)}"] = leaf[index]
    return named


def compiled_gradients(config, weights, names=None):
    """The compiled gradients of the loss by some weights (None: all), and what to call it with."""
    params = {name: leaf for name, leaf in weights.items() if names is None or name in names}
    frozen = {name: leaf for name, leaf in weights.items() if name not in params}
    inputs = params, frozen, BATCH
    return jax.jit(functools.partial(steps.gradients, Network(config), LOSS)).lower(*inputs).compile(), inputs


def loss_gradients(config, weights):
    run, inputs = compiled_gradients(config, weights)
    return run(*inputs)


def calls(compiled):
    """Passes of layers that are called and not inlined; RoPE's turns are too, and are left out."""
    lines = [line for line in compiled.as_text().splitlines() if " call(" in line and 'inlineable="false"' in line]
    assert any("to_apply=%turns" in line for line in lines)
    return sum("to_apply=%turns" not in line for line in lines)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(1)
    drawn = Network(STACKED).init(jax.random.key(0))
    return {name: leaf * jnp.asarray(rng.uniform(0.7, 1.3, leaf.shape), leaf.dtype) for name, leaf in drawn.items()}


def same(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        scale = max(float(jnp.max(jnp.abs(leaf))), 1e-3)
        np.testing.assert_allclose(found[name], leaf, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("kept", ["none", "dots", "full"])
def test_layers_with_arrays_of_their_own_give_the_same_gradients(weights, kept):
    """Of the multi-token loss, which reads keys and values of the last layers; packed rows."""
    expected, metrics = loss_gradients(STACKED, weights)
    found, own_metrics = loss_gradients(dataclasses.replace(FLAT, remat=kept), flattened(weights))
    same(found, flattened(expected))
    same(own_metrics, metrics, 1e-6)


def test_a_program_is_called_and_not_inlined(weights):
    """Two for each layer in the compiled step; none where a mesh has several devices."""
    assert calls(compiled_gradients(FLAT, flattened(weights))[0]) == 2 * FLAT.num_hidden_layers
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert not apart.runs_apart()


def test_frozen_weights_have_no_gradient_made(weights):
    """Only one layer's up projections train: the backward passes below it are never called."""
    own = flattened(weights)
    trained = {"model/tail/3/mlp/up_proj/weight"}
    whole, everything = compiled_gradients(FLAT, own)
    some, inputs = compiled_gradients(FLAT, own, trained)
    expected = whole(*everything)[0]
    same(some(*inputs)[0], {name: expected[name] for name in trained})
    assert calls(some) == 2 + 2
    assert some.cost_analysis()["flops"] < 0.7 * whole.cost_analysis()["flops"]


def test_each_layer_adds_what_it_keeps_and_no_more():
    """Temporaries of the loss's gradient, by depth: kept products and the weights' gradients."""
    width, hidden, rows, length = 32, 256, 4, 64
    used = {}
    for depth in (4, 8):
        config = mini_train.mini_config(
            num_hidden_layers=depth, layer_types=("sliding_attention",) * (depth - 1) + ("full_attention",),
            hidden_size=width, intermediate_size=hidden, sliding_window=64, drafter=None, remat="dots", scan_layers=False,
        )  # fmt: skip
        network = Network(config)
        run = jax.jit(functools.partial(steps.gradients, network, LossConfig(mtp_steps=0)))
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in network.shapes.items()}
        compiled = run.lower(shapes, {}, mini_train.random_batch(rows, length=length)).compile()
        used[depth] = compiled.memory_analysis().temp_size_in_bytes
    heads, key_heads, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    products = 4 * rows * length * (heads * head + 2 * key_heads * head + 3 * width + 2 * hidden)
    assert (used[8] - used[4]) / 4 < 1.3 * products, (used, products)


def test_apart_of_any_function():
    """Several outputs of which one is not used, whole numbers and masks among the inputs, an argument that does not move."""

    def function(tree, x, mask, count):
        y = jnp.where(mask, jnp.tanh(x @ tree["w"]), 0.0) * count
        return {"y": y, "z": jnp.sin(x)}, tree["frozen"] * y.sum()

    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32), "frozen": jnp.float32(3)}
    x, mask, number = jnp.linspace(-1, 1, 8).reshape(2, 4), jnp.asarray([[True], [False]]), jnp.int32(2)

    def loss(form, w, x):
        out, scaled = form({**tree, "w": w}, x, mask, number)
        return jnp.sum(out["y"] ** 2) + scaled

    plain = jax.value_and_grad(functools.partial(loss, function), (0, 1))(tree["w"], x)
    found = jax.jit(jax.value_and_grad(functools.partial(loss, apart.apart(function)), (0, 1)))(tree["w"], x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, plain)
