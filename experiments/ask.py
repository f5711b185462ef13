"""Ask a finetuned run its held-out conversations and count right answers: the part of ``results.json`` about a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gemma4_jax as g4
from gemma4_jax.data import DataOptions, heldout_conversations
from gemma4_jax.errors import ConfigError
from gemma4_jax.sample.answers import AnswerOptions, AnswerScore, score_answers
from gemma4_jax.train.checkpoints import write_atomically


def check(config) -> AnswerOptions:
    """The section ``answers``, before anything is trained. Raises ConfigError for rows that are not conversations."""
    options = AnswerOptions(**config.answers)
    if options.ask and config.data.format != "chat":
        raise ConfigError(f"answers.ask needs data.format 'chat', got {config.data.format!r}")
    return options


def answer_results(config, workdir: Path, options: AnswerOptions) -> dict[str, Any]:
    """Ask; writes ``samples.md`` and returns flat numbers: ``answers_…``, and ``blind_answers_…`` with media blanked out.

    ``…_correct``: share of answers right to the letter; ``…_characters``: of their characters, by edit distance;
    ``…_positions``: of characters that are right at their place. With ``data.blind`` all of it is blind already.
    """
    data = DataOptions.of(config.data)
    conversations = heldout_conversations(data, options.count)
    bundle = g4.load(workdir, dtype=config.base.dtype)
    sampler = g4.Sampler(bundle, max_length=data.seq_len + options.max_new_tokens, release=True)
    runs = {"answers": data.blind} | ({"blind_answers": True} if options.blind and not data.blind else {})
    results: dict[str, Any] = {}
    for name, blind in runs.items():
        score = score_answers(
            sampler, conversations, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens,
            blind=blind, field=data.text_field,
        )  # fmt: skip
        if not results:
            write_atomically(workdir / "samples.md", answers_markdown(score))
        results |= {
            f"{name}_asked": score.count,
            f"{name}_correct": score.exact,
            f"{name}_characters": score.characters,
            f"{name}_positions": score.positions,
        }
    return results


def answers_markdown(score: AnswerScore) -> str:
    """How many were right, and the first wrong ones beside what was expected."""
    lines = ["# Answers", "", f"{score.exact:.1%} of {score.count} held-out answers are right."]
    if score.wrong:
        lines += ["", "Wrong ones, the first of them:", "", "| expected | given |", "|---|---|"]
        lines += [f"| {_cell(expected)} | {_cell(given)} |" for expected, given in score.wrong]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return "`" + " ".join(text.replace("|", "\\|").replace("`", "'").split()) + "`"
