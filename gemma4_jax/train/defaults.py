"""The sections of a training run's config, their defaults, and what is built from them.

Every section is the fields of one dataclass, so names, defaults and limits stand in one place each; config files start
from ``training_config`` and change fields.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

from gemma4_jax.config import LoraConfig, ModelConfig, get_preset
from gemma4_jax.data import DataOptions, data_defaults
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import memory_plan, trees
from gemma4_jax.train.distributed import DistributedConfig
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.sharding import MeshConfig
from gemma4_jax.train.tables import trainable_table
from gemma4_jax.train.trainer import Trainer, TrainOptions

DERIVED = ("vocab_shards",)  # fields of LossConfig that follow from the mesh


def training_config(experiment: str) -> ConfigDict:
    """All sections with their defaults, locked; config files change the fields they are about.

    Sections: ``experiment``, ``seed``, ``model`` (a preset), ``model_overrides`` (fields of ModelConfig, those of its parts
    in sections of their own), ``data``, ``loss``, ``optimizer``, ``train``, ``mesh``, ``distributed``, ``samples`` (held-out
    prompts continued at the end, by the weights in each of ``dtypes``; 0 prompts: none).
    """
    loss = {name: value for name, value in dataclasses.asdict(LossConfig()).items() if name not in DERIVED}
    config = ConfigDict(
        {
            "experiment": experiment,
            "seed": 0,
            "model": "tiny",
            "model_overrides": {},
            "data": data_defaults(),
            "loss": loss,
            "optimizer": dataclasses.asdict(OptimizerConfig()),
            "train": dataclasses.asdict(TrainOptions()),
            "mesh": dataclasses.asdict(MeshConfig()),
            "distributed": dataclasses.asdict(DistributedConfig()),
            "samples": {
                "prompts": 0,
                "prompt_tokens": 32,
                "new_tokens": 128,
                "draft_tokens": 3,
                "dtypes": ("float32", "bfloat16"),
            },
        }
    )
    return config.lock()


def override_model(config: ConfigDict, **fields: Any) -> None:
    """Set fields of ``config.model_overrides`` (nested dicts for ``drafter``, ``vision``, ``audio``)."""
    with config.model_overrides.unlocked():
        config.model_overrides.update(ConfigDict(fields))


def model_config(config: ConfigDict) -> ModelConfig:
    """The model of a run. Raises ConfigError for an unknown preset or field, or a contradiction with ``data``."""
    model = get_preset(config.model, **_overrides(config))
    data = DataOptions.of(config.data)
    if not data.tokenizer and data.vocab_size != model.vocab_size:
        raise ConfigError(
            f"data.vocab_size {data.vocab_size} differs from the model's vocab_size {model.vocab_size}; "
            f"set config.model_overrides.vocab_size={data.vocab_size}"
        )
    _check_length(data, model)
    return model


def override(model: ModelConfig, config: ConfigDict) -> ModelConfig:
    """A loaded model's configuration with the run's ``model_overrides``. Raises ConfigError as ``model_config``."""
    values = model.to_dict()
    for name, value in _overrides(config).items():
        part, _, field = name.partition(".")
        values[part] = {**(values[part] or {}), field: value} if field else value
    model = ModelConfig.from_dict(values)
    _check_length(DataOptions.of(config.data), model)
    return model


def lora_defaults() -> dict[str, Any]:
    """Fields of a ``lora`` section with their defaults; its rank 0 means no adapters."""
    return {**dataclasses.asdict(LoraConfig()), "rank": 0}


def adapted(model: ModelConfig, config: ConfigDict) -> ModelConfig:
    """A loaded model's configuration with the adapters of the run's ``lora`` section.

    Raises:
      ConfigError: the model has adapters already, and not these.
    """
    lora = LoraConfig(**config.lora) if config.lora.rank else None
    if model.lora is not None and model.lora != lora:
        raise ConfigError(
            f"the base model has adapters of rank {model.lora.rank}, but lora.rank is {config.lora.rank}; give the lora "
            f"section of its own run, or set base.merge_adapters=True"
        )
    return dataclasses.replace(model, lora=lora)


def _overrides(config: ConfigDict) -> dict[str, Any]:
    flat = trees.flatten(config.model_overrides.to_dict()) if config.model_overrides else {}
    return {name.replace(trees.SEPARATOR, "."): value for name, value in flat.items()}


def _check_length(data: DataOptions, model: ModelConfig) -> None:
    if data.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len {data.seq_len} is more than the model's max_position_embeddings {model.max_position_embeddings}"
        )


def make_trainer(config: ConfigDict, model: ModelConfig, **kwargs: Any) -> Trainer:
    """The Trainer of a run's sections; ``kwargs`` as in ``Trainer`` (``media_kinds``, ``devices``).

    Raises:
      ConfigError: as ``Trainer``, and unless loss ``dpo`` and data format ``preference`` come together.
    """
    if (config.loss.name == "dpo") != (config.data.format == "preference"):
        raise ConfigError(f"loss.name {config.loss.name!r} does not go with data.format {config.data.format!r}: dpo needs "
                          f"preference pairs, and they need dpo")  # fmt: skip
    return Trainer(
        model,
        loss=LossConfig(**config.loss),
        optimizer=OptimizerConfig(**config.optimizer),
        options=TrainOptions(**config.train),
        mesh=MeshConfig(**config.mesh),
        seed=config.seed,
        batch_size=config.data.batch_size,
        **kwargs,
    )


def model_json(model: ModelConfig) -> str:
    """Text of a checkpoint's ``config.json``."""
    return json.dumps(model.to_dict(), indent=2) + "\n"


def describe(config: ConfigDict, model: ModelConfig, trainer: Trainer) -> str:
    """What ``--dry_run`` says about a training run: sizes from the compiled step, without allocating anything."""
    shapes = trainer.network.shapes
    parts = model.parameters_by_part()
    data, limit = config.data, config.train.memory_limit_gb
    plan = memory_plan.measure(trainer, trainer.abstract_batch(data.batch_size, data.seq_len))
    tokens = data.batch_size * data.seq_len
    lines = [
        "parameters: " + ", ".join(f"{name} {size:,}" for name, size in parts.items() if size),
        trainable_table(shapes, trainer.names, trainer.masks),
        "mesh: " + " x ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items()),
        f"tokens: {tokens:,} a step, {tokens * config.train.steps:,} in {config.train.steps:,} steps",
        plan.table(),
        *(memory_plan.advice(plan, limit, config, model.remat) if limit else ()),
    ]
    return "\n".join(lines)
