"""Kinds of text to evaluate on: data sources, and parts of their documents."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gemma4_jax.config import unknown_name
from gemma4_jax.data import DataOptions
from gemma4_jax.data.pipeline import document_texts
from gemma4_jax.data.sources import open_source, open_whole_source
from gemma4_jax.errors import ConfigError, DataError


def docstrings(text: str) -> str:
    """The docstrings of a Python module, a blank line between them: prose about code. Empty if there are none."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return "\n\n".join(doc for doc in found if doc)


VIEWS: dict[str, Callable[[str], str]] = {"docstrings": docstrings}


def read_texts(
    sources: tuple[str, ...], data: DataOptions | Mapping[str, Any], *, split: str, characters: int
) -> dict[str, list[str]]:
    """Texts of each kind, from the front, the last one cut so that there are at most ``characters`` (0: all).

    Args:
      sources: ``NAME=SPEC`` or ``NAME=SPEC#VIEW`` each.
      data: the ``data`` section; its held-out part is that of a training run with the same section.
      split: "heldout" or "whole".

    Raises:
      ConfigError: a kind without a name, or an unknown view. DataError: a kind without text.
    """
    options, found = DataOptions.of(data), {}
    for entry in sources:
        name, equals, spec = entry.partition("=")
        if not equals or not name or not spec:
            raise ConfigError(f"text.sources has {entry!r}; write NAME=SPEC or NAME=SPEC#VIEW")
        spec, _, view = spec.partition("#")
        if view and view not in VIEWS:
            raise unknown_name("view of a text", view, VIEWS)
        source = open_whole_source(spec, options) if split == "whole" else open_source(spec, "heldout", options)
        texts = (VIEWS[view](text) if view else text for text in _texts(source, options))
        found[name] = list(_cut(texts, characters or float("inf")))
        if not found[name]:
            raise DataError(f"text.sources: {entry!r} has no text")
    return found


def spread_prompts(tokenizer, texts: Sequence[str], count: int, length: int) -> list[list[int]]:
    """``count`` stretches of ``length`` tokens, bos included, from places spread evenly over texts (shorter if they are)."""
    ids = [index for text in texts for index in tokenizer.encode(text, bos=False)]
    body = length - 1
    starts = [i * max(0, len(ids) - body) // count for i in range(count)]
    return [[tokenizer.bos_id, *ids[start : start + body]] for start in starts]


def _texts(source: Any, options: DataOptions) -> Iterator[str]:
    for index in range(len(source)):
        yield from document_texts(source[index], options, source.place(index))


def _cut(texts: Iterator[str], characters: float) -> Iterator[str]:
    left = characters
    for text in texts:
        piece = text[: int(min(left, len(text)))]
        if piece.strip():
            yield piece
        left -= len(text)
        if left <= 0:
            return
