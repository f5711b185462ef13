"""Preference pairs: one question with a chosen and a rejected answer, as rows of tokens.

A pair is planned and packed as one piece, the whole conversation with the chosen answer and then the whole with the rejected
one, so that both are always in the same row. When a batch is assembled each half becomes a segment of its own: of segments
1, 2, 3, 4 … of a row the odd ones are chosen, each followed by its rejected one.

Axis letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_jax.data.examples import Example, chat_fingerprint, conversation, spell
from gemma4_jax.errors import DataError
from gemma4_jax.text.chat import Segment
from gemma4_jax.text.tokenizer import Tokenizer

SIDES = ("chosen", "rejected")
PROMPT = "prompt"


class PreferenceEncoder:
    """Documents ``{"prompt" | "messages", "chosen", "rejected"}`` in the built-in chat format; only the answers are learnt.

    ``prompt`` is a text, what a user says; messages (under ``field``) are a conversation up to the answer. ``chosen`` and
    ``rejected`` are texts, the model's answers.
    """

    masks = True

    def __init__(self, tokenizer: Tokenizer, field: str):
        """Args: ``tokenizer``; the ``field`` of the list of messages."""
        self._tokenizer = tokenizer
        self._field = field

    def fingerprint(self) -> str:
        """Hash of tokenizer, field and the format's version."""
        return chat_fingerprint(self._tokenizer, self._field, "preference")

    def __call__(self, documents: Sequence[dict[str, Any]], places: Sequence[str]) -> list[Example]:
        """Examples in order, both halves one after the other. Raises DataError naming the place of a bad document."""
        return [self._encode(document, place) for document, place in zip(documents, places, strict=True)]

    def _encode(self, document: dict[str, Any], place: str) -> Example:
        halves = [spell(self._tokenizer, parts, place) for parts in pair(document, self._field, place)]
        if halves[0].ids == halves[1].ids:
            raise DataError(f"{place}: chosen and rejected are the same answer")
        learnt = np.concatenate([half.learnt for half in halves])
        return Example([*halves[0].ids, *halves[1].ids], learnt, sum(half.bytes for half in halves))


def pair(document: dict[str, Any], field: str, place: str) -> list[list[Segment]]:
    """Both conversations of a pair, chosen first, with nothing but the answer learnt.

    Raises:
      DataError: naming the place and what is missing or malformed.
    """
    messages = _question(document, field, place)
    result = []
    for side in SIDES:
        answer = document.get(side)
        if not isinstance(answer, str) or not answer:
            raise DataError(f"{place}: field {side!r} must be a text, the model's answer")
        whole = {**document, field: [*messages, {"role": "model", "content": answer}]}
        parts = conversation(whole, field, place)
        last = max(i for i, part in enumerate(parts) if part.supervised)
        result.append([Segment(part.pieces, part.supervised and i == last) for i, part in enumerate(parts)])
    return result


def _question(document: dict[str, Any], field: str, place: str) -> list[dict[str, Any]]:
    if (PROMPT in document) == (field in document):
        raise DataError(f"{place}: one of the fields {PROMPT!r} and {field!r} is needed")
    if field in document:
        messages = document[field]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: field {field!r} must be a list of messages with role and content")
        return messages
    if not isinstance(document[PROMPT], str):
        raise DataError(f"{place}: field {PROMPT!r} must be a text")
    return [{"role": "user", "content": document[PROMPT]}]


class PairSplitter:
    """Makes two segments of every piece of a batch: each half begins with bos, which stands nowhere else."""

    kinds: frozenset[str] = frozenset()  # of media

    def __init__(self, bos_id: int):
        self._bos_id = bos_id

    def __call__(self, batch: dict[str, np.ndarray], chosen: Sequence[Any]) -> dict[str, np.ndarray]:
        """The batch (arrays (B, T)) with ``segment_ids`` and ``positions`` of halves; ``chosen`` is not looked at."""
        filled = batch["segment_ids"] > 0
        starts = (batch["tokens"] == self._bos_id) & filled
        index = np.arange(filled.shape[1], dtype=np.int32)
        begin = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        return {
            **batch,
            "segment_ids": np.where(filled, np.cumsum(starts, axis=1, dtype=np.int32), 0),
            "positions": np.where(filled, index - begin, 0).astype(np.int32),
        }
