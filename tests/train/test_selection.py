"""Single layers of stacked weights: chosen by pattern, counted, and alone in moving."""

import jax
import jax.numpy as jnp
import mini_train as mini
import numpy as np
import optax
import pytest

from gemma4_jax.errors import ConfigError
from gemma4_jax.interop.names import LAYOUTS, target_rows
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import optimizer as opt
from gemma4_jax.train.state import Network, layer_masks, trainable_names
from gemma4_jax.train.tables import trainable_table

ALONE = LossConfig(mtp_weight=0.0)


@pytest.fixture(scope="module")
def network():
    """Seven layers: two groups of two sliding and a global one, and one left over."""
    kinds = ("sliding_attention", "sliding_attention", "full_attention") * 2 + ("full_attention",)
    return Network(mini.mini_config(num_hidden_layers=7, layer_types=kinds, drafter=None))


def chosen_layers(network, patterns):
    """Published layers of which the up projection trains."""
    names = trainable_names(network, ALONE, patterns)
    masks = layer_masks(network, names, patterns)
    found = []
    for row in target_rows(network.config, LAYOUTS["gemma4_unified_text"]):
        if row.published.endswith("up_proj.weight") and row.ours in names:
            mask = masks.get(row.ours, np.ones(network.shapes[row.ours].shape[:-2], bool))
            if mask[row.index]:
                found.append(int(row.published.split(".")[2]))
    return found


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (("*",), [0, 1, 2, 3, 4, 5, 6]),
        (("!*", "model/layers/[356]/*"), [3, 5, 6]),
        (("*", "!model/layers/0/mlp/*", "!model/layers/4/*"), [1, 2, 3, 5, 6]),
        (("!*", "*/mlp/*", "!model/tail/*"), [0, 1, 2, 3, 4, 5]),
        (("!*", "model/layers/1/*", "model/layers/6/mlp/*"), [1, 6]),
    ],
)
def test_layers_are_the_published_ones(network, patterns, layers):
    assert chosen_layers(network, patterns) == layers


def test_whole_stacks_have_no_mask(network):
    for patterns in (("*",), ("!*", "*/mlp/*")):
        assert layer_masks(network, trainable_names(network, ALONE, patterns), patterns) == {}


def test_a_layer_that_is_not_there(network):
    with pytest.raises(ConfigError, match="'model/layers/7/\\*' matches none"):
        trainable_names(network, ALONE, ("*", "model/layers/7/*"))


def test_the_table_counts_layers(network):
    patterns = ("!*", "model/layers/3/mlp/up_proj/*", "model/layers/4/mlp/up_proj/*")
    names = trainable_names(network, ALONE, patterns)
    table = trainable_table(network.shapes, names, layer_masks(network, names, patterns))
    (row,) = [line.split() for line in table.splitlines() if "up_proj" in line]
    assert row[1] == f"{2 * 32 * 16:,}"


def test_other_layers_do_not_move():
    """Neither by gradient nor by decay, under clipping that sees only the layers that train."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32), "t": jnp.ones((3,))}
    grads = jax.tree.map(lambda leaf: leaf + 1.0, params)
    mask = np.asarray([[True, False, False], [False, True, True]])
    moves = optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.1))
    optimizer = opt.Optimizer(moves, clip_norm=1.0, masks={"w": mask})
    new, *_ = opt.update(optimizer, grads, opt.init(optimizer, params), params, jnp.float32(0))
    updates = {name: new[name] - params[name] for name in params}
    assert not np.any(np.asarray(updates["w"])[~mask])
    norm = np.sqrt(np.sum(np.asarray(grads["w"])[mask] ** 2) + np.sum(np.asarray(grads["t"]) ** 2))
    np.testing.assert_allclose(
        np.asarray(updates["w"])[mask],
        -0.1 * np.asarray(grads["w"])[mask] / norm - 0.1 * np.asarray(params["w"])[mask],
        rtol=1e-4,
    )
    np.testing.assert_allclose(updates["t"], -0.1 * grads["t"] / norm - 0.1, rtol=1e-5)
