"""A chat on a web page (extra ``web``): text, pictures and recorded sound, thoughts folded away, drafted tokens coloured,
and the speed of the same reply with and without the drafter.

``WebChat`` is what the page does and knows nothing of a browser; ``build_page`` puts Gradio around it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import mimetypes
import queue
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.sample.chat import Chat, ChatReply
from gemma4_jax.text.reply import THINKING, Fragment

LOOPBACK = "127.0.0.1"
DRAFTED, OWN = "drafted", "target"
COLORS = {DRAFTED: "#6ee7b7", OWN: "#e5e7eb"}
# Fonts of the reader's own machine: a page that works without a network.
FONTS = {"font": ("ui-sans-serif", "system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
_END = object()


@dataclasses.dataclass(frozen=True)
class WebOptions:
    """Fields of ``config.web``.

    host: address to listen on; the default is reached from this machine only. port: 0 takes a free one. share: also open
    Gradio's public tunnel (what Colab needs). compare: make each reply once more without the drafter, to show both speeds
    (the page has a switch for it).
    """

    host: str = LOOPBACK
    port: int = 7860
    share: bool = False
    compare: bool = True

    def __post_init__(self):
        if not self.host:
            raise ConfigError(f"web.host is empty; {LOOPBACK} is this machine only, 0.0.0.0 is every network it is on")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"web.port is {self.port}; it must be between 0 and 65535")


@dataclasses.dataclass
class Conversation:
    """One visitor's state. history: as ``Chat.history``. shown: the messages on the page, thoughts included. turns: replies
    made so far. ended: the visitor has begun another one; a reply that is being written stops at its next fragment."""

    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shown: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    turns: int = 0
    ended: bool = False


class _EndedError(Exception):
    """Stops the sampler when the conversation has ended."""


@dataclasses.dataclass(frozen=True)
class View:
    """What the page shows. messages: of the conversation. tokens: (text, ``DRAFTED`` or ``OWN``) of the last reply. speeds:
    a Markdown table."""

    messages: list[dict[str, Any]]
    tokens: list[tuple[str, str]]
    speeds: str


class WebChat:
    """Conversations over one sampler.

    Args:
      sampler: a Sampler whose bundle has a tokenizer; with a drafter, replies can be made without it as well.
      settings: of every ``Chat``: system, temperature, top_k, top_p, max_new_tokens, seed.

    Raises:
      PromptError: as ``Chat`` does.
    """

    def __init__(self, sampler, **settings: Any):
        self._sampler = sampler
        self._settings = settings
        self.has_drafter = sampler.draft_tokens != 0
        self._plain = sampler.with_draft_tokens(0) if self.has_drafter else None
        self._chat(sampler, Conversation(), False)  # refuses here what it would refuse at the first message

    def reply(
        self, conversation: Conversation, text: str, files: Sequence[str] = (), *, thinking: bool, compare: bool
    ) -> Iterator[View]:
        """Say something; views of the page while the reply comes in, the last one complete.

        Args:
          conversation: changed when the reply is complete, and not at all on an error or when it ends before.
          files: paths of pictures, sound and video, which stand before the text.

        Raises:
          PromptError, MediaError: as ``Chat.send`` does; a file that is none of the three.
        """
        media = sort_files(files)
        before = [*conversation.shown, *({"role": "user", "content": {"path": path}} for path in files)]
        if text:
            before.append({"role": "user", "content": text})
        chat = self._chat(self._sampler, conversation, thinking)
        parts: dict[str, str] = {}

        def send(chat: Chat, put: Callable[[Fragment], Any]) -> ChatReply:
            def on_text(fragment: Fragment):
                if conversation.ended:
                    raise _EndedError
                put(fragment)

            return chat.send(text, **media, on_text=on_text)

        streamed = _streamed(lambda put: send(chat, put))
        while True:
            try:
                fragment: Fragment = next(streamed)
            except StopIteration as end:
                reply: ChatReply = end.value
                break
            except _EndedError:
                return
            parts[fragment.kind] = parts.get(fragment.kind, "") + fragment.text
            thought = parts.get(THINKING)
            yield View([*before, *_shown(parts.get("answer", ""), thought, "answer" not in parts)], [], "")
        messages = [*before, *_shown(_with_calls(reply), reply.thinking, False)]
        tokens = token_spans(self._sampler.tokenizer, reply.tokens, reply.drafted)
        plain = None
        if compare and self.has_drafter:
            yield View(messages, tokens, speed_table(reply, None))
            again = self._chat(self._plain, conversation, thinking)
            with ThreadPoolExecutor(1) as pool:  # as in _streamed: the server's threads are not waited for at its end
                try:
                    plain = pool.submit(send, again, lambda fragment: None).result()
                except _EndedError:
                    return
        conversation.history, conversation.shown = chat.history, messages
        conversation.turns += 1
        yield View(messages, tokens, speed_table(reply, plain) if self.has_drafter else speed_table(None, reply))

    def _chat(self, sampler, conversation: Conversation, thinking: bool) -> Chat:
        seed = self._settings.get("seed", 0) + conversation.turns
        chat = Chat(sampler, thinking=thinking, **{**self._settings, "seed": seed})
        if conversation.history:
            chat.history = copy.copy(conversation.history)
        return chat


def sort_files(files: Sequence[str]) -> dict[str, list[str]]:
    """Paths by kind, as arguments of ``Chat.send``. Raises MediaError for a file that is neither picture, sound nor video."""
    kinds = {"image": "images", "audio": "audio", "video": "videos"}
    media: dict[str, list[str]] = {name: [] for name in kinds.values()}
    for path in files:
        kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
        if kind not in kinds:
            raise MediaError(f"{Path(path).name} is neither a picture, nor sound, nor video")
        media[kinds[kind]].append(path)
    return media


def token_spans(tokenizer, tokens: Sequence[int], drafted: Sequence[bool]) -> list[tuple[str, str]]:
    """New tokens as text, control tokens by name, each with ``DRAFTED`` or ``OWN``; half a character joins the next."""
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    stream, spans, label = tokenizer.stream(), [], OWN
    for index, proposed in zip(tokens, drafted, strict=True):
        label = DRAFTED if proposed else OWN
        if index in names:
            spans += [(stream.flush(), label), (names[index], label)]
            stream = tokenizer.stream()
        else:
            spans.append((stream.push(index), label))
    spans.append((stream.flush(), label))
    return [span for span in spans if span[0]]


def speed_table(drafting: ChatReply | None, plain: ChatReply | None) -> str:
    """Markdown with the speed of a reply made with the drafter beside the same one without it; None: not made (yet)."""
    rows = [
        ("tokens/s", *(_rate(reply) for reply in (drafting, plain))),
        ("tokens a round", *(f"{reply.stats.mean_accepted:.2f}" if reply else "–" for reply in (drafting, plain))),
        ("drafted tokens kept", _kept(drafting), "–"),
    ]
    lines = ["| | with the drafter | without |", "| --- | ---: | ---: |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    if drafting and plain:
        equal = "the same tokens" if drafting.tokens == plain.tokens else "other tokens: rounding decided a near tie"
        lines += ["", f"Both wrote {equal}."]
    return "\n".join(lines)


def _rate(reply: ChatReply | None) -> str:
    if reply is None:
        return "–"
    rate = reply.stats.tokens_per_second
    return f"{rate:.1f}" if rate else "compiling"  # all of the decoding was compiled in this reply


def _kept(reply: ChatReply | None) -> str:
    if reply is None or not reply.stats.drafted:
        return "–"
    return f"{reply.stats.accepted} of {reply.stats.drafted} ({reply.stats.accepted / reply.stats.drafted:.0%})"


def _shown(answer: str, thinking: str | None, pending: bool) -> list[dict[str, Any]]:
    """The page's messages of one reply: the thought, open while it is being thought, and the answer."""
    messages = []
    if thinking is not None:
        metadata = {"title": "Thinking", "status": "pending" if pending else "done"}
        messages.append({"role": "assistant", "content": thinking or "…", "metadata": metadata})
    if answer or not pending:
        messages.append({"role": "assistant", "content": answer or "(no text)"})
    return messages


