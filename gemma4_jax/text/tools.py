"""Tools in the chat format: declarations, calls and responses, written and read (spec: chat).

Strings stand between ``<|"|>`` without escapes, booleans are true/false, keys are bare and sorted. The quote is a
control token, so nothing inside of a string can end it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma4_jax.errors import PromptError
from gemma4_jax.text.pieces import QUOTE, Control, Pieces, merge_text

_CONSTANTS = {"true": True, "false": False, "null": None, "None": None}
_STRUCTURE = "{}[],:"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for: ``name(**arguments)``."""

    name: str
    arguments: dict[str, Any]


def declaration(tool: Mapping[str, Any]) -> Pieces:
    """A tool's declaration, without the control tokens around it.

    Args:
      tool: ``{"name", "description", "parameters"}`` with a JSON schema, or that under the key ``function``.

    Raises:
      PromptError: no name, or a schema that is not a mapping.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(f"tool {tool!r} has no name")
    members = [("description", _quoted(function.get("description", "")))]
    if function.get("parameters"):
        members.append(("parameters", _schema(function["parameters"], function["name"])))
    return merge_text([f"declaration:{function['name']}", "{", *_members(members), "}"])


def call(name: str, arguments: Mapping[str, Any]) -> Pieces:
    """A call, without the control tokens around it."""
    return merge_text([f"call:{name}", *value(dict(arguments))])


def response(name: str, result: Any) -> Pieces:
    """A tool's result, without the control tokens around it. A result that is not a mapping becomes ``{value:…}``."""
    return merge_text([f"response:{name}", *value(dict(result) if isinstance(result, Mapping) else {"value": result})])


def value(item: Any) -> list[str]:
    """A value in the format's notation. Raises PromptError for a type that has none."""
    if isinstance(item, str):
        return _quoted(item)
    if isinstance(item, bool):
        return ["true" if item else "false"]
    if item is None:
        return ["null"]
    if isinstance(item, (int, float)):
        return [str(item)]
    if isinstance(item, Mapping):
        keys = sorted(item, key=lambda key: (str(key).lower(), str(key)))
        return ["{", *_members([(str(key), value(item[key])) for key in keys]), "}"]
    if isinstance(item, Sequence):
        parts = [value(entry) for entry in item]
        return ["[", *_joined(parts), "]"]
    raise PromptError(f"a tool value is {type(item).__name__}; choices: str, bool, int, float, None, list, dict")


def parse_call(pieces: Iterable[str]) -> ToolCall:
    """Read ``call:NAME{key:value,…}``, what stands between the control tokens of a call.

    Args:
      pieces: text and ``QUOTE`` controls, as decoded from ids.

    Raises:
      PromptError: not a call, with the place at which it stops being one.
    """
    return _Reader(pieces).call()


def _quoted(text: Any) -> list[str]:
    return [QUOTE, str(text), QUOTE]


def _joined(parts: Sequence[Sequence[str]]) -> list[str]:
    joined: list[str] = []
    for number, part in enumerate(parts):
        joined += [",", *part] if number else part
    return joined


def _members(members: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return _joined([[f"{key}:", *content] for key, content in members])


def _schema(schema: Any, owner: str) -> list[str]:
    """A JSON schema as declared: description first, type last, names of types in capitals."""
    if not isinstance(schema, Mapping):
        raise PromptError(f"tool {owner}: a schema is {type(schema).__name__}; a mapping is expected")
    members: list[tuple[str, Sequence[str]]] = []
    if schema.get("description"):
        members.append(("description", _quoted(schema["description"])))
    if schema.get("nullable"):
        members.append(("nullable", ["true"]))
    if schema.get("enum"):
        members.append(("enum", value(list(schema["enum"]))))
    if schema.get("properties"):
        names = sorted(schema["properties"], key=lambda name: (name.lower(), name))
        properties = [(name, _schema(schema["properties"][name], f"{owner}.{name}")) for name in names]
        members.append(("properties", ["{", *_members(properties), "}"]))
    if schema.get("required"):
        members.append(("required", value(list(schema["required"]))))
    if schema.get("items"):
        members.append(("items", _schema(schema["items"], f"{owner}[]")))
    if schema.get("type"):
        kind = schema["type"]
        members.append(("type", _quoted(kind.upper()) if isinstance(kind, str) else value([k.upper() for k in kind])))
    return ["{", *_members(members), "}"]


class _Reader:
    """Recursive descent over characters and quoted strings."""

    def __init__(self, pieces: Iterable[str]):
        self._items: list[str | Control] = []  # single characters; a quoted string is one Control holding its text
        quoted: list[str] | None = None
        for piece in pieces:
            if isinstance(piece, Control) and piece == QUOTE:
                if quoted is None:
                    quoted = []
                else:
                    self._items.append(Control("".join(quoted)))
                    quoted = None
            elif quoted is not None:
                quoted.append(str(piece))
            else:
                self._items.extend(str(piece))
        if quoted is not None:
            raise PromptError("tool call: a string is not closed")
        self._at = 0

    def call(self) -> ToolCall:
        self._skip_space()
        head = self._bare("{")
        if not head.startswith("call:") or not head[5:].strip():
            raise PromptError(f"tool call: {head!r} where call:NAME is expected")
        arguments = self._object()
        self._skip_space()
        if self._at != len(self._items):
            raise PromptError(f"tool call: {self._rest()!r} after the end")
        return ToolCall(head[5:].strip(), arguments)

    def _value(self) -> Any:
        self._skip_space()
        item = self._peek()
        if isinstance(item, Control):
            self._at += 1
            return str(item)
        if item == "{":
            return self._object()
        if item == "[":
            return self._array()
        word = self._bare(_STRUCTURE)
        if not word:
            raise PromptError(f"tool call: {self._rest()!r} where a value is expected")
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        try:
            return json.loads(word)
        except ValueError:
            return word  # a string that the model forgot to quote

    def _object(self) -> dict[str, Any]:
        self._expect("{")
        members: dict[str, Any] = {}
        while not self._closes("}", bool(members)):
            self._skip_space()
            item = self._peek()
            if isinstance(item, Control):
                self._at += 1
                key = str(item)
            else:
                key = self._bare(_STRUCTURE)
            if not key:
                raise PromptError(f"tool call: {self._rest()!r} where a key is expected")
            self._expect(":")
            members[key] = self._value()
        return members

    def _array(self) -> list[Any]:
        self._expect("[")
        entries: list[Any] = []
        while not self._closes("]", bool(entries)):
            entries.append(self._value())
        return entries

    def _closes(self, end: str, separated: bool) -> bool:
        self._skip_space()
        if self._peek() == end and not isinstance(self._peek(), Control):
            self._at += 1
            return True
        if separated:
            self._expect(",")
        return False

    def _bare(self, stop: str) -> str:
        start = self._at
        while self._at < len(self._items) and not isinstance(self._peek(), Control) and self._peek() not in stop:
            self._at += 1
        return "".join(self._items[start : self._at]).strip()

    def _peek(self) -> str | Control:
        if self._at >= len(self._items):
            raise PromptError("tool call: it ends too early")
        return self._items[self._at]

    def _expect(self, character: str):
        self._skip_space()
        if self._peek() != character or isinstance(self._peek(), Control):
            raise PromptError(f"tool call: {self._rest()!r} where {character!r} is expected")
        self._at += 1

    def _skip_space(self):
        while self._at < len(self._items) and not isinstance(self._peek(), Control) and self._peek().isspace():
            self._at += 1

    def _rest(self) -> str:
        return "".join(self._items[self._at :])[:40]
