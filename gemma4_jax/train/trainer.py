"""Everything compiled and placed for one run: network, mesh, optimiser, shardings and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.config import SCHEMES, ModelConfig, unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.memory import give_back_freed_memory
from gemma4_jax.train import optimizer as optimizers
from gemma4_jax.train import sharding
from gemma4_jax.train import state as states
from gemma4_jax.train import step as steps
from gemma4_jax.train.checkpoints import compare

NAN_POLICIES = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Fields of ``config.train``.

    steps: optimiser updates. accumulation: micro-batches of one update. log_every, eval_every, checkpoint_every: in steps
    (0: never; the last step is always evaluated and saved). eval_batches, final_eval_batches: held-out batches of an
    evaluation on the way and of the last one (0: all). keep: newest checkpoints to keep. keep_best: an evaluation's metric,
    whose best checkpoint is kept as well ("": none; the lowest value, of acceptance the highest). ema_decay: keep a moving
    average of the trained weights, which evaluation and ``g4.load`` then use (0: none). nan_policy: at a loss or gradient
    that is not finite ``stop`` with an error, or ``skip`` the update and count it. quantization_aware: a weight format
    as which matrices and tables are rounded wherever they are computed with ("": none); what is saved are the weights
    before it. memory_limit_gb: what ``--dry_run`` compares a device's peak with (0: nothing). trainable: glob
    patterns over parameter names (single layers of the target are ``model/layers/I/…``), ``!pattern`` leaves out, the last
    match decides.
    """

    steps: int = 1000
    accumulation: int = 1
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    final_eval_batches: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    keep_best: str = ""
    ema_decay: float = 0.0
    nan_policy: str = "stop"
    quantization_aware: str = ""
    memory_limit_gb: float = 0.0
    trainable: tuple[str, ...] = ("*",)

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "eval_batches", "final_eval_batches", "checkpoint_every", "memory_limit_gb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.nan_policy not in NAN_POLICIES:
            raise unknown_name("train.nan_policy", self.nan_policy, NAN_POLICIES)
        if self.quantization_aware not in ("", *SCHEMES):
            raise unknown_name("train.quantization_aware", self.quantization_aware, ("", *SCHEMES))
        if self.keep_best and (not self.eval_every or self.checkpoint_every % self.eval_every):
            raise ConfigError(
                f"train.keep_best {self.keep_best!r} needs an evaluation at every checkpoint, but train.checkpoint_every "
                f"{self.checkpoint_every} is not a multiple of train.eval_every {self.eval_every}"
            )


class Trainer:
    """A training run without its data.

    Args:
      model: the model configuration.
      loss, optimizer, options, mesh: sections of the run's config.
      seed: of the weights and of the run's random key.
      batch_size: rows of one update over all processes.
      media_kinds: "vision" and "audio" where batches carry them; embedders of the others are left out of the optimiser.
      devices: None for all.

    Attributes:
      network, mesh, names (trained parameters), masks (layers of stacked ones, where not all train), abstract
      (TrainState of shapes with shardings), train_step, eval_step.

    Raises:
      ConfigError: contradictions between the sections, naming the fields.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        loss: LossConfig,
        optimizer: optimizers.OptimizerConfig,
        options: TrainOptions,
        mesh: sharding.MeshConfig,
        seed: int,
        batch_size: int,
        media_kinds: Collection[str] = (),
        devices: Sequence[Any] | None = None,
    ):
        if loss.uses_drafter and model.drafter is None:
            raise ConfigError(
                f"loss.mtp_steps {loss.mtp_steps} needs a drafter, but the model has drafter None; set loss.mtp_weight=0"
            )
        self.seed, self.options = seed, options
        self.mesh = sharding.make_mesh(mesh, devices)
        sharding.check_batch(batch_size, options.accumulation, self.mesh)
        self.loss = dataclasses.replace(loss, vocab_shards=self.mesh.shape["tensor"])
        self.network = states.Network(model, options.quantization_aware or None)
        self.names = states.trainable_names(self.network, self.loss, options.trainable, media_kinds)
        self.masks = states.layer_masks(self.network, self.names, options.trainable)
        schedule = optimizers.make_schedule(optimizer, options.steps)
        self.optimizer = optimizers.make_optimizer(optimizer, schedule, sorted(self.names), self.masks)

        def create(given):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # draws weights where they live
                return states.create_state(
                    self.network, self.names, self.optimizer, seed, given,
                    averaged=options.ema_decay > 0, referenced=loss.name == "dpo",
                )  # fmt: skip

        shapes = jax.eval_shape(create, {})
        self.shardings = states.state_shardings(shapes, model, self.mesh)
        self.abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, self.shardings
        )
        # Drawing runs once and takes no time; on a CPU compiling it well would take longer than all of it.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        quick = {"xla_backend_optimization_level": 0} if on_cpu else None
        self._create = jax.jit(create, out_shardings=self.shardings, compiler_options=quick, donate_argnums=0)
        self.train_step = steps.make_train_step(
            self.network, self.loss, self.optimizer, schedule,
            accumulation=options.accumulation, mesh=self.mesh, shardings=self.shardings,
            ema_decay=options.ema_decay, skip_bad=options.nan_policy == "skip",
        )  # fmt: skip
        self.eval_step = steps.make_eval_step(self.network, self.loss, mesh=self.mesh, shardings=self.shardings)

    def init(self, given: Mapping[str, jax.Array] | None = None) -> states.TrainState:
        """A state at step 0, each leaf created where it lives.

        Args:
          given: weights to start from, by name (moved, not copied: they cannot be used afterwards); others are drawn.

        Raises:
          CheckpointError: a given weight that the model does not have, or of another shape or dtype.
        """
        given = dict(given or {})
        compare(given, {name: leaf for name, leaf in self.network.shapes.items() if name in given}, "the base model")
        places = {**self.shardings.params, **self.shardings.frozen}
        state = self._create({name: jax.device_put(leaf, places[name]) for name, leaf in given.items()})
        jax.block_until_ready(state)
        give_back_freed_memory()
        return state

    def compile_ahead(self, batch_size: int, seq_len: int) -> None:
        """Compile the step for text batches (B, T) before there is a state.

        The compiler's own memory, a good part of a small model's, is then not held on top of weights and moments.
        """
        self.train_step.lower(self.abstract, self.abstract_batch(batch_size, seq_len)).compile()
        give_back_freed_memory()

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch on the mesh."""
        return sharding.place_batch(batch, self.mesh)

    def abstract_batch(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a text batch (B, T), for lowering without data."""
        place = sharding.batch_sharding(self.mesh)
        kinds = {"tokens": jnp.int32, "loss_mask": jnp.bool_, "segment_ids": jnp.int32, "positions": jnp.int32}
        return {name: jax.ShapeDtypeStruct((batch_size, seq_len), k, sharding=place) for name, k in kinds.items()}