def _with_calls(reply: ChatReply) -> str:
    calls = [f"[calls {call.name}({call.arguments})]" for call in reply.tool_calls]
    return "\n\n".join(filter(None, [reply.text, *calls]))


def _streamed(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """What ``work`` puts, as it comes; the generator returns what ``work`` returns."""
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run():
        try:
            return work(items.put)
        finally:
            items.put(_END)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while (item := items.get()) is not _END:
            yield item
        return future.result()


def load_gradio() -> types.ModuleType:
    """The module. Raises ConfigError when the extra is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the chat page needs gradio; install the extra: gemma4_jax[web]")
    return importlib.import_module("gradio")


def build_page(web: WebChat, *, thinking: bool = False, compare: bool = True):
    """The page, a ``gradio.Blocks``, not yet served.

    Args:
      thinking, compare: how the page's switches start.
    """
    gr = load_gradio()
    with gr.Blocks(title="gemma4_jax", analytics_enabled=False) as page:
        state = gr.State(Conversation())
        with gr.Row():
            with gr.Column(scale=3):
                log = gr.Chatbot(label="Conversation", height=480, elem_id="conversation", buttons=["copy"])
                box = gr.MultimodalTextbox(
                    file_count="multiple", file_types=["image", "audio", "video"], sources=["upload", "microphone"],
                    placeholder="Write, add files, or record", show_label=False, elem_id="message",
                )  # fmt: skip
                with gr.Row():
                    think = gr.Checkbox(thinking, label="Think first", elem_id="thinking")
                    both = gr.Checkbox(
                        compare and web.has_drafter, label="Also without the drafter", interactive=web.has_drafter
                    )
                    fresh = gr.Button("New conversation", elem_id="fresh")
            with gr.Column(scale=2):
                speeds = gr.Markdown(elem_id="speeds")
                tokens = gr.HighlightedText(
                    label="Last reply, token by token", color_map=COLORS, show_legend=True,
                    show_inline_category=False, elem_id="tokens",
                )  # fmt: skip

        def say(message: Mapping[str, Any], conversation: Conversation, think: bool, both: bool):
            text, files = (message.get("text") or "").strip(), list(message.get("files") or ())
            if not text and not files:
                yield conversation.shown, gr.skip(), gr.skip(), gr.skip()
                return
            entry = None  # the box is emptied once: what is written during the reply stays
            try:
                for view in web.reply(conversation, text, files, thinking=think, compare=both):
                    yield view.messages, view.tokens, view.speeds, entry
                    entry = gr.skip()
            except (ConfigError, MediaError, PromptError) as error:
                raise gr.Error(str(error), print_exception=False) from error
            if conversation.ended:
                # A view that was under way may reach the page after ``begin_anew`` cleared it, and Gradio sends the last
                # one again when a function ends: so the last one is the empty page. ``cancels`` would leave that to chance.
                yield [], [], "", gr.skip()

        def begin_anew(conversation: Conversation):
            conversation.ended = True
            return Conversation(), [], [], ""

        # ``say`` changes the conversation in place: as an output, an ended one could take the new one's place. What is sent
        # during a reply waits for its end; by default Gradio drops it.
        box.submit(
            say, [box, state, think, both], [log, tokens, speeds, box], api_name="say", trigger_mode="always_last"
        )
        fresh.click(begin_anew, state, [state, log, tokens, speeds], api_name="fresh")
    return page


def serve(page, options: WebOptions, announce: Callable[[str], Any] = print) -> None:
    """Listen until interrupted; ``announce`` is told the address once the page can be opened."""
    gr = load_gradio()
    _, url, public = page.queue(default_concurrency_limit=1).launch(
        server_name=options.host,
        server_port=options.port or None,
        share=options.share,
        theme=gr.themes.Default(**FONTS),
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
    )
    announce(f"listening on {url}" + (f" and {public}" if public else ""))
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
