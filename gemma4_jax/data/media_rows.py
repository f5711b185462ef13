"""Conversations with images, sound and video as training rows.

A document's tokens hold its soft tokens from the start, so rows are planned and packed like text. Its media are
prepared when a batch is assembled, in Grain's workers, and stand in the batch in the order of their soft tokens.

Axis letters: B rows, T tokens, P patches, A audio frames.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.data.examples import Example, chat_fingerprint, conversation
from gemma4_jax.data.options import DataOptions
from gemma4_jax.data.packing import RowPlan
from gemma4_jax.data.sources import Source
from gemma4_jax.errors import ConfigError, DataError, MediaError, PromptError
from gemma4_jax.media import MediaOptions, Processor, Row, bucket, token_types
from gemma4_jax.media.processor import AUDIO_TYPE, TEXT_TYPE, stack_media
from gemma4_jax.text.chat import MEDIA_KINDS, media_sources
from gemma4_jax.text.pieces import Control, Pieces
from gemma4_jax.text.tokenizer import Tokenizer


class MediaChatEncoder:
    """Conversations in the built-in chat format whose parts may be media; what the model says is learnt.

    A part ``{"type": KIND, KIND: SOURCE}`` with KIND image, audio or video has as source what ``gemma4_jax.media``
    takes; a relative path is looked up beside the file that the document stands in. Soft tokens and the marks around
    them are never learnt.
    """

    masks = True

    def __init__(self, processor: Processor, field: str):
        """Args: ``processor`` prepares media and knows the model's ids; the ``field`` of the list of messages."""
        self.processor = processor
        self._field = field

    def fingerprint(self) -> str:
        """Hash of what decides ids: tokenizer, field, format, preparation of media, ids of soft tokens."""
        config, options = self.processor.config, self.processor.options
        ids = config.image_token_id, config.video_token_id, config.audio_token_id, *self._marks()
        sizes = config.vision, config.audio
        return chat_fingerprint(self.processor.tokenizer, self._field, repr(options), repr((ids, sizes)))

    def _marks(self) -> tuple[int, ...]:
        config = self.processor.config
        return config.boi_token_id, config.eoi_token_id, config.boa_token_id, config.eoa_token_id

    def __call__(self, documents: Sequence[dict[str, Any]], places: Sequence[str]) -> list[Example]:
        """Examples in order. Raises DataError naming the place of a conversation that cannot be learnt from."""
        return [self._encode(document, place) for document, place in zip(documents, places, strict=True)]

    def row(self, document: dict[str, Any], place: str) -> tuple[Row, np.ndarray, int]:
        """A document as a row, what of it is learnt (n,) bool, and the bytes of its text. Raises DataError."""
        parts = conversation(document, self._field, place, media=True)
        rows, learnt, size = [], [], 0
        try:
            found = media_sources(document[self._field])
            left = {kind: iter([_beside(source, place) for source in found[kind]]) for kind in MEDIA_KINDS}
            encoded = [self._encode_part(pieces, left) for pieces, _ in parts]
        except (MediaError, PromptError) as error:
            raise DataError(f"{place}: {error}") from error
        for (pieces, supervised), row in zip(parts, encoded, strict=True):
            size += sum(len(piece.encode()) for piece in pieces if not isinstance(piece, Control))
            rows.append(row)
            if supervised:
                learnt.append((row.token_types == TEXT_TYPE) & ~np.isin(row.tokens, self._marks()))
            else:
                learnt.append(np.zeros(len(row.tokens), bool))
        return Row(*(np.concatenate(column) for column in zip(*rows, strict=True))), np.concatenate(learnt), size

    def _encode(self, document: dict[str, Any], place: str) -> Example:
        row, learnt, size = self.row(document, place)
        if not learnt.any():
            raise DataError(f"{place}: no turn of the model, so nothing to learn")
        return Example(row.tokens, learnt, size)

    def _encode_part(self, pieces: Pieces, left: Mapping[str, Iterator[Any]]) -> Row:
        given = {
            kind: [next(left[kind]) for piece in pieces if isinstance(piece, Control) and piece == mark]
            for kind, mark in MEDIA_KINDS.items()
        }
        return self.processor.encode(pieces, given["image"], given["audio"], given["video"])


def make_processor(options: DataOptions, tokenizer: Tokenizer, model: ModelConfig | None) -> Processor | None:
    """What prepares the media of conversations; None for plain text or a model without media inputs.

    Raises:
      ConfigError: an option outside of its choices, or a soft token that the tokenizer does not have.
    """
    if options.format != "chat" or model is None or not (model.vision or model.audio):
        return None
    for name in ("image_token_id", "audio_token_id", "video_token_id"):
        if getattr(model, name) >= tokenizer.vocab_size:
            raise ConfigError(
                f"{name} is {getattr(model, name)}, but the tokenizer has {tokenizer.vocab_size} entries; "
                "take the model's ids from the tokenizer (gemma4_jax.bundle.with_token_ids)"
            )
    media = MediaOptions(
        image_budget=options.image_budget,
        video_budget=options.video_budget,
        video_frames=options.video_frames,
        long_audio=options.long_audio,
    )
    return Processor(tokenizer, model, media)


