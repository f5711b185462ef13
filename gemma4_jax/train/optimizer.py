"""Optimisers, schedules, and which parameters they touch.

Parameters are a flat dict of names (``model/groups/layers/0/mlp/up_proj/weight``). Selection is by glob patterns over names,
and every selection has to say something about every parameter: what nobody decided is an error, not a default.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import ConfigError

Schedule = Callable[[jax.Array], jax.Array]

# Which parameters decay, first match wins: matrices do, vectors and tables of positions do not.
WEIGHT_DECAY: tuple[tuple[str, bool], ...] = (
    ("*norm*/weight", False),
    ("*_ln?/weight", False),
    ("*/bias", False),
    ("*/pos_embedding*", False),
    ("*/embedder/table", True),
    ("*_proj/weight", True),
    ("*_projection/weight", True),
    ("*/patch_dense/weight", True),
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Fields of ``config.optimizer``.

    learning_rate is the peak, reached after warmup_steps; the schedule then falls to final_fraction of it (``cosine``: over
    the rest, ``wsd``: linearly over the last decay_fraction of the steps, ``constant``: never). clip_norm 0: no clipping.
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
    clip_norm: float = 1.0

    def __post_init__(self):
        for field, choices in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, field) not in choices:
                raise unknown_name(f"optimizer.{field}", getattr(self, field), choices)
        for field in ("learning_rate", "warmup_steps", "weight_decay", "eps", "clip_norm"):
            if getattr(self, field) < 0:
                raise ConfigError(f"optimizer.{field} is {getattr(self, field)}; it must not be negative")
        for field in ("b1", "b2", "final_fraction", "decay_fraction"):
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
    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=dict(decay)
    )


OPTIMIZERS: dict[str, Callable] = {"adamw": _adamw}


def make_optimizer(config: OptimizerConfig, schedule: Schedule, names: Iterable[str]) -> optax.GradientTransformation:
    """The optax chain for f32 flat dicts with exactly these parameter names (use ``init`` and ``update`` below)."""
    decay = decay_mask(names)
    transforms = [OPTIMIZERS[config.name](config, schedule, decay)]
    if config.clip_norm > 0:
        transforms.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*transforms)


def decay_mask(names: Iterable[str], rules: Sequence[tuple[str, bool]] = WEIGHT_DECAY) -> dict[str, bool]:
    """Which parameters decay. Raises ConfigError naming a parameter that no rule covers."""
    mask = {}
    for name in names:
        decision = next((decays for pattern, decays in rules if fnmatch.fnmatchcase(name, pattern)), None)
        if decision is None:
            raise ConfigError(f"no weight-decay rule covers parameter {name}; add one to WEIGHT_DECAY")
        mask[name] = decision
    return mask


def select(names: Sequence[str], patterns: Sequence[str], field: str = "train.trainable") -> set[str]:
    """Parameters chosen by glob patterns; ``!pattern`` excludes; the last matching pattern decides.

    Raises:
      ConfigError: a pattern that matches nothing, or a parameter about which no pattern says anything.
    """
    decision: dict[str, bool] = {}
    for pattern in patterns:
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern.removeprefix("!"))]
        if not matches:
            raise ConfigError(f"{field}: pattern {pattern!r} matches none of the {len(names)} parameters")
        decision.update(dict.fromkeys(matches, not pattern.startswith("!")))
    undecided = [name for name in names if name not in decision]
    if undecided:
        raise ConfigError(f"{field} says nothing about {undecided[0]} and {len(undecided) - 1} more; "
                          f"add a pattern, or '!*' first to leave out the rest")  # fmt: skip
    return {name for name, chosen in decision.items() if chosen}


def init(optimizer: optax.GradientTransformation, params: Mapping[str, jax.Array]):
    """Optimiser state with f32 moments, whatever the dtype of the parameters."""
    return optimizer.init(_float32(params))


def update(optimizer: optax.GradientTransformation, grads, state, params: Mapping[str, jax.Array]):
    """One update in f32, stored in the parameters' dtypes. Returns (params, state)."""
    master = _float32(params)
    updates, state = optimizer.update(_float32(grads), state, master)
    return {name: (master[name] + updates[name]).astype(params[name].dtype) for name in params}, state


def _float32(tree):
    return {name: leaf.astype(jnp.float32) for name, leaf in tree.items()}
