"""Checks of a generation request, before anything runs: each error is one line that names the row and both numbers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.media.processor import AUDIO_TYPE, IMAGE_TYPE, VIDEO_TYPE, token_types

_SMALLEST_STOP_SET = 8


def check_tokens(config: ModelConfig, rows: Sequence[Any], max_length: int) -> list[np.ndarray]:
    """Prompts as int32 arrays.

    Raises:
      PromptError: no rows; a row that is empty, not integers, out of range, or leaves no room within ``max_length``.
    """
    if not rows:
        raise PromptError("no prompts: the list is empty")
    media = {config.image_token_id, config.video_token_id, config.audio_token_id}
    checked = []
    for i, row in enumerate(rows):
        try:
            ids = np.asarray(row)
        except ValueError:  # lists of unlike lengths inside
            ids = np.zeros((1, 1))
        if ids.size == 0:
            raise PromptError(f"row {i}: the prompt is empty; it needs at least one token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise PromptError(f"row {i}: a prompt is a string or a flat list of ids, not {_describe(row)}")
        for bad in ids[(ids < 0) | (ids >= config.vocab_size)]:
            if int(bad) not in media:
                raise PromptError(f"row {i}: id {bad} is outside the vocabulary of {config.vocab_size}")
        if len(ids) >= max_length:
            raise PromptError(
                f"row {i}: the prompt has {len(ids)} tokens, which leaves no room in max_length {max_length}"
            )
        checked.append(ids.astype(np.int32))
    return checked


def check_no_media(config: ModelConfig, rows: Sequence[np.ndarray]) -> None:
    """Refuse places of media in prompts without any. Raises MediaError naming the row."""
    kinds = {"image": (IMAGE_TYPE, config.vision), "video": (VIDEO_TYPE, config.vision),
             "audio": (AUDIO_TYPE, config.audio)}  # fmt: skip
    for i, row in enumerate(rows):
        types = token_types(config, row)
        for kind, (number, part) in kinds.items():
            if part is not None and (types == number).any():
                raise MediaError(f"row {i}: {(types == number).sum()} {kind} soft tokens but no {kind} inputs")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with shape {value.shape}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def per_row(name: str, value: Any, rows: int, low: float, high: float = math.inf, *, whole: bool = False) -> np.ndarray:
    """A number (``whole``: an integer) for all rows, or one for each.

    Raises:
      ConfigError: wrong count, no number, or outside of [low, high].
    """
    several = isinstance(value, Iterable) and not isinstance(value, str) and np.ndim(value) > 0
    values = list(value) if several else [value] * rows
    if len(values) != rows:
        raise ConfigError(f"{name} has {len(values)} entries for {rows} rows")
    kind, word = (numbers.Integral, "a whole number") if whole else (numbers.Real, "a number")
    for x in values:
        if not isinstance(x, kind) or isinstance(x, bool):
            raise ConfigError(f"{name} is {x!r}; it must be {word}, or one a row")
        if not low <= x <= high:
            raise ConfigError(f"{name} is {x}; it must be between {low:g} and {high:g}")
    return np.asarray(values)


def stop_set(config: ModelConfig, stop_ids: Iterable[int] | None) -> np.ndarray:
    """The ids that end a row, padded with -1 to a few sizes. None: the model's own set; empty: never stop.

    Raises:
      ConfigError: not a collection of ids, or an id outside the vocabulary.
    """
    given = config.stop_token_ids if stop_ids is None else stop_ids
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigError(f"stop_ids is {given!r}; it must be a list of ids, or None for the model's own")
    given = list(given)
    for i in given:
        if isinstance(i, bool) or not isinstance(i, numbers.Integral):
            raise ConfigError(f"stop_ids has {i!r}; it must be a list of ids")
    ids = sorted({int(i) for i in given})
    for i in ids:
        # A set of the published checkpoint may name ids that a small vocabulary lacks; one that was asked for may not.
        if stop_ids is not None and not 0 <= i < config.vocab_size:
            raise ConfigError(f"stop id {i} is outside the vocabulary of {config.vocab_size}")
    size = _SMALLEST_STOP_SET
    while size < len(ids):
        size *= 2
    return np.asarray(ids + [-1] * (size - len(ids)), np.int32)


def suppression(config: ModelConfig) -> np.ndarray:
    """f32 (V,): -inf for the tokens that are never generated, else 0."""
    bias = np.zeros(config.vocab_size, np.float32)
    bias[[i for i in config.suppress_tokens if i < config.vocab_size]] = -np.inf
    return bias
