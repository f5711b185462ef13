"""What training carries along: weights, moments, step and random key, as plain arrays.

The modules themselves are rebuilt from a flat dict of weights inside the compiled step (``Network.merge``), so that there is
no hidden state and one dict says everything there is to save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.model.decoder import Gemma4, layer_places
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.lora import add_adapters
from gemma4_jax.packed import fake_quantize, quantize_modules
from gemma4_jax.train import optimizer as optimizers
from gemma4_jax.train import sharding, trees

Params = dict[str, jax.Array]

REFERENCE = "reference/"  # before the names of frozen copies of trained weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps.

    params: trainable weights by name. frozen: all others; with a loss that looks back, also what the trainable ones were at
    step 0, under ``REFERENCE``. opt_state: of the optimiser, f32. step: int32, updates done.
    key: uint32 data of the run's random key. average: moving average of the trainable weights, f32 by name; empty without
    ``train.ema_decay``.
    """

    params: Params
    frozen: Params
    opt_state: Any
    step: jax.Array
    key: jax.Array
    average: Params = dataclasses.field(default_factory=dict)

    @property
    def evaluated(self) -> Params:
        """The trainable weights to judge and use: their average in their own dtypes if there is one, else as they are."""
        if not self.average:
            return self.params
        return {name: self.average[name].astype(leaf.dtype) for name, leaf in self.params.items()}


class Network:
    """Target and drafter as functions of a flat dict of weights, named ``model/…`` and ``drafter/…``.

    Attributes:
      config: the model configuration.
      shapes: name -> ``jax.ShapeDtypeStruct``, known without allocating anything.
      variables: names of weights that are no ``nnx.Param`` (layer scalars, centroids, token orders): never trained.
      rounded: weight format by name, of the matrices and tables that ``merge`` rounds; empty unless asked for.
    """

    def __init__(self, config: ModelConfig, quantization_aware: str | None = None):
        """quantization_aware: compute with weights as that scheme would round them, gradients passed straight through.

        Raises:
          ConfigError: weights that are packed already, or do not fill the scheme's groups.
        """
        self.config = config
        self.rounded: dict[str, str] = {}
        if quantization_aware is not None:
            self.rounded = _rounded_names(config, quantization_aware)
        parts = nnx.eval_shape(lambda: _build(config, jax.random.key(0)))
        self._parts = {part: nnx.split(module) for part, module in parts.items()}
        self._flat = {part: nnx.to_flat_state(state) for part, (_, state) in self._parts.items()}
        abstract = {name: variable for part in self._flat for name, variable in self._named(part, self._flat[part])}
        self.shapes = {
            name: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype) for name, v in abstract.items()
        }
        self.variables = {name for name, variable in abstract.items() if not isinstance(variable, nnx.Param)}

    @staticmethod
    def _named(part: str, flat):
        return [(trees.SEPARATOR.join(map(str, (part, *path))), variable) for path, variable in flat]

    def init(self, key: jax.Array) -> Params:
        """Fresh weights; under jit with output shardings they are created in place."""
        return self.weights(_build(self.config, key))

    def weights(self, modules: Mapping[str, nnx.Module]) -> Params:
        """The weights of ``{"model": Gemma4, "drafter": Drafter}`` as a flat dict."""
        named = (self._named(part, nnx.to_flat_state(nnx.state(module))) for part, module in modules.items())
        return {name: variable.get_value() for pairs in named for name, variable in pairs}

    def merge(self, params: Mapping[str, jax.Array]) -> tuple[Gemma4, Drafter | None]:
        """The modules with these weights, rounded where the run asks for it."""
        return self.assemble(self.round(params))

    def round(self, params: Mapping[str, jax.Array]) -> Params:
        """The weights as ``merge`` computes with them: those in ``rounded`` as they would be after packing."""
        return {
            name: fake_quantize(leaf, self.rounded[name]) if name in self.rounded else leaf
            for name, leaf in params.items()
        }

    def assemble(self, params: Mapping[str, jax.Array]) -> tuple[Gemma4, Drafter | None]:
        """The modules with these weights as they are."""
        modules = {}
        for part, (graph, _) in self._parts.items():
            names = (name for name, _ in self._named(part, self._flat[part]))
            leaves = [(path, v.replace(params[name])) for name, (path, v) in zip(names, self._flat[part], strict=True)]
            modules[part] = nnx.merge(graph, nnx.from_flat_state(leaves))
        return modules["model"], modules.get("drafter")


