"""Conversations to prompts: the built-in renderer, and a checkpoint's own template in a sandbox (spec: chat).

``<|turn>ROLE`` newline CONTENT ``<turn|>`` newline; one leading system turn holds the thinking switch, the system text
and the tools. Both renderers give ``Pieces``, in which control tokens and text are kept apart: what a user writes stays
text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from gemma4_jax.errors import PromptError
from gemma4_jax.text import tools as tool_format
from gemma4_jax.text.pieces import (
    AUDIO,
    BOS,
    CHANNEL,
    END_CHANNEL,
    END_TOOL,
    END_TOOL_CALL,
    END_TOOL_RESPONSE,
    END_TURN,
    IMAGE,
    THINK,
    TOOL,
    TOOL_CALL,
    TOOL_RESPONSE,
    TURN,
    VIDEO,
    Pieces,
    merge_text,
    placeholder,
    split_controls,
)

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "model", "model": "model", "tool": "tool",
}  # fmt: skip
MEDIA_KINDS = {"image": IMAGE, "audio": AUDIO, "video": VIDEO}
THOUGHT = "thought\n"
EMPTY_THOUGHT = (CHANNEL, THOUGHT, END_CHANNEL)
_MOST_REPEATED = 1_000_000  # of a template's products

Message = Mapping[str, Any]


class Segment(NamedTuple):
    """A run of pieces; ``supervised`` if the model has to produce it."""

    pieces: Pieces
    supervised: bool


class Prompt(NamedTuple):
    """A rendered conversation: pieces, and media sources in the order of their placeholders."""

    pieces: Pieces
    images: list[Any]
    audio: list[Any]
    videos: list[Any]


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    generate: bool = True,
    template: str | None = None,
    controls: Iterable[str] = (),
) -> Prompt:
    """The prompt of a conversation.

    Args:
      messages: ``{"role", "content"}`` with roles system (or developer), user, model (or assistant) and tool.
        Content is a string or a list of parts ``{"type": "text", "text": …}`` and ``{"type": KIND, KIND: source}`` with
        kinds image, audio and video. A model message may have ``tool_calls`` (``{"name", "arguments"}``, or that under
        ``function``); a tool message has ``name`` and its result as content.
      tools: declarations (``gemma4_jax.text.tools.declaration``).
      thinking: ask for a thought channel before the answer.
      generate: end with the opening of the model's turn.
      template: text of a checkpoint's ``chat_template.jinja``; None: the built-in renderer.
      controls: names of the tokenizer's control tokens, which a template may write.

    Raises:
      PromptError: naming the message, or what the template complained of.
    """
    media = media_sources(messages)
    if template is None:
        pieces = [piece for segment in segments(messages, tools, thinking) for piece in segment.pieces]
        if generate:
            pieces += opening(messages, thinking)
    else:
        pieces = render_template(template, messages, tools, thinking, generate, controls)
    return Prompt(merge_text(pieces), *(media[kind] for kind in MEDIA_KINDS))


def opening(messages: Sequence[Message], thinking: bool) -> Pieces:
    """What precedes the model's next words: its turn, with a closed empty thought channel when thinking is off.

    After a tool's response the turn is open already, and nothing is put.
    """
    if messages and ROLES.get(messages[-1].get("role")) == "tool":
        return Pieces()
    return Pieces([TURN, "model\n", *(() if thinking else EMPTY_THOUGHT)])


def segments(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = False
) -> list[Segment]:
    """The conversation as history, cut where supervision changes: model content and its end of turn are supervised.

    Raises:
      PromptError: naming the message.
    """
    parts = [Segment(Pieces([BOS, *_system_turn(messages, tools, thinking)]), False)]
    start = 1 if messages and _role(messages[0], 0) == "system" else 0
    open_turn = False  # a model turn that a tool's response keeps open
    for index in range(start, len(messages)):
        message = messages[index]
        role = _role(message, index)
        if role == "tool":
            if not open_turn:
                raise PromptError(f"message {index} is a tool's response but no tool call precedes it")
            parts.append(Segment(_response(messages, index), False))
            continue
        if open_turn and role != "model":
            parts.append(Segment(Pieces([END_TURN, "\n"]), False))
            open_turn = False
        if not open_turn:
            parts.append(Segment(Pieces([TURN, f"{role}\n"]), False))
        if role != "model":
            parts.append(Segment(Pieces([*_content(message, index), END_TURN, "\n"]), False))
            continue
        calls = _calls(message, index)
        open_turn = index + 1 < len(messages) and bool(calls) and _role(messages[index + 1], index + 1) == "tool"
        content = [*_content(message, index), *calls]
        parts.append(Segment(Pieces([*content, *(() if open_turn else [END_TURN])]), True))
        if not open_turn:
            parts.append(Segment(Pieces(["\n"]), False))
    return parts


def render_template(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool,
    generate: bool,
    controls: Iterable[str],
) -> Pieces:
    """Run a checkpoint's template in a sandbox. Control names inside of messages and tools are shielded from it.

    Raises:
      PromptError: the template is broken, refuses the conversation, or does something that the sandbox forbids.
    """
    controls = sorted({*controls, BOS}, key=len, reverse=True)
    messages = [_for_template(message) for message in messages]
    declared = _plain(list(tools or ()))
    plain = json.dumps([messages, declared], ensure_ascii=False)
    shield = next((chr(c) for c in range(0xFDD0, 0xFDF0) if chr(c) not in plain), None)
    if shield is None:
        raise PromptError("the conversation uses every Unicode noncharacter; none is left to mark its control names")
    codes = {name: f"{shield}{chr(0xE000 + index)}" for index, name in enumerate(controls)}
    try:
        text = _environment().from_string(template).render(
            messages=_shielded(messages, codes),
            tools=_shielded(declared, codes) or None,
            bos_token=str(BOS),
            eos_token="<eos>",
            enable_thinking=thinking,
            add_generation_prompt=generate,
        )  # fmt: skip
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise PromptError(f"chat template: {' '.join(str(error).split())}") from error
    pieces = split_controls(text, controls)
    names = {code: name for name, code in codes.items()}
    for index, piece in enumerate(pieces):
        if shield in piece:
            for code, name in names.items():
                piece = piece.replace(code, name)
            pieces[index] = piece
    return pieces


def _role(message: Message, index: int) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise PromptError(f"message {index} has role {role!r}; choices: {', '.join(ROLES)}")
    if role in ("system", "developer") and index:
        raise PromptError(f"message {index} has role {role}; only the first may")
    return ROLES[role]


def _parts(message: Message, index: int) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise PromptError(f"message {index} has content of type {type(content).__name__}; choices: str, list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" and kind not in MEDIA_KINDS:
            raise PromptError(f"message {index} has a part of type {kind!r}; choices: text, {', '.join(MEDIA_KINDS)}")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise PromptError(f"message {index} has a text part without text")
    return list(content)


def _content(message: Message, index: int) -> list[str]:
    pieces: list[str] = []
    for part in _parts(message, index):
        pieces += [part["text"].strip()] if part["type"] == "text" else placeholder(MEDIA_KINDS[part["type"]])
    return pieces


def media_sources(messages: Sequence[Message]) -> dict[str, list[Any]]:
    """Media of a conversation in order, by kind. Raises PromptError naming a message whose part lacks its source."""
    found: dict[str, list[Any]] = {kind: [] for kind in MEDIA_KINDS}
    for index, message in enumerate(messages):
        for part in _parts(message, index) if _role(message, index) != "tool" else []:
            kind = part["type"]
            if kind in MEDIA_KINDS:
                if part.get(kind) is None:
                    raise PromptError(f"message {index} has a part of type {kind} without a field {kind!r}")
                found[kind].append(part[kind])
    return found


def _system_turn(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, thinking: bool) -> list[str]:
    has_text = bool(messages) and _role(messages[0], 0) == "system"
    if not (has_text or tools or thinking):
        return []
    body: list[str] = [THINK, "\n"] if thinking else []
    if has_text:
        body += _content(messages[0], 0)
    for tool in tools or ():
        body += [TOOL, *tool_format.declaration(tool), END_TOOL]
    return [TURN, "system\n", *body, END_TURN, "\n"]


def _calls(message: Message, index: int) -> list[str]:
    pieces: list[str] = []
    for entry in message.get("tool_calls") or ():
        function = _function(entry)
        name, arguments = function.get("name"), function.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise PromptError(f"message {index} has a tool call without a name or without a mapping of arguments")
        pieces += [TOOL_CALL, *tool_format.call(name, arguments), END_TOOL_CALL]
    return pieces


def _response(messages: Sequence[Message], index: int) -> Pieces:
    message = messages[index]
    name = message.get("name") or _called_name(messages[:index], message.get("tool_call_id"))
    if not isinstance(name, str):
        raise PromptError(f"message {index} is a tool's response without the tool's name")
    content = message.get("content")
    if not isinstance(content, Mapping) and isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(part["text"] for part in _parts(message, index) if part["type"] == "text")
    return Pieces([TOOL_RESPONSE, *tool_format.response(name, content), END_TOOL_RESPONSE])


def _called_name(messages: Sequence[Message], call_id: Any) -> str | None:
    """The function of the call with an id, for responses that name only the call."""
    for message in reversed(messages) if call_id is not None else ():
        for entry in message.get("tool_calls") or ():
            if isinstance(entry, Mapping) and entry.get("id") == call_id:
                return _function(entry).get("name")
    return None


def _function(entry: Any) -> Mapping[str, Any]:
    if isinstance(entry, tool_format.ToolCall):
        return {"name": entry.name, "arguments": entry.arguments}
    if not isinstance(entry, Mapping):
        raise PromptError(f"a tool call is {type(entry).__name__}; a mapping is expected")
    function = entry.get("function", entry)
    if isinstance(function.get("arguments"), str):  # JSON, as some libraries write it
        try:
            return {**function, "arguments": json.loads(function["arguments"])}
        except ValueError as error:
            raise PromptError(f"arguments of the tool call {function.get('name')!r} are not JSON: {error}") from error
    return function


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates expect it: role assistant, calls under ``function``."""
    plain = _plain({key: entry for key, entry in message.items() if key != "tool_calls"})
    if plain.get("role") == "model":
        plain["role"] = "assistant"
    if message.get("tool_calls"):
        calls = [_plain(_function(entry)) for entry in message["tool_calls"]]
        plain["tool_calls"] = [{"type": "function", "function": function} for function in calls]
    return plain


def _plain(value: Any) -> Any:
    """JSON-like values, with media sources left out: a template only needs to know that there is one."""
    if isinstance(value, Mapping):
        if value.get("type") in MEDIA_KINDS and value["type"] in value:
            return {"type": value["type"]}
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise PromptError(f"a message holds a {type(value).__name__}; choices: str, bool, int, float, None, list, dict")


def _shielded(value: Any, codes: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for name, code in codes.items():
            value = value.replace(name, code)
        return value
    if isinstance(value, dict):
        return {_shielded(key, codes): _shielded(entry, codes) for key, entry in value.items()}
    if isinstance(value, list):
        return [_shielded(entry, codes) for entry in value]
    return value


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which neither a product nor a power makes something huge."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply or take a power, unless the result would be huge."""
        sizes = [_magnitude(left), _magnitude(right)]
        huge = {"**": sizes[1] > 64, "*": sizes[0] * sizes[1] > _MOST_REPEATED}
        if huge[operator]:
            raise jinja2.sandbox.SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


def _magnitude(value: Any) -> float:
    if isinstance(value, (int, float)):
        return abs(value)
    return len(value) if isinstance(value, (str, list, tuple)) else 1


def _environment() -> jinja2.Environment:
    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
