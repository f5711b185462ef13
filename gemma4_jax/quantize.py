"""Weight-only quantisation of whole models, its inverse, and the check that it happened.

The formats and the modules that hold them are in ``gemma4_jax.packed``. Here weights are the flat dicts of ``Network``:
``…/q_proj/weight`` becomes ``…/q_proj/values`` and ``…/q_proj/scale``, ``…/embedder/table`` likewise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import SCHEMES, ModelConfig, unknown_name
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.packed import (
    GROUP,
    SCALE_DTYPE,
    Quantized,
    QuantizedEmbedder,
    QuantizedLinear,
    pack_into,
    packed_shapes,
    unpack,
)
from gemma4_jax.train import sharding
from gemma4_jax.train.state import Network

__all__ = [
    "SCHEMES",
    "Quantized",
    "QuantizedEmbedder",
    "QuantizedLinear",
    "check_packed",
    "dequantize",
    "dequantize_weights",
    "planned_bytes",
    "quantize_model",
    "quantize_weights",
]
VALUES, SCALE = "/values", "/scale"
_PLAIN = ("/weight", "/table")
_LARGEST_PLAIN = 1_000_000  # numbers of an f32 leaf that may stay
_TOLERANCE = 0.01


def is_packed(name: str) -> bool:
    """Whether a leaf holds packed numbers or their scales."""
    return name.endswith((VALUES, SCALE))


def scheme_of(name: str, scheme: str) -> str:
    """The format of one matrix: tables are int8 in either scheme."""
    return "int8" if name.endswith("/table") else scheme


def packed_of(shapes: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The packed leaves of a quantised network, by the name that each would have if it were not packed."""
    found = {}
    for name in shapes:
        if name.endswith(VALUES):
            place = name.removesuffix(VALUES)
            table = place.endswith("/embedder")
            found[place + ("/table" if table else "/weight")] = (name, place + SCALE)
    return found


def quantize_model(bundle, scheme: str):
    """A bundle with packed matrices and tables (target, drafter and media projections); the given one stays as it is.

    Args:
      bundle: not quantised yet.
      scheme: ``int8`` or ``int4``.

    Raises:
      ConfigError: an unknown scheme, a bundle that is quantised, or rows that do not fill the groups of int4.
      CheckpointError: what came out is not what was planned.
    """
    if scheme not in SCHEMES:
        raise unknown_name("quantization", scheme, SCHEMES)
    if bundle.config.quantization is not None:
        raise ConfigError(f"the bundle is quantised already (quantization is {bundle.config.quantization!r})")
    config = dataclasses.replace(bundle.config, quantization=scheme)
    network = Network(config)
    return _with_weights(bundle, network, quantize_weights(_weights(bundle), network))


def dequantize(bundle):
    """The bundle with the matrices and tables that its packed ones stand for, in ``param_dtype``.

    Raises:
      ConfigError: the bundle is not quantised.
    """
    if bundle.config.quantization is None:
        raise ConfigError("the bundle is not quantised (quantization is None)")
    network = Network(dataclasses.replace(bundle.config, quantization=None))
    return _with_weights(bundle, network, dequantize_weights(_weights(bundle), bundle.config.param_dtype))


def _weights(bundle) -> dict[str, jax.Array]:
    modules = {"model": bundle.model} | ({"drafter": bundle.drafter} if bundle.drafter else {})
    return Network(bundle.config).weights(modules)


def _with_weights(bundle, network: Network, weights: Mapping[str, Any]):
    model, drafter = network.merge(weights)
    return dataclasses.replace(bundle, config=network.config, model=model, drafter=drafter)


def quantize_weights(weights: dict[str, jax.Array], network: Network) -> dict[str, jax.Array]:
    """Flat weights of the plain network in the packed form of a quantised one.

    Takes each leaf out of ``weights``, so that a caller who holds no other reference never has both forms of all.

    Args:
      weights: by name; emptied.
      network: of the same configuration with ``quantization``.

    Raises:
      CheckpointError: the result is not what was planned.
    """
    packed = packed_of(network.shapes)
    plan = planned_bytes(weights, packed, network.config.quantization)
    result = {}
    for name in list(weights):
        leaf = weights.pop(name)
        if name not in packed:
            result[name] = leaf
            continue
        parts = pack_leaf(leaf, scheme_of(name, network.config.quantization))
        for own, part in zip(packed[name], parts, strict=True):
            result[own] = _placed(own, part, leaf, network)
    check_packed(result, network, plan)
    return result


