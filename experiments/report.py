"""What a trained model writes and how fast: the sampling part of ``results.json``, and ``samples.md``."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gemma4_jax as g4
from gemma4_jax.data import heldout_conversations
from gemma4_jax.data.media_rows import MediaChatEncoder
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.evaluate.acceptance import kept_per_step
from gemma4_jax.evaluate.html_report import sample_of, save_samples
from gemma4_jax.media.processor import Row
from gemma4_jax.train.checkpoints import write_atomically


def heldout_prompts(tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """``count`` pieces of ``length`` tokens, bos included, from places spread evenly over a text."""
    pieces, span = [], 8 * length  # characters that surely hold enough tokens of text
    for i in range(count):
        start = max(0, min(i * len(text) // count, len(text) - span))
        line = text.find("\n", start, start + span // 2) + 1  # a line's beginning nearby, if there is one
        pieces.append(tokenizer.encode(text[line or start :][:span])[:length])
    if not pieces or min(map(len, pieces)) < 2:
        raise DataError(f"the held-out text of {len(text)} characters is too short for {count} prompts")
    return pieces


def sampling_results(
    workdir: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draft_tokens: int,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """Plain against speculative decoding, batch 1, greedy, in each dtype; acceptance when sampling at temperature 1.

    Writes ``samples.md`` and ``samples.json`` in ``workdir``, from the first dtype. Rates are medians over prompts, plain
    and speculative runs alternating; compilation is not counted.

    Raises:
      ConfigError: no dtype.
    """
    if not dtypes:
        raise ConfigError("samples.dtypes is empty; give at least one")
    rates: dict[str, float] = {}
    equal, outputs, sampled = True, [], None
    for dtype in dtypes:
        bundle = g4.load(workdir, dtype=dtype)
        length = max(map(len, prompts)) + new_tokens
        plain, drafting = (g4.Sampler(bundle, max_length=length, draft_tokens=k) for k in (0, draft_tokens))
        settings = {"max_new_tokens": new_tokens, "stop_ids": []}
        for sampler in (plain, drafting):
            sampler.generate([prompts[0]], **settings)  # compiles
        pairs = [[s.generate([prompt], **settings) for s in (plain, drafting)] for prompt in prompts]
        for name, side in (("decode", 0), ("speculative", 1)):
            rates[f"{name}_{dtype}"] = statistics.median(pair[side].stats.tokens_per_second for pair in pairs)
        if dtype == dtypes[0]:
            equal = all(a.tokens == b.tokens for a, b in pairs)
            outputs = [b for _, b in pairs]
            sampled = drafting.generate(list(prompts), temperature=1.0, seed=0, **settings).stats
    write_atomically(workdir / "samples.md", samples_markdown(bundle.tokenizer, prompts, outputs))
    pages = zip(prompts, outputs, strict=True)
    save_samples(workdir, [sample_of(bundle.tokenizer, p, o.tokens[0], o.drafted[0]) for p, o in pages])
    best = max(dtypes, key=lambda dtype: rates[f"speculative_{dtype}"])
    return {
        "decode_tokens_per_second": rates[f"decode_{best}"],
        "speculative_tokens_per_second": rates[f"speculative_{best}"],
        "speculative_dtype": best,
        "speedup": rates[f"speculative_{best}"] / rates[f"decode_{best}"],
        "speedup_vs_best_plain": rates[f"speculative_{best}"] / max(rates[f"decode_{dtype}"] for dtype in dtypes),
        **{f"{name}_tokens_per_second": rate for name, rate in rates.items()},
        "speculative_equals_greedy": equal,
        "speculative_compared_tokens": new_tokens * len(prompts),
        "tokens_per_round_greedy": statistics.mean(output.stats.mean_accepted for output in outputs),
        "acceptance_greedy_per_step": kept_per_step([output.stats for output in outputs]),
        "acceptance_sampled": sampled.accepted_per_step[0] / max(sampled.rounds, 1) if draft_tokens else None,
        "acceptance_sampled_per_step": kept_per_step([sampled]),
        "tokens_per_round_sampled": sampled.mean_accepted,
    }


def media_examples(feed, count: int = 3) -> list[tuple[str, Row]]:
    """The first held-out conversations with media: what the model should answer, and the prepared row."""
    if feed.processor is None:
        return []
    field = feed.options.text_field
    encoder, found = MediaChatEncoder(feed.processor, field), []
    for number, document in enumerate(heldout_conversations(feed.options, count)):
        row = encoder.row(document, f"held-out conversation {number}")[0]
        if len(row.patches) or len(row.audio_frames):
            found.append((f"answer: {document[field][-1].get('content')}", row))
    return found


def samples_markdown(tokenizer, prompts: Sequence[Sequence[int]], outputs: Sequence[Any]) -> str:
    """Prompt and continuation of each row; drafted tokens are bold."""
    parts = ["# Samples", "", "Greedy continuations of held-out text. Tokens that the drafter proposed are **bold**."]
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        continuation = _marked(tokenizer, output.tokens[0], output.drafted[0])
        share = sum(output.drafted[0]) / max(len(output.drafted[0]), 1)
        parts += [
            "",
            f"## {number}",
            "",
            "Prompt",
            "",
            f"<pre>{html.escape(tokenizer.decode(prompt, skip_special=True))}</pre>",
        ]
        parts += ["", f"Continuation, {share:.0%} drafted", "", f"<pre>{continuation}</pre>"]
    return "\n".join(parts) + "\n"


def _marked(tokenizer, tokens: Sequence[int], drafted: Sequence[bool]) -> str:
    stream, text = tokenizer.stream(), []
    for token, is_drafted in zip(tokens, drafted, strict=True):
        piece = html.escape(stream.push(token))
        text.append(f"<b>{piece}</b>" if is_drafted and piece else piece)
    return ("".join(text) + html.escape(stream.flush())).replace("</b><b>", "")