def with_paths(document: dict[str, Any], field: str, place: str) -> dict[str, Any]:
    """A document whose relative paths of media are made relative to the folder of the file that ``place`` names."""

    def moved(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        return {**part, kind: _beside(part[kind], place)} if kind in MEDIA_KINDS and kind in part else part

    messages = [
        {**message, "content": [moved(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in document[field]
    ]
    return {**document, field: messages}


def _beside(source: Any, place: str) -> Any:
    """A relative path as one relative to the folder of the file that ``place`` names; anything else as it is."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    return Path(place.rpartition(":")[0] or place).parent / source


@dataclasses.dataclass(frozen=True)
class MediaLoader:
    """Adds the media of a batch's rows to it: ``media`` (``MediaInputs``) and ``token_types`` (B, T) int32.

    plans, sources: of each data source. patch_count, frame_count: P and A of every batch, 0 for none. blind: pixels and
    samples are all zero.
    """

    plans: tuple[RowPlan, ...]
    sources: tuple[Source, ...]
    encoder: MediaChatEncoder
    patch_count: int
    frame_count: int
    blind: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """What the rows have: "vision" (images or video), "audio"."""
        counts = {"vision": self.patch_count, "audio": self.frame_count}
        return frozenset(kind for kind, count in counts.items() if count)

    def __call__(self, batch: dict[str, Any], chosen: Sequence[tuple[int, int] | None]) -> dict[str, Any]:
        """The batch with its media.

        Args:
          batch: arrays (B, T).
          chosen: for each row its plan and its number in it; None for a row of padding.

        Raises:
          DataError: a medium that cannot be prepared any more, or is another one than when rows were planned.
        """
        config = self.encoder.processor.config
        rows = [self._row(batch["tokens"][b], place) for b, place in enumerate(chosen)]
        media = stack_media(rows, self.patch_count, self.frame_count, keep_empty=True)
        return {**batch, "token_types": token_types(config, batch["tokens"]), "media": media}

    def _row(self, tokens: np.ndarray, place: tuple[int, int] | None) -> Row:
        config = self.encoder.processor.config
        empty = self.encoder.processor.encode([])
        if place is None:
            return empty
        number, row = place
        plan, source = self.plans[number], self.sources[number]
        documents = plan.pieces.document[plan.first[row] : plan.first[row + 1]]
        parts = [empty]
        for index in map(int, documents):
            part, _, _ = self.encoder.row(source[index], source.place(index))
            if len(part.tokens) != plan.store.offsets[index + 1] - plan.store.offsets[index]:
                raise DataError(f"{source.place(index)}: its media have changed since its tokens were stored")
            parts.append(part)
        patches, positions, frames = (np.concatenate(column) for column in list(zip(*parts, strict=True))[2:])
        if self.blind:
            patches, frames = np.zeros_like(patches), np.zeros_like(frames)
        return Row(tokens, token_types(config, tokens), patches, positions, frames)


def media_loader(
    plans: Sequence[RowPlan], sources: Sequence[Source], encoder: MediaChatEncoder, blind: bool = False
) -> MediaLoader | None:
    """The loader for planned rows, with ``blind`` one that blanks them out; None when no row has media.

    Raises:
      DataError: an example with media that was cut into pieces, naming it and both lengths.
    """
    config = encoder.processor.config
    patch_count = frame_count = 0
    for plan, source in zip(plans, sources, strict=True):
        types = token_types(config, plan.store.tokens)
        vision, sound = (types != TEXT_TYPE) & (types != AUDIO_TYPE), types == AUDIO_TYPE
        _check_whole(plan, source, vision | sound)
        for kind, is_soft in (("patches", vision), ("frames", sound)):
            total = np.concatenate([[0], np.cumsum(is_soft, dtype=np.int64)])
            per_piece = total[plan.pieces.start + plan.pieces.length] - total[plan.pieces.start]
            most = int(np.add.reduceat(per_piece, plan.first[:-1]).max(initial=0)) if len(per_piece) else 0
            if kind == "patches":
                patch_count = max(patch_count, most)
            else:
                frame_count = max(frame_count, most)
    if not patch_count and not frame_count:
        return None
    return MediaLoader(tuple(plans), tuple(sources), encoder, bucket(patch_count), bucket(frame_count), blind)


def _check_whole(plan: RowPlan, source: Source, is_soft: np.ndarray):
    lengths = np.diff(plan.store.offsets)
    for index, length in zip(plan.pieces.document, plan.pieces.length, strict=True):
        start = plan.store.offsets[index]
        if length != lengths[index] and is_soft[start : start + lengths[index]].any():
            raise DataError(
                f"{source.place(int(index))}: a conversation with media has {lengths[index]} tokens, data.seq_len is "
                f"{plan.seq_len}; such examples are not cut"
            )
