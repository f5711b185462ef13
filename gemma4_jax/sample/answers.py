"""How often a model answers right: held-out conversations whose last turn is the answer, asked and compared.

With ``blind`` the media are blanked out: what is left of the score is guessing, so the rest is looking and listening.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.media import images, prepare_audio, video
from gemma4_jax.media.audio import SAMPLE_RATE
from gemma4_jax.text import chat


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """Fields of ``config.answers``: whether a finetuned model is asked its held-out conversations, and how.

    ask: whether at all. count: the first so many of them (0: all). batch_size: prompts at once. max_new_tokens: of an
    answer. blind: ask them once more with their media blanked out.

    Raises:
      ConfigError: a number out of range, naming the field.
    """

    ask: bool = False
    count: int = 0
    batch_size: int = 32
    max_new_tokens: int = 32
    blind: bool = True

    def __post_init__(self):
        for name, least in (("count", 0), ("batch_size", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"answers.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    """exact: share of answers that are right to the letter. characters: share of characters that are right, by edit
    distance. positions: share of characters that are right at their place.
    count: answers. wrong: the first few pairs of (expected, given)."""

    exact: float
    characters: float
    positions: float
    count: int
    wrong: tuple[tuple[str, str], ...]


def score_answers(
    sampler,
    source: Sequence[Mapping[str, Any]],
    count: int | None = None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    blind: bool = False,
    field: str = "messages",
) -> AnswerScore:
    """Ask the first ``count`` conversations of a source, greedily, without thinking.

    Args:
      sampler: a Sampler with tokenizer and processor.
      source: documents with a list of messages under ``field``, the last of which is the model's.
      count: how many; None: all.
      batch_size: prompts at once.
      max_new_tokens: of an answer.
      blind: show black images and play silence of the same sizes.

    Raises:
      DataError: no documents, or one that does not end with the model.
    """
    total = len(source) if count is None else min(count, len(source))
    if total < 1:
        raise DataError("no conversations to score")
    distance = length = placed = right = 0
    wrong: list[tuple[str, str]] = []
    for start in range(0, total, batch_size):
        documents = [source[index] for index in range(start, min(start + batch_size, total))]
        for number, document in enumerate(documents, start):
            messages = document[field]
            if chat.ROLES.get(messages[-1].get("role")) != "model" or not isinstance(messages[-1].get("content"), str):
                raise DataError(f"conversation {number} does not end with an answer of the model")
        given = _ask(sampler, documents, field, max_new_tokens, blind)
        for document, answer in zip(documents, given, strict=True):
            expected = document[field][-1]["content"].strip()
            right += answer == expected
            placed += sum(a == b for a, b in zip(expected, answer, strict=False))
            distance += edit_distance(expected, answer)
            length += len(expected)
            if answer != expected and len(wrong) < 8:
                wrong.append((expected, answer))
    size = max(length, 1)
    return AnswerScore(right / total, max(0.0, 1 - distance / size), placed / size, total, tuple(wrong))


def _ask(sampler, documents: Sequence[Mapping[str, Any]], field: str, max_new_tokens: int, blind: bool) -> list[str]:
    prompts = [
        chat.render(
            document[field][:-1],
            tools=document.get("tools"),
            template=sampler.chat_template,
            controls=sampler.tokenizer.special_tokens,
        )
        for document in documents
    ]
    blank = {"image": _black, "audio": _silence, "video": _black_clip}
    media = {
        kind: [[blank[kind](source) if blind else source for source in getattr(prompt, name)] for prompt in prompts]
        for kind, name in (("image", "images"), ("audio", "audio"), ("video", "videos"))
    }
    out = sampler.generate(
        [prompt.pieces for prompt in prompts],
        images=media["image"],
        audio=media["audio"],
        videos=media["video"],
        max_new_tokens=max_new_tokens,
    )
    return [text.strip() for text in out.texts]


def _black(source: Any) -> np.ndarray:
    image = images.load_image(source)
    return np.zeros((image.height, image.width, 3), np.uint8)


def _silence(source: Any) -> tuple[np.ndarray, int]:
    return np.zeros_like(prepare_audio(source, on_long="cut").reshape(-1)), SAMPLE_RATE


def _black_clip(source: Any) -> tuple[list[np.ndarray], float]:
    frames = video.prepare_video(source)
    side = images.PATCH_SIDE * (1 + frames.positions.max(axis=0))
    black = np.zeros((side[1], side[0], 3), np.uint8)
    return [black] * len(frames.seconds), 1.0


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one string into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
