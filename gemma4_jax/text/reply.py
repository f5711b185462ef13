"""The model's output taken apart, by ids: thoughts, answer, tool calls; also while it streams (spec: chat)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from gemma4_jax.errors import PromptError
from gemma4_jax.text.pieces import CHANNEL, END_CHANNEL, END_TOOL_CALL, QUOTE, TOOL_CALL, Pieces
from gemma4_jax.text.tools import ToolCall, parse_call

ANSWER, THINKING, CALL = "answer", "thinking", "call"
CHANNEL_NAME = "thought"


class Fragment(NamedTuple):
    """A piece of streamed text. kind: ``answer`` or ``thinking``."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said.

    text: the answer, without thoughts and calls. thinking: the thoughts, None when there were none. tool_calls: the
    calls in order. malformed_calls: the text of calls that cannot be read. tokens: all new ids.
    """

    text: str
    thinking: str | None
    tool_calls: tuple[ToolCall, ...]
    malformed_calls: tuple[str, ...]
    tokens: tuple[int, ...]
    finish_reason: str | None = None


class ReplyParser:
    """Feed ids with ``push``, end with ``finish``, then read ``reply``.

    Channel marks are single ids, so a mark written as text in the answer survives, and none can be split over two
    pieces of a stream. A span that the token limit cuts off is all thought, or an unreadable call.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._names = {special[mark]: mark for mark in (CHANNEL, END_CHANNEL, TOOL_CALL, END_TOOL_CALL, QUOTE)
                       if mark in special}  # fmt: skip
        self._special = tokenizer.special_ids
        self._state = ANSWER
        self._stream = tokenizer.stream()
        self._parts: dict[str, list[str]] = {ANSWER: [], THINKING: []}
        self._header: str | None = None  # the channel's name, while its line is not complete
        self._call = Pieces()
        self._calls: list[ToolCall] = []
        self._malformed: list[str] = []
        self._thought = False
        self._tokens: list[int] = []

    @property
    def count(self) -> int:
        """How many ids it was given."""
        return len(self._tokens)

    def push(self, index: int) -> list[Fragment]:
        """The text that has become certain with this id: none inside of calls, marks and half characters."""
        index = int(index)
        self._tokens.append(index)
        if index not in self._special:
            return self._text(self._stream.push(index))
        fragments = self._flush() + self._end_header()
        self._mark(self._names.get(index))
        return fragments

    def finish(self) -> list[Fragment]:
        """The text that was still held back."""
        fragments = self._flush() + self._end_header()
        if self._state == CALL:
            self._close_call()
        self._state = ANSWER
        return fragments

    def reply(self, finish_reason: str | None = None) -> Reply:
        """Everything so far."""
        thinking = "".join(self._parts[THINKING]).strip() if self._thought else None
        text = "".join(self._parts[ANSWER]).strip()
        return Reply(
            text, thinking, tuple(self._calls), tuple(self._malformed), tuple(self._tokens), finish_reason
        )  # fmt: skip

    def _mark(self, name: str | None):
        if self._state == ANSWER and name == CHANNEL:
            self._state, self._header, self._thought = THINKING, "", True
        elif self._state == THINKING and name == END_CHANNEL:
            self._state = ANSWER
        elif self._state == ANSWER and name == TOOL_CALL:
            self._state, self._call = CALL, Pieces()
        elif self._state == CALL and name == END_TOOL_CALL:
            self._close_call()
            self._state = ANSWER
        elif self._state == CALL and name == QUOTE:
            self._call.append(QUOTE)

    def _flush(self) -> list[Fragment]:
        rest = self._stream.flush()
        self._stream = self._tokenizer.stream()
        return self._text(rest)

    def _text(self, text: str) -> list[Fragment]:
        if not text:
            return []
        if self._state == CALL:
            self._call.append(text)
            return []
        if self._state == THINKING and self._header is not None:
            self._header += text
            if "\n" not in self._header:
                return []
            return self._end_header()
        self._parts[self._state].append(text)
        return [Fragment(self._state, text)]

    def _end_header(self) -> list[Fragment]:
        """Drop the channel's name from its first line; a line that is no name is thought already."""
        if self._state != THINKING or self._header is None:
            return []
        line, self._header = self._header, None
        name, newline, rest = line.partition("\n")
        if name.strip() == CHANNEL_NAME:
            line = rest
        elif not newline and CHANNEL_NAME.startswith(name.strip()):
            line = ""  # cut off in the name
        return self._text(line)

    def _close_call(self):
        try:
            self._calls.append(parse_call(self._call))
        except PromptError:
            self._malformed.append("".join(self._call))


def parse_reply(tokenizer, tokens: Iterable[int], finish_reason: str | None = None) -> Reply:
    """A complete output at once."""
    parser = ReplyParser(tokenizer)
    for index in tokens:
        parser.push(index)
    parser.finish()
    return parser.reply(finish_reason)


def strip_thoughts(tokenizer, tokens: Iterable[int]) -> list[int]:
    """The ids without channel spans; a span without an end reaches to the end."""
    special = tokenizer.special_tokens
    start, end = special.get(CHANNEL), special.get(END_CHANNEL)
    kept, inside = [], False
    for index in tokens:
        if index == start:
            inside = True
        elif inside and index == end:
            inside = False
        elif not inside:
            kept.append(index)
    return kept
