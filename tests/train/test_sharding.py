"""Meshes and the table of logical axes, on the real sizes, without allocating anything."""

import jax
import mini_train as mini
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.train import sharding
from gemma4_jax.train.sharding import MeshConfig, check_batch, make_mesh, parameter_shardings
from gemma4_jax.train.state import Network


@pytest.fixture(scope="module")
def real():
    """The published 12B and its drafter, as shapes."""
    return Network(get_preset("gemma4_12b"))


def test_axes_multiply_to_the_devices():
    assert dict(make_mesh(MeshConfig(2, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(-1, 1, 2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    with pytest.raises(ConfigError, match="mesh.data 3 x fsdp 1 x tensor 1 = 3, but there are 8 devices"):
        make_mesh(MeshConfig(3, 1, 1))
    with pytest.raises(ConfigError, match="8 devices are not a multiple of mesh.fsdp 3 x tensor 1"):
        make_mesh(MeshConfig(-1, 3, 1))
    with pytest.raises(ConfigError, match="mesh.tensor is 0"):
        MeshConfig(tensor=0)


def test_every_real_parameter_has_a_rule(real):
    for name, leaf in real.shapes.items():
        axes = sharding.logical_axes(name)
        stacked = 2 * name.startswith("model/groups/")
        assert len(leaf.shape) == len(axes) + stacked, name
    with pytest.raises(ConfigError, match="no sharding rule covers parameter model/new/thing"):
        sharding.logical_axes("model/new/thing")


def test_specs_of_the_real_model(real):
    found = parameter_shardings(real.shapes, real.config, make_mesh(MeshConfig(1, 4, 2)))
    layer = "model/groups/runs/{}/self_attn/{}_proj/weight"
    expected = {
        "model/embedder/table": P("tensor", "fsdp"),
        layer.format(0, "q"): P(None, None, "tensor", "fsdp"),
        layer.format(0, "k"): P(None, None, "tensor", "fsdp"),  # 8 local key/value heads on 2 devices
        layer.format(1, "k"): P(None, None, None, "fsdp"),  # 1 global head is not cut
        layer.format(0, "o"): P(None, None, "fsdp", "tensor"),
        "model/groups/runs/0/mlp/down_proj/weight": P(None, None, "fsdp", "tensor"),
        "model/groups/runs/0/input_layernorm/weight": P(None, None, None),
        "drafter/embedder/table": P("tensor", "fsdp"),
    }
    for name, spec in expected.items():
        assert found[name].spec == spec, name


def test_every_large_weight_is_cut_by_fsdp(real):
    found = parameter_shardings(real.shapes, real.config, make_mesh(MeshConfig(1, 8, 1)))
    whole = [n for n, leaf in real.shapes.items() if leaf.size > 1e6 and found[n].shard_shape(leaf.shape) == leaf.shape]
    assert whole == ["drafter/token_ordering"] or not whole


def test_a_dimension_that_does_not_divide():
    network = Network(mini.mini_config(vocab_size=66))
    with pytest.raises(
        ConfigError, match=r"drafter/embedder/table: dimension vocab of 66 .* 4 devices on axis 'tensor'"
    ):
        parameter_shardings(network.shapes, network.config, make_mesh(MeshConfig(2, 1, 4)))


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "mesh", "message"),
    [
        (6, 1, (4, 1, 2), "batch 6 is not a multiple of 4 devices on axis 'data'"),
        (6, 1, (1, 4, 2), "batch 6 is not a multiple of 4 devices on axis 'fsdp'"),
        (4, 1, (2, 4, 1), "batch 4 is not a multiple of 8 devices on axes 'data' x 'fsdp'"),
        (8, 3, (1, 1, 8), "data.batch_size 8 is not a multiple of train.accumulation 3"),
        (8, 2, (8, 1, 1), r"batch 4 \(data.batch_size 8 / train.accumulation 2\) is not a multiple of 8 devices"),
    ],
)
def test_batches_that_do_not_divide(batch_size, accumulation, mesh, message):
    with pytest.raises(ConfigError, match=message):
        check_batch(batch_size, accumulation, make_mesh(MeshConfig(*mesh)))


def test_batches_are_cut_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = sharding.place_batch({"tokens": np.arange(16, dtype=np.int32).reshape(8, 2)}, mesh)["tokens"]
    assert placed.addressable_shards[0].data.shape == (2, 2)
    assert (jax.device_get(placed) == np.arange(16).reshape(8, 2)).all()
