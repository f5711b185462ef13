"""Train from scratch: data, trainer, loop, final numbers, and what the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import report
from gemma4_jax.bundle import with_token_ids
from gemma4_jax.data import compressed_bits_per_byte, heldout_text
from gemma4_jax.errors import ConfigError
from gemma4_jax.evaluate.html_report import write_report
from gemma4_jax.train import defaults
from gemma4_jax.train.checkpoints import list_steps
from gemma4_jax.train.feed import Feed
from gemma4_jax.train.loop import TrainResult, train
from gemma4_jax.train.memory_plan import plan_devices
from gemma4_jax.train.sharding import MeshConfig


def plan(config) -> str:
    """Sizes of the run, for ``--dry_run``."""
    devices = plan_devices(MeshConfig(**config.mesh))
    model = defaults.model_config(config)
    return defaults.describe(config, model, defaults.make_trainer(config, model, devices=devices))


def run(config, workdir: Path) -> dict[str, Any]:
    """Train; returns the flat final numbers."""
    model = defaults.model_config(config)
    trainer = defaults.make_trainer(config, model)
    feed = Feed(config.data, workdir, mesh=trainer.mesh)
    if feed.tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"the tokenizer has {feed.tokenizer.vocab_size} entries but the model {model.vocab_size}")
    if not config.data.tokenizer:  # one that was trained here has the control tokens, at ids of its own
        model = with_token_ids(model, feed.tokenizer)
    if list_steps(workdir / "checkpoints")[-1:] != [config.train.steps]:  # a finished run takes no step
        trainer.compile_ahead(config.data.batch_size, config.data.seq_len)
    result = train(trainer, feed, workdir, files=feed.files(defaults.model_json(model)))
    text = heldout_text(config.data)
    results = training_results(trainer, config, result, feed)
    results["xz_bits_per_byte"] = compressed_bits_per_byte(text)
    if config.samples.prompts:
        samples = config.samples
        draft_tokens = min(samples.draft_tokens, config.loss.mtp_steps) if trainer.loss.uses_drafter else 0
        prompts = report.heldout_prompts(feed.tokenizer, text, samples.prompts, samples.prompt_tokens)
        results |= report.sampling_results(workdir, prompts, samples.new_tokens, draft_tokens, samples.dtypes)
    write_report(workdir, results)
    return results


def training_results(trainer, config, result: TrainResult, feed: Feed) -> dict[str, Any]:
    """The part of ``results.json`` that training knows. ``…_teacher_forced``: on held-out rows, true tokens before each."""
    model, evaluation = trainer.network.config, result.evaluation
    steps = range(1, config.loss.mtp_steps + 1) if trainer.loss.uses_drafter else ()
    return {
        "params": model.num_parameters(),
        "drafter_params": model.num_parameters(drafter=True),
        "train_steps": config.train.steps,
        "train_tokens": int(result.totals.tokens),
        "train_seconds": result.totals.seconds,
        "tokens_per_second": result.totals.tokens_per_second,
        "input_wait_share": result.totals.input_wait_share,
        "packing_efficiency": feed.train.packing_efficiency,
        "empty_steps": int(result.totals.empty_steps),
        "skipped_steps": int(result.totals.skipped_steps),
        "val_loss": evaluation["next_token_loss"],
        "val_bits_per_byte": evaluation["bits_per_byte"],
        "next_token_loss_without_mtp_delta": None,  # needs a second run: see the sweep "mtp"
        "acceptance_per_step": [evaluation[f"acceptance_{j}"] for j in steps],
        "mean_accepted": evaluation.get("mean_accepted"),
        "acceptance_sampled_teacher_forced": evaluation.get("acceptance_sampled_1"),
    }
