"""Optimisers, schedules, and which parameters they touch.

Parameters are a flat dict of names (``model/groups/runs/0/mlp/up_proj/weight``). Selection is by glob patterns over names,
and every selection has to say something about every parameter: what nobody decided is an error, not a default.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.model.apart import own_program, runs_apart
from gemma4_jax.train.sharding import logical_axes

Schedule = Callable[[jax.Array], jax.Array]

# Which parameters decay, first match wins: matrices do, vectors and tables of positions do not.
WEIGHT_DECAY: tuple[tuple[str, bool], ...] = (
    ("*norm*/weight", False),
    ("*_ln?/weight", False),
    ("*/bias", False),
    ("*/pos_embedding*", False),
    ("*/embedder/table", True),
    ("*/lora/[ab]", True),
    ("*_proj/weight", True),
    ("*_projection/weight", True),
    ("*/patch_dense/weight", True),
)

# What ``muon`` orthogonalises: the matrices between hidden states. Tables, vectors and all the rest are left to adamw.
HIDDEN_MATRICES: tuple[str, ...] = ("*/self_attn/*_proj/weight", "*/mlp/*_proj/weight")

MOMENT_DTYPES = ("float32", "bfloat16")
_MUON_RMS = 0.2  # of an update before the learning rate: about AdamW's, so that one learning rate serves both


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Fields of ``config.optimizer``.

    name: ``adamw``; ``adafactor``, whose second moments are rows and columns and whose steps are relative to each matrix's
    size; ``muon`` for the matrices of ``HIDDEN_MATRICES``, with adamw for everything else at the same learning rate.
    learning_rate is the peak, reached after warmup_steps; the schedule then falls to final_fraction of it (``cosine``: over
    the rest, ``wsd``: linearly over the last decay_fraction of the steps, ``constant``: never). weight_decay is multiplied by
    the learning rate. b1, b2, eps: of adamw. momentum: of muon. mu_dtype: of the first moment of adamw and muon; all else is
    f32. clip_norm 0: no clipping. lr_multipliers: pairs of a glob pattern over parameter names and a factor of the learning
    rate; the last match decides, and unless there are none at all every trained parameter needs one.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    mu_dtype: str = "float32"
    clip_norm: float = 1.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        for field, choices in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("mu_dtype", MOMENT_DTYPES)):
            if getattr(self, field) not in choices:
                raise unknown_name(f"optimizer.{field}", getattr(self, field), choices)
        for field in ("learning_rate", "warmup_steps", "weight_decay", "eps", "clip_norm"):
            if getattr(self, field) < 0:
                raise ConfigError(f"optimizer.{field} is {getattr(self, field)}; it must not be negative")
        for field in ("b1", "b2", "momentum", "final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"optimizer.{field} is {getattr(self, field)}; it must be in [0, 1]")


def _cosine(progress, _):
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def _wsd(progress, config):
    return jnp.clip((1.0 - progress) / max(config.decay_fraction, 1e-9), 0.0, 1.0)


def _constant(progress, _):
    return jnp.ones_like(progress)


SCHEDULES: dict[str, Callable] = {"cosine": _cosine, "wsd": _wsd, "constant": _constant}


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate of step 0…steps-1: linear warm-up (already non-zero at step 0), then the configured shape.

    Raises:
      ConfigError: the warm-up is longer than the run.
    """
    if config.warmup_steps > steps:
        raise ConfigError(f"optimizer.warmup_steps {config.warmup_steps} is more than train.steps {steps}")
    warmup, shape = config.warmup_steps, SCHEDULES[config.schedule]

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1.0) / max(warmup, 1), 1.0)
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        fall = config.final_fraction + (1.0 - config.final_fraction) * shape(progress, config)
        return config.learning_rate * rise * fall

    return schedule


def _adamw(config: OptimizerConfig, schedule: Schedule, decay: Mapping[str, bool]):
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype),
        *_decayed_and_scaled(config, schedule, decay),
    )