def pack_leaf(leaf: jax.Array, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """One matrix, stacked or not, on the host: compilers may fuse a multiplication and an addition, which rounds otherwise."""
    weights = np.asarray(leaf)
    values, scale = (np.empty(shape.shape, shape.dtype) for shape in packed_shapes(weights.shape, scheme))
    for index in np.ndindex(*weights.shape[:-2]):
        pack_into(weights[index], values[index], scale[index])
    return values, scale


def _placed(name: str, leaf: np.ndarray, like: jax.Array, network: Network) -> jax.Array:
    """A packed leaf on the devices of the one that it came from."""
    where = like.sharding
    if isinstance(where, jax.sharding.NamedSharding):
        where = sharding.parameter_shardings({name: network.shapes[name]}, network.config, where.mesh)[name]
    return jax.device_put(leaf, where)


def dequantize_weights(weights: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
    """Flat weights with packed leaves unpacked; the others as they are."""
    packed, result = packed_of(weights), {}
    taken = {part for parts in packed.values() for part in parts}
    for name, leaf in weights.items():
        if name not in taken:
            result[name] = leaf
    for name, (values, scale) in packed.items():
        result[name] = _unpack(weights[values], weights[scale], dtype)
    return result


_unpack = jax.jit(unpack, static_argnums=2)


@dataclasses.dataclass(frozen=True)
class PackedLeaf:
    """A packed matrix that reads like the plain one, slice by slice: only what is asked for is unpacked.

    values, scale: as stored. dtype: of what is read.
    """

    values: jax.Array
    scale: jax.Array
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain matrix (…, O, I)."""
        return (*self.values.shape[:-1], self.values.shape[-1] * (2 if self.values.dtype == np.uint8 else 1))

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    def __getitem__(self, index) -> jax.Array:
        """Unpacked weights of a slice in the leading axes."""
        return _unpack(*self.packed(index), self.dtype.name)

    def packed(self, index) -> tuple[jax.Array, jax.Array]:
        """Values and scale of a slice in the leading axes."""
        return self.values[index], self.scale[index]


def readable_weights(weights: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Flat weights under the names of the plain network, each packed one as a ``PackedLeaf``: for export."""
    packed = packed_of(weights)
    taken = {part for parts in packed.values() for part in parts}
    plain = {name: leaf for name, leaf in weights.items() if name not in taken}
    kind = jnp.dtype(dtype)
    return plain | {name: PackedLeaf(weights[v], weights[s], kind) for name, (v, s) in packed.items()}


def planned_bytes(leaves: Mapping[str, Any], packed: Mapping[str, Any], scheme: str) -> int:
    """Bytes of a quantised model: half a byte or one a weight and two a scale, the rest as it is.

    Args:
      leaves: shapes of the plain weights.
      packed: names of those that are packed.
      scheme: of the matrices.
    """
    total = 0
    for name, leaf in leaves.items():
        numbers = math.prod(leaf.shape)
        if name not in packed:
            total += numbers * jnp.dtype(leaf.dtype).itemsize
        elif scheme_of(name, scheme) == "int8":
            total += numbers + numbers // leaf.shape[-1] * SCALE_DTYPE.itemsize
        else:
            total += numbers // 2 + numbers // GROUP * SCALE_DTYPE.itemsize
    return total


def check_packed(weights: Mapping[str, Any], network: Network, plan: int) -> None:
    """Raise CheckpointError unless every matrix is stored packed, in the planned bytes (within 1 %)."""
    for name, leaf in network.shapes.items():
        found = weights.get(name)
        if found is None:
            raise CheckpointError(f"quantised weights lack {name}")
        if found.shape != leaf.shape or (is_packed(name) and found.dtype != leaf.dtype):
            raise CheckpointError(
                f"{name} is {found.dtype}{found.shape} after quantisation, not {leaf.dtype}{leaf.shape}"
            )
    for name, leaf in weights.items():
        if leaf.dtype == jnp.float32 and leaf.size > _LARGEST_PLAIN and name.endswith(_PLAIN):
            raise CheckpointError(f"{name} is still float32 with {leaf.size} numbers after quantisation")
    stored = sum(leaf.nbytes for leaf in weights.values())
    if abs(stored - plan) > _TOLERANCE * plan:
        raise CheckpointError(f"quantised weights hold {stored} bytes, but {plan} were planned")


def with_scheme(config: ModelConfig, scheme: str | None) -> ModelConfig:
    """The configuration with another scheme. Raises ConfigError for an unknown one."""
    if scheme is not None and scheme not in SCHEMES:
        raise unknown_name("quantization", scheme, (None, *SCHEMES))
    return dataclasses.replace(config, quantization=scheme)
