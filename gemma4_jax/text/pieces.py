"""Prompts as pieces: plain text and control tokens kept apart, so that text can never turn into control ids."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Control(str):
    """The name of a control token, such as ``<|turn>``; it becomes that one token."""

    __slots__ = ()


class Pieces(list):
    """A prompt: a list of ``str`` (text, whatever it looks like) and ``Control``. It holds its own bos."""


BOS = Control("<bos>")
IMAGE, AUDIO, VIDEO = Control("<|image|>"), Control("<|audio|>"), Control("<|video|>")
TURN, END_TURN = Control("<|turn>"), Control("<turn|>")
CHANNEL, END_CHANNEL = Control("<|channel>"), Control("<channel|>")
TOOL, END_TOOL = Control("<|tool>"), Control("<tool|>")
TOOL_CALL, END_TOOL_CALL = Control("<|tool_call>"), Control("<tool_call|>")
TOOL_RESPONSE, END_TOOL_RESPONSE = Control("<|tool_response>"), Control("<tool_response|>")
QUOTE, THINK = Control('<|"|>'), Control("<|think|>")
CHAT_CONTROLS = (
    TURN, END_TURN, CHANNEL, END_CHANNEL, TOOL, END_TOOL, TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE,
    QUOTE, THINK, IMAGE, AUDIO, VIDEO,
)  # fmt: skip


def split_controls(text: str, names: Iterable[str]) -> Pieces:
    """Cut a text at the given control names: the names become ``Control``, what is between stays text."""
    names = sorted(names, key=len, reverse=True)
    if not names:
        return Pieces([text] if text else [])
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return Pieces(Control(part) if index % 2 else part for index, part in enumerate(parts) if part)


def placeholder(mark: Control) -> list[str]:
    """A medium's place in a text: images and videos stand between empty lines, sound does not."""
    return [mark] if mark == AUDIO else ["\n\n", mark, "\n\n"]


def to_text(pieces: Iterable[str]) -> str:
    """The pieces written one after the other, for display."""
    return "".join(pieces)


def merge_text(pieces: Iterable[str]) -> Pieces:
    """The same prompt with neighbouring texts joined and empty ones dropped."""
    merged = Pieces()
    for piece in pieces:
        if not piece:
            continue
        if merged and not isinstance(piece, Control) and not isinstance(merged[-1], Control):
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
