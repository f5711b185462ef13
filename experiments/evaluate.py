"""Measure a bundle: likelihood and acceptance by kind of text, needles, media tasks, tasks of lm-eval."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gemma4_jax as g4
from gemma4_jax.data import DataOptions
from gemma4_jax.data.sources import open_source
from gemma4_jax.errors import ConfigError
from gemma4_jax.evaluate import Scorer, decoding_acceptance, needle_scores, teacher_forced_acceptance, text_loss
from gemma4_jax.evaluate import options as fields
from gemma4_jax.evaluate.html_report import write_report
from gemma4_jax.evaluate.texts import read_texts, spread_prompts
from gemma4_jax.sample.answers import score_answers
from gemma4_jax.train import plots
from gemma4_jax.train.checkpoints import write_atomically

Results = dict[str, Any]


def run(config, workdir: Path) -> Results:
    """Measure ``config.bundle`` in every part that is not empty; returns flat numbers, writes ``table.md`` and plots.

    Raises:
      ConfigError: nothing to measure, a part that the bundle cannot serve, or a field out of range.
    """
    text, acceptance = fields.TextOptions(**config.text), fields.AcceptanceOptions(**config.acceptance)
    needle, media = fields.NeedleOptions(**config.needle), fields.MediaTaskOptions(**config.media)
    harness = fields.HarnessOptions(**config.harness)
    if harness.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("harness.tasks needs lm-eval; install the extra: gemma4_jax[eval]")
    given = config.bundle
    bundle = g4.load(
        given.checkpoint,
        drafter=given.drafter or None,
        dtype=given.dtype or None,
        quantization=given.quantization or None,
    )
    if bundle.tokenizer is None:
        raise ConfigError(f"bundle.checkpoint {given.checkpoint!r} has no tokenizer.json: texts need one")
    results: Results = {}
    if text.sources:
        texts = read_texts(text.sources, config.data, split=text.split, characters=text.characters)
        results |= _text_losses(bundle, texts, text) if text.loss else {}
        if acceptance.steps and bundle.drafter is not None:
            results |= _acceptances(bundle, texts, text, acceptance, workdir)
        if needle.lengths:
            results |= _needles(bundle, next(iter(texts.values())), needle, workdir)
    for task in media.tasks:
        results |= _media_task(bundle, task, media, DataOptions.of(config.data))
    if harness.tasks:
        run_tasks = importlib.import_module("gemma4_jax.evaluate.harness").run_tasks
        results |= run_tasks(
            bundle, harness.tasks, include_path=harness.include_path, limit=harness.limit or None,
            num_fewshot=None if harness.num_fewshot < 0 else harness.num_fewshot, batch_size=harness.batch_size,
            max_length=harness.max_length or None,
        )  # fmt: skip
    if not results:
        raise ConfigError("nothing to evaluate: text.sources, media.tasks and harness.tasks are empty")
    write_atomically(workdir / "table.md", table(results))
    write_report(workdir, results)
    return results


def _text_losses(bundle, texts: Mapping[str, list[str]], options: fields.TextOptions) -> Results:
    scorer, results = Scorer(bundle, batch_size=options.batch_size), {}
    for kind, pieces in texts.items():
        loss = text_loss(scorer, bundle.tokenizer, pieces, window=options.window, stride=options.stride)
        results |= {
            f"{kind}_bits_per_byte": loss.bits_per_byte,
            f"{kind}_perplexity": loss.perplexity,
            f"{kind}_tokens": loss.tokens,
            f"{kind}_bytes": loss.bytes,
        }
    return results


def _acceptances(bundle, texts, text: fields.TextOptions, options: fields.AcceptanceOptions, workdir: Path) -> Results:
    """Acceptance of each kind of text per draft step; ``plots/acceptance_WAY.png`` has a line a kind."""
    found: dict[str, dict[str, Any]] = {}
    sampler = g4.Sampler(bundle, options.prompt_tokens + options.new_tokens, draft_tokens=options.steps)
    for kind, pieces in texts.items():
        window, rows = text.window, text.batch_size
        forced = teacher_forced_acceptance(bundle, pieces, steps=options.steps, window=window, batch_size=rows)
        found.setdefault("teacher_forced", {})[kind] = forced
        prompts = spread_prompts(bundle.tokenizer, pieces, options.prompts, options.prompt_tokens)
        for temperature in options.temperatures if prompts else ():
            drafted, _ = decoding_acceptance(sampler, prompts, new_tokens=options.new_tokens, temperature=temperature)
            found.setdefault(f"decoding_{temperature:g}", {})[kind] = drafted
    results: Results = {}
    for way, kinds in found.items():
        lines = {kind: [list(enumerate(part.per_step, start=1))] for kind, part in kinds.items()}
        title = f"Kept drafts, {way.replace('_', ' ')}"
        plots.bands(workdir / "plots" / f"acceptance_{way}.png", lines, title, "draft step", "acceptance")
        for kind, part in kinds.items():
            results |= {f"{kind}_acceptance_{way}_{j}": share for j, share in lines[kind][0]}
            results[f"{kind}_tokens_per_round_{way}"] = part.tokens_per_round
            if part.sampled is not None:
                results[f"{kind}_acceptance_sampled_{way}_1"] = part.sampled
    return results


def _needles(bundle, pieces: list[str], options: fields.NeedleOptions, workdir: Path) -> Results:
    """``needle_LENGTH_DEPTH_found`` and ``…_gain``; ``plots/needle.png`` has a line a depth."""
    filler = [index for piece in pieces for index in bundle.tokenizer.encode(piece, bos=False)]
    sampler = g4.Sampler(bundle, max(options.lengths) + 32, draft_tokens=0)
    scores = needle_scores(
        sampler, filler, lengths=options.lengths, depths=options.depths, trials=options.trials,
        scorer=Scorer(bundle, batch_size=2) if options.likelihood else None,
    )  # fmt: skip
    results: Results = {}
    for score in scores:
        name = f"needle_{score.length}_{score.depth:g}"
        results[f"{name}_found"] = score.found
        if score.gain is not None:
            results[f"{name}_gain"] = score.gain
    for quantity, label in (("found", "share of answers found"), ("gain", "nats a token that the fact adds")):
        lines = {
            f"depth {depth:g}": [[(s.length, getattr(s, quantity)) for s in scores if s.depth == depth]]
            for depth in options.depths
            if options.likelihood or quantity == "found"
        }
        path = workdir / "plots" / f"needle_{quantity}.png"
        plots.bands(path, lines, "Needle in a haystack", "tokens of context", label)
    return results


def _media_task(bundle, task: str, options: fields.MediaTaskOptions, data: DataOptions) -> Results:
    source = open_source(task, "heldout", data)
    sampler = g4.Sampler(bundle, min(bundle.config.max_position_embeddings, options.max_length))
    name, results = task.partition(":")[0], {}
    for blind in (False, True) if options.blind else (False,):
        score = score_answers(
            sampler, source, options.count or None, batch_size=options.batch_size,
            max_new_tokens=options.new_tokens, blind=blind, field=data.field or "messages",
        )  # fmt: skip
        prefix = f"{name}_blind" if blind else name
        results |= {f"{prefix}_exact": score.exact, f"{prefix}_characters": score.characters}
    return results | {f"{name}_count": score.count}


def table(results: Results) -> str:
    """The results as a Markdown table."""
    rows = "".join(f"| {name} | {value:.4g} |\n" if isinstance(value, float) else f"| {name} | {value:,} |\n"
                   for name, value in results.items())  # fmt: skip
    return f"| quantity | value |\n| --- | --- |\n{rows}"