def _rounded_names(config: ModelConfig, scheme: str) -> dict[str, str]:
    if config.quantization is not None:
        raise ConfigError(
            f"train.quantization_aware {scheme!r} rounds plain weights, but model.quantization is {config.quantization!r}"
        )
    packed = Network(dataclasses.replace(config, quantization=scheme)).shapes
    places = [name.removesuffix("/values") for name in packed if name.endswith("/values")]
    tables = {f"{place}/table": "int8" for place in places if place.endswith("/embedder")}
    return tables | {f"{place}/weight": scheme for place in places if not place.endswith("/embedder")}


def _build(config: ModelConfig, key: jax.Array) -> dict[str, nnx.Module]:
    target_key, drafter_key = jax.random.split(key)
    modules: dict[str, nnx.Module] = {"model": Gemma4(config, rngs=nnx.Rngs(params=target_key))}
    if config.drafter is not None:
        modules["drafter"] = Drafter(config, rngs=nnx.Rngs(params=drafter_key))
    if config.quantization is not None:
        modules = {part: quantize_modules(module, config.quantization) for part, module in modules.items()}
    if config.lora is not None:
        add_adapters(modules, config.lora, key)
    return modules


def untrained(network: Network, loss: LossConfig, media_kinds: Collection[str]) -> dict[str, str]:
    """Weights that no gradient reaches, with the reason: they must not decay or carry moments in the optimiser.

    ``media_kinds``: of "vision" and "audio" those that the data has.
    """
    reasons = {}
    for name in network.shapes:
        if name in network.variables:
            reasons[name] = "a stored constant"
        elif name.startswith("drafter/") and not loss.uses_drafter:
            reasons[name] = "no multi-token loss"
        elif name.startswith("drafter/post_projection/") and loss.mtp_steps == 1:
            reasons[name] = "mtp_steps is 1: nothing is fed back"
        elif name.startswith("model/vision/") and "vision" not in media_kinds:
            reasons[name] = "the data has no images or video"
        elif name.startswith("model/audio/") and "audio" not in media_kinds:
            reasons[name] = "the data has no sound"
    return reasons


def trainable_names(
    network: Network, loss: LossConfig, patterns: Sequence[str], media_kinds: Collection[str] = ()
) -> set[str]:
    """Weights to train: those that ``train.trainable`` selects and a gradient can reach.

    Raises:
      ConfigError: from ``optimizer.select``, or when nothing is left.
    """
    units = _units(network)
    chosen = optimizers.select({unit: (unit, name) for unit, (name, _) in units.items()}, patterns)
    names = {units[unit][0] for unit in chosen} - set(untrained(network, loss, media_kinds))
    if not names:
        raise ConfigError(f"train.trainable {list(patterns)} leaves nothing to train")
    return names


def layer_masks(network: Network, names: Collection[str], patterns: Sequence[str]) -> dict[str, np.ndarray]:
    """Which layers of stacked weights train, for those of ``names`` of which not all do: bool over the leading axes."""
    units = _units(network)
    chosen = optimizers.select({unit: (unit, name) for unit, (name, _) in units.items()}, patterns)
    masks: dict[str, np.ndarray] = {}
    for unit, (name, index) in units.items():
        if index and name in names:
            masks.setdefault(name, np.zeros(network.shapes[name].shape[: len(index)], bool))[index] = unit in chosen
    return {name: mask for name, mask in masks.items() if not mask.all()}


