"""Needle in a haystack: a fact put somewhere in a long text, and asked for at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gemma4_jax.errors import ConfigError
from gemma4_jax.evaluate.scorer import Scorer

FACT = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nThe secret number of {name} is"
NAMES = ("Alice", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry")


@dataclasses.dataclass(frozen=True)
class Needle:
    """Score of one context length and depth over all trials.

    length: tokens of context, question included. depth: where the fact stands, 0 at the beginning, 1 at the end. found: share
    of answers given exactly, greedily. gain: nats that the fact adds to the answer's log-likelihood, against the same text
    without it, a token (0: the fact is not used); None when likelihoods were not asked for.
    """

    length: int
    depth: float
    found: float
    gain: float | None


def needle_scores(
    sampler,
    filler: Sequence[int],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    scorer: Scorer | None = None,
    seed: int = 0,
) -> list[Needle]:
    """Retrieval at each length and depth.

    Args:
      sampler: of a bundle with a tokenizer; its max_length must hold the longest context and the answer.
      filler: tokens of the text around, repeated when there are too few.
      lengths: of contexts, tokens with bos and question.
      depths: in [0, 1].
      trials: each with a number, a name and a place in the filler of its own.
      scorer: also gives ``gain``; it reads contexts whole, so memory grows with the square of the length.

    Raises:
      ConfigError: no filler, a depth out of range, or a length that does not hold fact and question.
    """
    if not len(filler):
        raise ConfigError("needle: there is no text to hide anything in")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ConfigError(f"needle: depth {depth} is not in [0, 1]")
    return [
        _score(sampler, scorer, list(_trials(sampler.tokenizer, filler, length, depth, trials, seed)), length, depth)
        for length in lengths
        for depth in depths
    ]


@dataclasses.dataclass(frozen=True)
class _Trial:
    """prompt: with the fact. blind: the same length of filler instead of it. answer: ids."""

    prompt: list[int]
    blind: list[int]
    answer: list[int]


def _trials(tokenizer, filler, length: int, depth: float, count: int, seed: int) -> Iterator[_Trial]:
    rng = np.random.default_rng([seed, length, round(depth * 1000)])
    for _ in range(count):
        name, number = str(rng.choice(NAMES)), str(rng.integers(1000, 10_000))
        fact, question = (
            tokenizer.encode(text.format(name=name, number=number), bos=False) for text in (FACT, QUESTION)
        )
        answer = tokenizer.encode(f" {number}.", bos=False)
        room = length - 1 - len(fact) - len(question)
        if room < 0:
            raise ConfigError(
                f"needle: a context of {length} tokens does not hold fact and question ({length - room} tokens)"
            )
        start = int(rng.integers(len(filler)))
        around = np.take(np.asarray(filler), np.arange(start, start + room + len(fact)), mode="wrap").tolist()
        at = round(depth * room)
        prompt = [tokenizer.bos_id, *around[:at], *fact, *around[at:room], *question]
        yield _Trial(prompt, [tokenizer.bos_id, *around, *question], answer)


def _score(sampler, scorer: Scorer | None, trials: list[_Trial], length: int, depth: float) -> Needle:
    longest = max(len(trial.answer) for trial in trials)
    out = sampler.generate([trial.prompt for trial in trials], max_new_tokens=longest, stop_ids=[])
    found = [row[: len(trial.answer)] == trial.answer for row, trial in zip(out.tokens, trials, strict=True)]
    return Needle(length, depth, float(np.mean(found)), None if scorer is None else _gain(scorer, trials))


def _gain(scorer: Scorer, trials: list[_Trial]) -> float:
    rows = [[*prompt, *trial.answer] for trial in trials for prompt in (trial.prompt, trial.blind)]
    first = [len(prompt) for trial in trials for prompt in (trial.prompt, trial.blind)]
    logs = [part.log_probabilities.mean() for part in scorer.score(rows, first)]
    return float(np.mean(np.subtract(logs[::2], logs[1::2])))
