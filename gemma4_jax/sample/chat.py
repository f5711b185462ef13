"""A conversation with a model: renders the history, samples, takes the reply apart."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma4_jax.errors import MediaError, PromptError
from gemma4_jax.text import chat as chat_format
from gemma4_jax.text.reply import ANSWER, Fragment, Reply, ReplyParser
from gemma4_jax.text.tools import ToolCall, declaration

# What the model's authors recommend for chat.
TEMPERATURE, TOP_K, TOP_P = 1.0, 64, 0.95


@dataclasses.dataclass(frozen=True)
class ChatReply(Reply):
    """A reply (text, thinking, tool_calls, malformed_calls, tokens, finish_reason), which of its tokens the drafter
    proposed (``drafted``, one bool each), and the ``stats`` of making it."""

    drafted: tuple[bool, ...] = ()
    stats: Any = None


class Chat:
    """A conversation.

    Args:
      sampler: a Sampler whose bundle has a tokenizer.
      system: text of the system turn.
      thinking: let the model think before it answers; ``chat.thinking`` may be changed between turns.
      tools: declarations: ``{"name", "description", "parameters"}`` with a JSON schema.
      temperature, top_k, top_p: of sampling; the defaults are the recommended ones. 0 is greedy.
      max_new_tokens: of one reply.
      seed: of the first reply; each further reply takes the next.

    Attributes:
      history: the messages so far (role, content, tool_calls), without thoughts; media are kept as given.

    Raises:
      PromptError: no tokenizer, one without the chat format's tokens, or a bad declaration.
    """

    def __init__(
        self,
        sampler,
        system: str | None = None,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        temperature: float = TEMPERATURE,
        top_k: int = TOP_K,
        top_p: float = TOP_P,
        max_new_tokens: int = 1024,
        seed: int = 0,
    ):
        if sampler.tokenizer is None:
            raise PromptError("a chat needs a tokenizer, and the bundle has none")
        for name in (chat_format.TURN, chat_format.END_TURN):
            sampler.tokenizer.token_id(str(name))
        for tool in tools or ():
            declaration(tool)
        self._sampler = sampler
        self._settings = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        self._seed = seed
        self.thinking = thinking
        self.tools = list(tools or ())
        self.history: list[dict[str, Any]] = []
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.history = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(
        self,
        text: str,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        on_text: Callable[[Fragment], None] | None = None,
        **settings: Any,
    ) -> ChatReply:
        """The user's turn and the model's reply.

        Args:
          text: what the user says; names of control tokens in it stay text.
          images, audio, videos: sources, which stand before the text.
          on_text: called with fragments (``kind`` "answer" or "thinking", ``text``) as they become certain.
          settings: of ``Sampler.generate`` for this reply, over those of the chat.

        Raises:
          PromptError, MediaError: the conversation is then as it was before.
        """
        return self._reply([{"role": "user", "content": _content(text, images, audio, videos)}], on_text, settings)

    def respond(
        self,
        results: Sequence[Any],
        *,
        on_text: Callable[[Fragment], None] | None = None,
        **settings: Any,
    ) -> ChatReply:
        """Results of the tools that the last reply called, in the order of its calls; the model goes on with its turn.

        Args:
          results: strings, numbers or mappings, one for each call.
          on_text, settings: as for ``send``.

        Raises:
          PromptError: the last message has another number of calls.
        """
        calls: Sequence[ToolCall] = self.history[-1].get("tool_calls", ()) if self.history else ()
        if len(calls) != len(results) or not calls:
            raise PromptError(f"{len(results)} tool results for {len(calls)} tool calls in the last message")
        messages = [{"role": "tool", "name": call.name, "content": x} for call, x in zip(calls, results, strict=True)]
        return self._reply(messages, on_text, settings)

    def prompt(self, messages: Sequence[Mapping[str, Any]] = ()) -> chat_format.Prompt:
        """What the model would be given after ``messages``: pieces and media."""
        sampler = self._sampler
        return chat_format.render(
            [*self.history, *messages],
            tools=self.tools or None,
            thinking=self.thinking,
            template=sampler.chat_template,
            controls=sampler.tokenizer.special_tokens,
        )

    def _reply(self, messages: list[dict[str, Any]], on_text, settings: Mapping[str, Any]) -> ChatReply:
        prompt = self.prompt(messages)
        parser = ReplyParser(self._sampler.tokenizer)

        def show(fragments: list[Fragment]):
            if on_text is not None:
                for fragment in fragments:
                    on_text(fragment)

        # One token behind: a sampler ends a row that stops inside of a character with one more call for its last id.
        newest: list[int] = []

        def stream(_row: int, index: int, _text: str):
            if newest:
                show(parser.push(newest.pop()))
            newest.append(index)

        out = self._sampler.generate(
            [prompt.pieces],
            images=[prompt.images],
            audio=[prompt.audio],
            videos=[prompt.videos],
            on_token=stream,
            **{**self._settings, "seed": self._seed, **settings},
        )
        for index in out.tokens[0][parser.count :]:
            show(parser.push(index))
        show(parser.finish())
        self._seed += 1
        parsed = parser.reply(out.finish_reasons[0])
        made = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(parsed)}
        reply = ChatReply(**made, drafted=tuple(out.drafted[0]), stats=out.stats)
        answer = {"role": "model", "content": reply.text}
        if reply.tool_calls:
            answer["tool_calls"] = list(reply.tool_calls)
        self.history += [*messages, answer]
        return reply


def answer_only(write: Callable[[str], None]) -> Callable[[Fragment], None]:
    """An ``on_text`` that passes on the text of the answer and leaves thoughts out."""

    def on_text(fragment: Fragment):
        if fragment.kind == ANSWER:
            write(fragment.text)

    return on_text


def _content(text: str, images: Sequence[Any], audio: Sequence[Any], videos: Sequence[Any]) -> Any:
    if not isinstance(text, str):
        raise PromptError(f"the text of a turn is {type(text).__name__}; a string is expected")
    for name, sources in (("images", images), ("audio", audio), ("videos", videos)):
        if not isinstance(sources, (list, tuple, types.NoneType)):
            raise MediaError(f"{name} is {type(sources).__name__}; a list of sources is expected")
    kinds = (("image", images), ("audio", audio), ("video", videos))
    media = [{"type": kind, kind: source} for kind, sources in kinds for source in sources or ()]
    return [*media, {"type": "text", "text": text}] if media else text
