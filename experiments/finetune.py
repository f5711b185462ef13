"""Go on training a loaded model: data, trainer, the same loop, final numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

import gemma4_jax as g4
from experiments import ask, report
from experiments.pretrain import training_results
from gemma4_jax.bundle import TEMPLATE, bundle_weights, load_config, merge_lora
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.evaluate.html_report import write_report
from gemma4_jax.preference import REWARDS
from gemma4_jax.train import checkpoints, defaults
from gemma4_jax.train.feed import Feed
from gemma4_jax.train.loop import train
from gemma4_jax.train.memory_plan import plan_devices
from gemma4_jax.train.sharding import MeshConfig, make_mesh
from gemma4_jax.train.tables import trainable_table


def plan(config) -> str:
    """Sizes of the run and what trains, for ``--dry_run``; media that the data may have are left out."""
    base = config.base
    try:
        model = load_config(base.checkpoint, base.drafter or None)
    except CheckpointError as error:
        return f"no plan without the base model: {error}"
    quantization = base.quantization or model.quantization
    model = dataclasses.replace(model, dtype=base.dtype, param_dtype=base.dtype, quantization=quantization)
    if base.merge_adapters:
        model = dataclasses.replace(model, lora=None)
    model = defaults.adapted(defaults.override(model, config), config)
    devices = plan_devices(MeshConfig(**config.mesh))
    return defaults.describe(config, model, defaults.make_trainer(config, model, devices=devices))


def run(config, workdir: Path) -> dict[str, Any]:
    """Train from ``config.base``; returns the flat final numbers.

    Raises:
      ConfigError: a base without a tokenizer, or sections that contradict it.
    """
    base, answers = config.base, ask.check(config)
    bundle = g4.load(
        base.checkpoint, drafter=base.drafter or None, dtype=base.dtype, quantization=base.quantization or None
    )
    if base.merge_adapters:
        bundle = merge_lora(bundle)
    if bundle.tokenizer is None and not config.data.tokenizer:
        raise ConfigError(f"base.checkpoint {base.checkpoint!r} has no tokenizer.json; set config.data.tokenizer")
    model = defaults.adapted(defaults.override(bundle.config, config), config)
    data = {**config.data, "tokenizer": config.data.tokenizer or _tokenizer_of(base)}
    feed = Feed(data, workdir, model, make_mesh(MeshConfig(**config.mesh)))
    trainer = defaults.make_trainer(config, model, media_kinds=feed.train.media_kinds)
    if jax.process_index() == 0:
        print(trainable_table(trainer.network.shapes, trainer.names, trainer.masks), flush=True)
    files = {**_files_of(bundle), **feed.files(defaults.model_json(model))}
    weights = bundle_weights(bundle)
    del bundle  # its arrays are moved into the training state
    result = train(trainer, feed, workdir, files=files, given=weights)
    results = training_results(trainer, config, result, feed)
    if config.loss.name == "dpo":
        results |= {name: result.evaluation[name] for name in ("preference_loss", *REWARDS)}
    if answers.ask:
        results |= ask.answer_results(config, workdir, answers)
    write_report(workdir, results, report.media_examples(feed))
    return results


def _files_of(bundle) -> dict[str, str]:
    """What a checkpoint of the run keeps of its base: the chat template, and how media are prepared."""
    files = {"processor_config.json": bundle.processor.options.to_json()}
    return files | ({TEMPLATE: bundle.chat_template} if bundle.chat_template else {})


def _tokenizer_of(base) -> str:
    folder = Path(base.checkpoint)
    return str(folder if (folder / "tokenizer.json").is_file() else checkpoints.newest(folder))
