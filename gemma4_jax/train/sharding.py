"""The mesh, and where every weight, moment and batch lives on it.

Mesh axes: ``data`` (copies), ``fsdp`` (weights and moments cut, gathered layer by layer when used), ``tensor`` (heads,
feed-forward and vocabulary cut). A batch is cut over ``data`` and ``fsdp`` together.

There is one table from parameter names to logical axes, and one from logical axes to mesh axes. Weights are (out, in);
those under ``groups`` are stacked and have two more axes in front (group, layer of the run).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.decoder import BATCH_AXES, layer_places
from gemma4_jax.train import trees

AXES = ("data", "fsdp", "tensor")

# Parameter name -> logical axes of its last dimensions (leading group axes are never cut). First match wins.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("*/embedder/table", ("vocab", "embed")),
    ("*/self_attn/q_proj/weight", ("heads", "embed")),
    ("*/self_attn/k_proj/weight", ("kv_heads", "embed")),
    ("*/self_attn/v_proj/weight", ("kv_heads", "embed")),
    ("*/self_attn/o_proj/weight", ("embed", "heads")),
    ("*/mlp/gate_proj/weight", ("mlp", "embed")),
    ("*/mlp/up_proj/weight", ("mlp", "embed")),
    ("*/mlp/down_proj/weight", ("embed", "mlp")),
    ("drafter/pre_projection/weight", (None, "embed")),
    ("drafter/post_projection/weight", ("embed", None)),
    ("drafter/centroids", (None, None)),
    ("drafter/token_ordering", (None,)),
    ("model/vision/*_norm/weight", (None,)),
    ("model/vision/*ln?/weight", (None,)),
    ("model/vision/pos_embedding", (None, None, "embed")),
    ("model/vision/*/weight", ("embed", None)),
    ("model/vision/*/bias", (None,)),
    ("model/audio/*/weight", ("embed", None)),
    ("*norm/weight", (None,)),
    ("*layernorm/weight", (None,)),
    ("*/layer_scalar", (None,)),
)

MESH_AXES: dict[str | None, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    None: None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Fields of ``config.mesh``: devices along each axis. ``data`` -1: all that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in ("fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mesh.{name} is {getattr(self, name)}; it must be at least 1")
        if self.data < 1 and self.data != -1:
            raise ConfigError(f"mesh.data is {self.data}; it must be at least 1, or -1 for all devices left")


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """The device mesh.

    Args:
      config: sizes of the axes.
      devices: which devices to use; None: all.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    if config.data == -1 and len(devices) % fixed:
        raise ConfigError(
            f"{len(devices)} devices are not a multiple of mesh.fsdp {config.fsdp} x tensor {config.tensor}"
        )
    data = len(devices) // fixed if config.data == -1 else config.data
    if data * fixed != len(devices):
        raise ConfigError(
            f"mesh.data {data} x fsdp {config.fsdp} x tensor {config.tensor} = {data * fixed}, "
            f"but there are {len(devices)} devices"
        )
    grid = np.asarray(devices).reshape(data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def logical_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of a parameter's last dimensions; halves of an adapter are cut as the side of the weight they face.

    Raises ConfigError when the table has no row for it.
    """
    place, found, half = name.rpartition("/lora/")
    if found:
        outputs, inputs = logical_axes(f"{place}/weight")
        return {"a": (None, inputs), "b": (outputs, None)}[half]
    plain = name
    if name.endswith(("/values", "/scale")):  # packed weights lie as those that they stand for
        place = name.rpartition("/")[0]
        plain = f"{place}/table" if place.endswith("/embedder") else f"{place}/weight"
    for pattern, axes in PARAMETER_AXES:
        if fnmatch.fnmatchcase(plain, pattern):
            return axes
    raise ConfigError(f"no sharding rule covers parameter {name}; add one to PARAMETER_AXES")


def parameter_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], config: ModelConfig, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Where each parameter of a flat dict lives.

    Key/value heads are cut whole or not at all: with fewer heads than ``tensor`` devices they are copied instead.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide, naming parameter, dimension and both numbers.
    """
    return {name: NamedSharding(mesh, _spec(name, leaf.shape, config, mesh)) for name, leaf in shapes.items()}


def _spec(name: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh) -> PartitionSpec:
    axes = logical_axes(name)
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for logical, size in zip(axes, shape[len(spec) :], strict=True):
        axis = MESH_AXES[logical] if size > 1 else None
        if logical == "kv_heads" and _kv_heads(config, name) % mesh.shape[axis]:
            axis = None
        if axis is not None and size % mesh.shape[axis]:
            raise ConfigError(
                f"parameter {name}: dimension {logical} of {size} is not a multiple of {mesh.shape[axis]} devices "
                f"on axis '{axis}'"
            )
        spec.append(axis if axis is not None and mesh.shape[axis] > 1 else None)
    return PartitionSpec(*spec)


def _kv_heads(config: ModelConfig, name: str) -> int:
    """Key/value heads of the layers that ``model/groups/runs/R/…`` or ``model/tail/J/…`` holds."""
    for kind, (place, _) in zip(config.layer_types, layer_places(config), strict=True):
        if name.startswith(f"model/{place}/"):
            return config.kv_heads(kind)
    raise ConfigError(f"parameter {name} has key/value heads but belongs to no layer of the model")


def shardings_like(tree: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of any tree that holds per-parameter leaves (moments live where their parameter lives), rest copied.

    Args:
      tree: a pytree of arrays or shapes whose paths contain parameter names as dict keys.
      parameters: shardings by parameter name.
      mesh: for the leaves that belong to no parameter.
    """

    def of(path, leaf):
        for key in path:
            found = parameters.get(trees.key_name(key))
            if found is not None and len(found.spec) == len(leaf.shape):
                return found
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows cut over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """How many pieces a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raise ConfigError unless every micro-batch splits evenly over the batch axes of the mesh."""
    if accumulation < 1 or batch_size % accumulation:
        raise ConfigError(f"data.batch_size {batch_size} is not a multiple of train.accumulation {accumulation}")
    micro = batch_size // accumulation
    for axes in (("data",), BATCH_AXES):
        pieces = math.prod(mesh.shape[axis] for axis in axes)
        if micro % pieces:
            per = f" (data.batch_size {batch_size} / train.accumulation {accumulation})" if accumulation > 1 else ""
            quoted = " x ".join(f"'{axis}'" for axis in axes if mesh.shape[axis] > 1)
            raise ConfigError(
                f"batch {micro}{per} is not a multiple of {pieces} devices on {'axis' if ' x ' not in quoted else 'axes'} "
                f"{quoted}"
            )


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host-local rows of a batch → arrays cut over the mesh; with several processes each gives its own rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), dict(batch))
