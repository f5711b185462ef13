"""A chat in the terminal."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma4_jax.bundle import load
from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.sample.chat import Chat, ChatReply
from gemma4_jax.sample.sampler import Sampler
from gemma4_jax.text.reply import THINKING, Fragment

HELP = """\
/image PATH   /audio PATH   /video PATH   add a file to your next message
/think        turn thinking on or off
/reset        forget the conversation
/save PATH    write the conversation as a line of JSON
/help         this text
/quit         leave (so does the end of input)"""
_ATTACH = {"/image": "images", "/audio": "audio", "/video": "videos"}
COMMANDS = (*_ATTACH, "/think", "/reset", "/save", "/help", "/quit")


class TerminalChat:
    """Reads lines, writes replies as they arrive.

    Args:
      chat: the conversation.
      read: gives the next line for a prompt; raises EOFError at the end of input.
      write: prints text as it is, without a newline of its own.
    """

    def __init__(self, chat: Chat, read: Callable[[str], str] = input, write: Callable[[str], Any] | None = None):
        self._chat = chat
        self._read = read
        self._write = write or (lambda text: print(text, end="", flush=True))
        self._attached: dict[str, list[str]] = {name: [] for name in _ATTACH.values()}
        self._thought = False

    def run(self) -> None:
        """Until /quit or the end of input."""
        self._write("/help lists the commands\n")
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                self._write("\n")
                return
            if line == "/quit":
                return
            if not line:
                continue
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._say(line)
            except KeyboardInterrupt:  # stops the reply; at the prompt it ends the program
                self._write("\n! stopped; this turn is forgotten\n")
            except (PromptError, MediaError, OSError) as error:
                self._write(f"! {error}\n")

    def _say(self, line: str):
        attached, self._attached = self._attached, {name: [] for name in _ATTACH.values()}
        self._thought = False
        reply = self._chat.send(line, **attached, on_text=self._show)
        for call in reply.tool_calls:
            self._write(f"\n[calls {call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})]")
        self._write(f"\n{summary(reply)}\n")

    def _show(self, fragment: Fragment):
        is_thought = fragment.kind == THINKING
        if is_thought != self._thought:
            self._write("[thinking] " if is_thought else "\n[answer] ")
            self._thought = is_thought
        self._write(fragment.text)

    def _command(self, line: str):
        name, _, argument = line.partition(" ")
        # Files dropped on a terminal arrive quoted.
        path = _unquoted(argument) if name in (*_ATTACH, "/save") else ""
        if name in _ATTACH:
            if not Path(path).is_file():
                raise PromptError(f"{name}: {path!r} is not a file")
            self._attached[_ATTACH[name]].append(os.path.abspath(path))  # so that a saved chat can be moved
            self._write(f"added {path}\n")
        elif name == "/think":
            self._chat.thinking = not self._chat.thinking
            self._write(f"thinking is {'on' if self._chat.thinking else 'off'}\n")
        elif name == "/reset":
            self._chat.reset()
            self._attached = {kind: [] for kind in self._attached}
            self._write("forgotten\n")
        elif name == "/save" and not path:
            raise PromptError("/save: give the path of a file")
        elif name == "/save":
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self._chat.history}, ensure_ascii=False, default=_as_json) + "\n")
            self._write(f"saved to {path}\n")
        elif name == "/help":
            self._write(HELP + "\n")
        else:
            raise PromptError(
                f"no command {name}; choices: {', '.join((*_ATTACH, '/think', '/reset', '/save', '/quit'))}"
            )


def open_chat(section: Mapping[str, Any]) -> Chat:
    """The chat that a config's section ``chat`` describes (``configs/chat.py`` has the fields).

    Raises:
      ConfigError, CheckpointError, PromptError: as loading and the sampler raise them; no checkpoint given.
    """
    return Chat(open_sampler(section), thinking=section["thinking"], **chat_settings(section))


def open_sampler(section: Mapping[str, Any]) -> Sampler:
    """The sampler of a section ``chat``. Raises as ``open_chat``."""
    if not section["checkpoint"]:
        raise ConfigError("chat.checkpoint is empty; give the folder of a checkpoint")
    bundle = load(section["checkpoint"], drafter=section["drafter"] or None, dtype=section["dtype"])
    drafts = "auto" if section["draft_tokens"] is None else section["draft_tokens"]
    length = min(section["max_length"], bundle.config.max_position_embeddings)
    return Sampler(bundle, max_length=length, draft_tokens=drafts, release=True)


def chat_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Chat`` in a section ``chat``, all but the switch for thinking."""
    sampling = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    return {"system": section["system"] or None, **{name: section[name] for name in sampling}}


def _unquoted(argument: str) -> str:
    """A path as a shell would read it; as it is when that is not how it was meant (``it's.png``)."""
    argument = argument.strip()
    try:
        return argument if Path(argument).exists() else " ".join(shlex.split(argument))
    except ValueError:
        return argument


def _as_json(value: Any) -> Any:
    return {"name": value.name, "arguments": value.arguments}  # a tool call: all else in a history is plain


def summary(reply: ChatReply) -> str:
    """One line of numbers: tokens, speed, and how many drafted tokens were kept."""
    stats = reply.stats
    parts = [f"{len(reply.tokens)} tokens", f"{stats.tokens_per_second:.1f} tokens/s"]
    if stats.drafted:
        parts.append(
            f"{stats.accepted} of {stats.drafted} drafted tokens accepted ({stats.accepted / stats.drafted:.0%})"
        )
    if reply.finish_reason == "length":
        parts.append("cut off at the token limit")
    return "[" + ", ".join(parts) + "]"
