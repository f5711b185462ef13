"""Continue prompts, or chat, with a run, a checkpoint or a folder of published weights."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax

import gemma4_jax as g4
from experiments.report import samples_markdown
from gemma4_jax.errors import ConfigError
from gemma4_jax.sample import web
from gemma4_jax.sample.terminal import TerminalChat, chat_settings, open_chat, open_sampler
from gemma4_jax.train import profiling
from gemma4_jax.train.checkpoints import write_atomically


def run(config, workdir: Path) -> dict[str, Any]:
    """Generate for every prompt of ``config.sample``; writes ``samples.md`` and returns what the decoding took.

    A config with a section ``chat`` (configs/chat.py) opens a chat instead: in the terminal, or on a web page when there is a
    section ``web``.

    Raises:
      ConfigError: no prompts, or a folder without a tokenizer.
    """
    if "web" in config:
        return _serve(config)
    if "chat" in config:
        TerminalChat(open_chat(config.chat)).run()
        return {}
    sample = config.sample
    if not sample.prompts:
        raise ConfigError("sample.prompts is empty; give at least one text")
    bundle = g4.load(sample.checkpoint, drafter=sample.drafter or None, dtype=sample.dtype)
    if bundle.tokenizer is None:
        raise ConfigError(f"sample.checkpoint {sample.checkpoint!r} has no tokenizer.json: text prompts need one")
    adaptive = "auto" if sample.draft_tokens is None else sample.draft_tokens
    sampler = g4.Sampler(bundle, max_length=sample.max_length, draft_tokens=adaptive, release=True)
    prompts = [bundle.tokenizer.encode(text) for text in sample.prompts]
    settings = {name: sample[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    if profiling.folder():
        sampler.generate(prompts, **settings)  # compiles, which a trace is not about
    with jax.profiler.trace(str(profiling.folder())) if profiling.folder() else contextlib.nullcontext():
        out = sampler.generate(prompts, **settings)
    rows = [
        dataclasses.replace(out, tokens=[tokens], texts=[text], finish_reasons=[reason], drafted=[drafted])
        for tokens, text, reason, drafted in zip(out.tokens, out.texts, out.finish_reasons, out.drafted, strict=True)
    ]
    write_atomically(workdir / "samples.md", samples_markdown(bundle.tokenizer, prompts, rows))
    stats = out.stats
    return {
        "prompts": len(prompts),
        "new_tokens": sum(map(len, out.tokens)),
        "finish_reasons": out.finish_reasons,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "tokens_per_second": stats.tokens_per_second,
    }


def _serve(config) -> dict[str, Any]:
    """The chat page, until it is interrupted."""
    web.load_gradio()  # before the weights are read
    options = web.WebOptions(**config.web)
    chat = web.WebChat(open_sampler(config.chat), **chat_settings(config.chat))
    page = web.build_page(chat, thinking=config.chat.thinking, compare=options.compare)
    web.serve(page, options, announce=lambda text: print(text, flush=True))
    return {}