def _adafactor(config: OptimizerConfig, schedule: Schedule, decay: Mapping[str, bool]):
    return optax.chain(
        per_matrix(
            optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            ),
            {name: len(logical_axes(name)) for name in decay},
        ),
        *_decayed_and_scaled(config, schedule, decay),
    )


def _muon(config: OptimizerConfig, schedule: Schedule, decay: Mapping[str, bool]):
    # Weights are (out, in) whatever stands in front of them: optax takes further axes as so many matrices.
    axes = contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    hidden = {name for name in decay if any(fnmatch.fnmatchcase(name, pattern) for pattern in HIDDEN_MATRICES)}
    orthogonal = optax.chain(
        contrib.scale_by_muon(
            beta=config.momentum,
            mu_dtype=config.mu_dtype,
            weight_dimension_numbers=lambda updates: _axes(updates, axes),
        ),
        optax.stateless_with_tree_map(lambda update, _: _MUON_RMS * max(update.shape[-2:]) ** 0.5 * update),
        *_decayed_and_scaled(config, schedule, decay),
    )
    parts = {"muon": orthogonal, "adamw": _adamw(config, schedule, decay)}
    return optax.partition(parts, lambda tree: {name: "muon" if name in hidden else "adamw" for name in tree})


def _axes(updates, axes):
    """One ``axes`` for each leaf, and the mask for what belongs to another optimiser."""
    return {name: leaf if isinstance(leaf, optax.MaskedNode) else axes for name, leaf in updates.items()}


def _decayed_and_scaled(config: OptimizerConfig, schedule: Schedule, decay: Mapping[str, bool]):
    def decays(params):
        return {name: leaf if isinstance(leaf, optax.MaskedNode) else decay[name] for name, leaf in params.items()}

    return optax.add_decayed_weights(config.weight_decay, mask=decays), optax.scale_by_learning_rate(schedule)


def per_matrix(transform: optax.GradientTransformation, ranks: Mapping[str, int]) -> optax.GradientTransformation:
    """A transformation of single weights, applied to each layer of stacked ones by itself.

    Args:
      transform: acts on one weight at a time, such as one that divides by a norm of the whole weight.
      ranks: by parameter name, the dimensions of one weight; those in front of them are layers.
    """

    def mapped(function, name, leaf):
        for _ in range(leaf.ndim - ranks[name]):
            function = jax.vmap(function)
        return function

    def start(params):
        return {name: mapped(transform.init, name, leaf)(leaf) for name, leaf in params.items()}

    def change(updates, state, params):
        done = {
            name: mapped(transform.update, name, leaf)(leaf, state[name], params[name])
            for name, leaf in updates.items()
        }
        return {name: update for name, (update, _) in done.items()}, {name: new for name, (_, new) in done.items()}

    return optax.GradientTransformation(start, change)


OPTIMIZERS: dict[str, Callable] = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}


class Optimizer(NamedTuple):
    """What ``init`` and ``update`` take.

    transform: what happens to each parameter's f32 gradient, whatever happens to the others: for flat dicts with some or all
    of the parameter names. clip_norm: of all gradients together; 0: none. masks: bool over the leading axes of those stacked
    weights of which only some layers train; the others have no gradient and do not move, nor decay.
    """

    transform: optax.GradientTransformation
    clip_norm: float
    masks: Mapping[str, np.ndarray]


def make_optimizer(
    config: OptimizerConfig, schedule: Schedule, names: Iterable[str], masks: Mapping[str, np.ndarray] | None = None
) -> Optimizer:
    """The optimiser for exactly these parameter names."""
    names = list(names)
    decay = decay_mask(names)
    transforms = [OPTIMIZERS[config.name](config, schedule, decay)]
    if config.lr_multipliers:
        factors = lr_factors(names, config.lr_multipliers)
        scale = optax.stateless(lambda updates, _: {name: factors[name] * leaf for name, leaf in updates.items()})
        transforms.append(scale)
    return Optimizer(optax.chain(*transforms), config.clip_norm, masks or {})