def _units(network: Network) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What patterns choose among: every weight, those of the target's layers one by one as ``model/layers/I/…``.

    Returns:
      Name of the unit -> the weight's name in the trainer, and the layer's index in its leading axes (() if not stacked).
    """
    places: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for layer, (place, index) in enumerate(layer_places(network.config)):
        places.setdefault(f"model/{place}/", []).append((layer, index))
    units = {}
    for name in network.shapes:
        place = next((place for place in places if name.startswith(place)), None)
        for layer, index in places.get(place, [(-1, ())]):
            unit = name if place is None else f"model/layers/{layer}/{name.removeprefix(place)}"
            units[unit] = (name, index)
    return units


def create_state(
    network: Network,
    names: set[str],
    optimizer: optimizers.Optimizer,
    seed: int,
    given: Mapping[str, jax.Array],
    averaged: bool = False,
    referenced: bool = False,
) -> TrainState:
    """A state at step 0; a function of the arguments alone, whatever the mesh. For jit or eval_shape.

    Args:
      names: weights to train.
      seed: of the weights that are not given, and of the run's random key.
      given: weights to start from, by name; the others are drawn.
      averaged: whether to keep a moving average of the trained weights; it starts at them.
      referenced: whether to keep the trained weights as they are now.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    weights = {**network.init(init_key), **given}
    params = {name: weights[name] for name in network.shapes if name in names}
    frozen = {name: weights[name] for name in network.shapes if name not in names}
    if referenced:
        frozen |= {f"{REFERENCE}{name}": leaf for name, leaf in params.items()}
    return TrainState(
        params=params,
        frozen=frozen,
        opt_state=optimizers.init(optimizer, params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(run_key),
        average={name: leaf.astype(jnp.float32) for name, leaf in params.items()} if averaged else {},
    )


def reference_weights(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """What the trained weights were at step 0, by their own names, from a state's ``frozen``; empty if it was not kept."""
    return {name.removeprefix(REFERENCE): leaf for name, leaf in frozen.items() if name.startswith(REFERENCE)}


def _without_reference(frozen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in frozen.items() if not name.startswith(REFERENCE)}


def state_shardings(state: TrainState, config: ModelConfig, mesh: Mesh) -> TrainState:
    """Where each leaf of an (abstract) state lives: a TrainState of ``NamedSharding``."""
    parameters = sharding.parameter_shardings({**state.params, **_without_reference(state.frozen)}, config, mesh)
    frozen = {name: parameters[name.removeprefix(REFERENCE)] for name in state.frozen}
    return TrainState(
        params={name: parameters[name] for name in state.params},
        frozen=frozen,
        opt_state=sharding.shardings_like(state.opt_state, parameters, mesh),
        step=sharding.replicated(mesh),
        key=sharding.replicated(mesh),
        average={name: parameters[name] for name in state.average},
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """Checkpoint items ``params``, ``train`` and, if it is kept, ``average``: nested pure dicts of arrays or of shapes."""
    items = {
        "params": trees.unflatten({**state.params, **_without_reference(state.frozen)}),
        "train": {
            "step": state.step,
            "key": state.key,
            "optimizer": trees.unflatten(trees.named_leaves(state.opt_state)),
        },
    }
    reference = reference_weights(state.frozen)
    if reference:
        items["train"]["reference"] = trees.unflatten(reference)
    return items | ({"average": trees.unflatten(state.average)} if state.average else {})


def from_items(items: Mapping[str, Any], like: TrainState) -> TrainState:
    """Inverse of ``to_items`` for a state of the structure of ``like``."""
    params, train = trees.flatten(items["params"]), items["train"]
    kept = params | {f"{REFERENCE}{name}": leaf for name, leaf in trees.flatten(train.get("reference", {})).items()}
    average = trees.flatten(items.get("average", {}))
    return TrainState(
        params={name: params[name] for name in like.params},
        frozen={name: kept[name] for name in like.frozen},
        opt_state=trees.from_named_leaves(like.opt_state, trees.flatten(train["optimizer"])),
        step=train["step"],
        key=train["key"],
        average={name: average[name] for name in like.average},
    )
