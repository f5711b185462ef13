"""Documents to token ids, and which of the ids are learnt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gemma4_jax.data.options import DataOptions
from gemma4_jax.data.sources import text_of
from gemma4_jax.errors import DataError, PromptError
from gemma4_jax.text.chat import ROLES, Segment, opening, segments
from gemma4_jax.text.pieces import AUDIO, IMAGE, VIDEO, Control, merge_text
from gemma4_jax.text.tokenizer import Tokenizer


class Example(NamedTuple):
    """One document as tokens: ``ids`` (n,), beginning with bos; ``learnt`` bool (n,), or None for all but the first;
    ``bytes``: the length of its text in UTF-8."""

    ids: Sequence[int]
    learnt: np.ndarray | None
    bytes: int


class Encoder(Protocol):
    """How documents of one format become examples."""

    masks: bool  # whether examples say which tokens are learnt

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids."""

    def __call__(self, documents: Sequence[dict[str, Any]], places: Sequence[str]) -> list[Example]:
        """Examples in order. Raises DataError naming the place of a bad document."""


class TextEncoder:
    """Plain text: bos, the text, and (if asked) eos; control tokens' names in it stay text."""

    masks = False

    def __init__(self, tokenizer: Tokenizer, field: str, append_eos: bool):
        """Args: ``tokenizer``; the ``field`` of the text; whether to ``append_eos``."""
        self._tokenizer = tokenizer
        self._field = field
        self._end = [tokenizer.eos_id] if append_eos else []

    def fingerprint(self) -> str:
        """Hash of tokenizer, field and eos."""
        return _hash("text", self._tokenizer.fingerprint(), self._field, self._end)

    def __call__(self, documents: Sequence[dict[str, Any]], places: Sequence[str]) -> list[Example]:
        """Examples in order. Raises DataError naming the place of a document without text."""
        texts = [text_of(document, self._field, place) for document, place in zip(documents, places, strict=True)]
        encoded = encode_texts(self._tokenizer, texts, places)
        return [Example(ids + self._end, None, len(t.encode())) for ids, t in zip(encoded, texts, strict=True)]


class ChatEncoder:
    """Conversations in the built-in chat format; what the model says is learnt, up to its end of turn.

    Names of control tokens in a message stay text. A conversation that ends with the model gets, before that answer,
    what a prompt with thinking off ends with, so that the answer is learnt where it will be asked for.
    """

    masks = True

    def __init__(self, tokenizer: Tokenizer, field: str):
        """Args: ``tokenizer``; the ``field`` of the list of messages."""
        self._tokenizer = tokenizer
        self._field = field

    def fingerprint(self) -> str:
        """Hash of tokenizer, field and the format's version."""
        return chat_fingerprint(self._tokenizer, self._field)

    def __call__(self, documents: Sequence[dict[str, Any]], places: Sequence[str]) -> list[Example]:
        """Examples in order. Raises DataError naming the place of a conversation that cannot be learnt from."""
        return [self._encode(document, place) for document, place in zip(documents, places, strict=True)]

    def _encode(self, document: dict[str, Any], place: str) -> Example:
        return spell(self._tokenizer, conversation(document, self._field, place), place)


def spell(tokenizer: Tokenizer, parts: Sequence[Segment], place: str) -> Example:
    """A conversation's tokens. Raises DataError naming the place when nothing is learnt."""
    ids: list[int] = []
    learnt: list[bool] = []
    size = 0
    for pieces, supervised in parts:
        for piece in merge_text(pieces):
            if isinstance(piece, Control):
                new = [tokenizer.token_id(piece)]
            else:
                _check_utf8(piece, place)
                new = tokenizer.encode(piece, bos=False)
                size += len(piece.encode())
            ids += new
            learnt += [supervised] * len(new)
    if not any(learnt):
        raise DataError(f"{place}: no turn of the model, so nothing to learn")
    return Example(ids, np.asarray(learnt), size)


def chat_fingerprint(tokenizer: Tokenizer, field: str, *more: str) -> str:
    """Hash of tokenizer, field, the format's version and whatever else decides the ids."""
    return _hash("chat", 1, tokenizer.fingerprint(), field, *more)


def conversation(document: dict[str, Any], field: str, place: str, media: bool = False) -> list[Segment]:
    """A document's messages (and ``tools``, if it has any) in the chat format, cut where learning begins and ends.

    Args:
      document: with a list of messages under ``field``.
      place: names the document in messages.
      media: whether messages may hold images, sound and video.

    Raises:
      DataError: naming the place: no list of messages, a message that the format does not know, or unwanted media.
    """
    messages = document.get(field)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{place}: field {field!r} must be a list of messages with role and content")
    try:
        parts = segments(messages, document.get("tools"))
    except PromptError as error:
        raise DataError(f"{place}: {error}") from error
    marks = (IMAGE, AUDIO, VIDEO)
    if not media and any(isinstance(piece, Control) and piece in marks for part in parts for piece in part.pieces):
        raise DataError(f"{place}: the conversation has images, audio or video, but the model has no input for them")
    asked = opening(messages[:-1], thinking=False)
    last = next((i for i in reversed(range(len(parts))) if parts[i].supervised), 0)
    if messages and ROLES.get(messages[-1].get("role")) == "model" and parts[last - 1].pieces == asked[:2]:
        parts[last - 1] = Segment(asked, False)
    return parts


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], places: Sequence[str]) -> list[list[int]]:
    """Ids of texts, each with one bos. Raises DataError naming the place of a text without UTF-8 form."""
    for text, place in zip(texts, places, strict=True):
        _check_utf8(text, place)
    return tokenizer.encode_batch(texts)


def _check_utf8(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: lone surrogate at character {error.start} of the text") from error


def make_encoder(options: DataOptions, tokenizer: Tokenizer) -> Encoder:
    """The encoder of ``options.format``."""
    return ENCODERS[options.format](options, tokenizer)


def _text_encoder(options: DataOptions, tokenizer: Tokenizer) -> Encoder:
    return TextEncoder(tokenizer, options.text_field, options.append_eos)


def _chat_encoder(options: DataOptions, tokenizer: Tokenizer) -> Encoder:
    return ChatEncoder(tokenizer, options.text_field)


ENCODERS = {"text": _text_encoder, "chat": _chat_encoder}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