def decay_mask(names: Iterable[str], rules: Sequence[tuple[str, bool]] = WEIGHT_DECAY) -> dict[str, bool]:
    """Which parameters decay. Raises ConfigError naming a parameter that no rule covers."""
    mask = {}
    for name in names:
        decision = next((decays for pattern, decays in rules if fnmatch.fnmatchcase(name, pattern)), None)
        if decision is None:
            raise ConfigError(f"no weight-decay rule covers parameter {name}; add one to WEIGHT_DECAY")
        mask[name] = decision
    return mask


def lr_factors(names: Sequence[str], multipliers: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Factor of the learning rate of each parameter; the last matching pattern decides.

    Raises:
      ConfigError: something else than pairs of a pattern and a factor, a pattern that matches nothing, or a parameter that
        none matches.
    """
    factors: dict[str, float] = {}
    for entry in multipliers:
        if isinstance(entry, str) or len(entry) != 2 or not isinstance(entry[1], (int, float)) or entry[1] < 0:
            raise ConfigError(
                f"optimizer.lr_multipliers has {entry!r}; it takes pairs (pattern, factor), factor at least 0"
            )
        pattern, factor = entry
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ConfigError(
                f"optimizer.lr_multipliers: pattern {pattern!r} matches none of the {len(names)} trained parameters"
            )
        factors.update(dict.fromkeys(matches, float(factor)))
    left = [name for name in names if name not in factors]
    if left:
        raise ConfigError(f"optimizer.lr_multipliers says nothing about {left[0]} and {len(left) - 1} more; "
                          f"begin with ('*', 1.0) to leave the rest as it is")  # fmt: skip
    return factors


def select(
    names: Sequence[str] | Mapping[str, Sequence[str]], patterns: Sequence[str], field: str = "train.trainable"
) -> set[str]:
    """Parameters chosen by glob patterns; ``!pattern`` excludes; the last matching pattern decides.

    Args:
      names: of the parameters; a mapping gives further names that patterns may mean by.

    Raises:
      ConfigError: a pattern that matches nothing, or a parameter about which no pattern says anything.
    """
    spellings = names if isinstance(names, Mapping) else {name: (name,) for name in names}
    decision: dict[str, bool] = {}
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        matches = [name for name, texts in spellings.items() if any(fnmatch.fnmatchcase(t, bare) for t in texts)]
        if not matches:
            raise ConfigError(f"{field}: pattern {pattern!r} matches none of the {len(names)} parameters")
        decision.update(dict.fromkeys(matches, not pattern.startswith("!")))
    undecided = [name for name in names if name not in decision]
    if undecided:
        raise ConfigError(f"{field} says nothing about {undecided[0]} and {len(undecided) - 1} more; "
                          f"add a pattern, or '!*' first to leave out the rest")  # fmt: skip
    return {name for name, chosen in decision.items() if chosen}


def init(optimizer: Optimizer, params: Mapping[str, jax.Array]):
    """Optimiser state with f32 moments, whatever the dtype of the parameters."""
    return optimizer.transform.init(_float32(params))


def update(optimizer: Optimizer, grads, state, params: Mapping[str, jax.Array], loss: jax.Array):
    """One update in f32, stored in the parameters' dtypes.

    On one CPU device a few parameters at a time: XLA would make the clipped gradients and the updates of all of them before
    it added the first.

    Args:
      loss: f32 (), computed from ``params``: read before they are written.

    Returns:
      params, state, and f32 scalars: ``gradient_norm`` (before clipping), ``update_ratio`` (norm of the update over that of
      the parameters).
    """
    grads = _cut(grads, optimizer.masks)
    norm = optax.tree.norm(_float32(grads))
    factor = jnp.float32(1.0)
    if optimizer.clip_norm > 0:
        factor = jnp.where(norm < optimizer.clip_norm, factor, optimizer.clip_norm / norm)
    change = functools.partial(_update_some, optimizer)
    parts, run = [list(params)], change
    if runs_apart():
        parts, run = _parts(params), functools.partial(own_program, change)
    done = [
        run(
            *({name: tree[name] for name in names} for tree in (grads, params)),
            _state_of(names, state, params),
            factor,
            loss,
        )
        for names in parts
    ]
    changes, sizes = (jnp.sqrt(sum(found[key] for *_, found in done)) for key in ("change", "size"))
    params = {name: leaf for some, *_ in done for name, leaf in some.items()}
    metrics = {"gradient_norm": norm, "update_ratio": changes / jnp.maximum(sizes, 1e-30)}
    return params, _merged([state for _, state, _ in done]), metrics


def _update_some(optimizer: Optimizer, grads, params, state, factor: jax.Array, loss: jax.Array):
    """New parameters and state of some parameters, and the squared norms ``change`` and ``size``."""
    master = _float32(params)
    scaled = {name: factor * leaf for name, leaf in _float32(grads).items()}
    updates, state = optimizer.transform.update(scaled, state, master)
    updates = _cut(updates, optimizer.masks)
    squares = {name: (jnp.sum(jnp.square(updates[name])), jnp.sum(jnp.square(master[name]))) for name in params}

    def add(name):
        # What is written over the old weights has to depend on all that is read from them: else the compiler keeps a copy
        # of every weight through the whole step.
        read = _known(loss) & _known(squares[name][0]) & _known(squares[name][1])
        return jnp.where(read, master[name] + updates[name], 0.0).astype(params[name].dtype)

    change, size = (sum(terms, jnp.float32(0)) for terms in zip(*squares.values(), strict=True))
    return {name: add(name) for name in params}, state, {"change": change, "size": size}


def _parts(params: Mapping[str, jax.Array]) -> list[list[str]]:
    """Names in order, as many at a time as together have the size of the largest parameter."""
    largest = max(leaf.size for leaf in params.values())
    parts: list[list[str]] = []
    room = 0
    for name, leaf in params.items():
        if leaf.size > room:
            parts.append([])
            room = largest
        parts[-1].append(name)
        room -= leaf.size
    return parts


def _state_of(names: Sequence[str], state, params: Mapping[str, jax.Array]):
    """The state of some parameters: dicts by name lose the others."""
    if isinstance(state, dict):
        return {key: _state_of(names, node, params) for key, node in state.items() if key in names or key not in params}
    if isinstance(state, tuple):
        return _like(state, [_state_of(names, node, params) for node in state])
    return state


def _merged(states: Sequence):
    """The state of all parameters from those of some; what belongs to none (a count of steps) is the same in all."""
    first = states[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for state in states for key in state)
        return {key: _merged([state[key] for state in states if key in state]) for key in keys}
    if isinstance(first, tuple):
        return _like(first, [_merged(nodes) for nodes in zip(*states, strict=True)])
    return first


def _like(node: tuple, parts: list) -> tuple:
    return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)


def _cut(tree: Mapping[str, jax.Array], masks: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Zero where layers do not train."""
    return {
        name: leaf * masks[name].reshape(masks[name].shape + (1,) * (leaf.ndim - masks[name].ndim)) if name in masks else leaf
        for name, leaf in tree.items()
    }  # fmt: skip


def _known(x: jax.Array) -> jax.Array:
    """True for every number, NaN too; the compiler does not see that."""
    return (x < 0) | (x >= 0) | jnp.isnan(x)


def average(average: Mapping[str, jax.Array], params: Mapping[str, jax.Array], decay: float, step: jax.Array):
    """The moving average (f32 by name) after update number ``step`` (from 0); early ones count for more.

    The decay is ``min(decay, (1 + step) / (10 + step))``, so that the initial weights are soon forgotten.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return {name: keep * leaf + (1.0 - keep) * params[name].astype(jnp.float32) for name, leaf in average.items()}


def _float32(tree):
    return {name: leaf.astype(jnp.float32) for name, leaf in tree.items()}
