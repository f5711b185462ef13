"""The chat page: what it does, and that a visitor in a browser can write, upload, read, and see what was drafted."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
from PIL import Image

import gemma4_jax as g4
from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.sample import web
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train.run_config import load_config

ROOT = Path(__file__).parents[2]
LAYERS = {"num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention")}
TOKENIZER = train_tokenizer(["Hello there, what is it? thought user model system 1 2 3"] * 3, 400)
STATS = types.SimpleNamespace(tokens_per_second=12.34, drafted=8, accepted=6, mean_accepted=2.5)


class Scripted:
    """A sampler with a drafter that says what it is told; ``wait()`` is called after half of a reply."""

    def __init__(self, *outputs, draft_tokens=4, wait=lambda: None):
        self.tokenizer, self.chat_template, self.draft_tokens = TOKENIZER, None, draft_tokens
        self.outputs, self.calls, self.wait = list(outputs), [], wait

    def with_draft_tokens(self, count):
        plain = Scripted(*self.outputs, draft_tokens=count, wait=self.wait)
        plain.calls = self.calls
        return plain

    def generate(self, prompts, images, audio, videos, *, on_token, **settings):
        self.calls.append({"draft_tokens": self.draft_tokens, "images": images[0], "audio": audio[0], **settings})
        if any("broken" in path for path in images[0]):
            raise MediaError("row 0: image 0: broken.png is not an image")
        tokens = self.outputs.pop(0)
        for i, index in enumerate(tokens):
            if i == len(tokens) // 2:
                self.wait()
            on_token(0, index, "")
        drafted = [[bool(i % 2) and self.draft_tokens != 0 for i in range(len(tokens))]]
        return types.SimpleNamespace(tokens=[tokens], drafted=drafted, finish_reasons=["stop"], stats=STATS)


def ids(*pieces):
    special = TOKENIZER.special_tokens
    return [i for p in pieces for i in ([special[p]] if p in special else TOKENIZER.encode(p, bos=False))]


THOUGHT = ids("<|channel>", "thought\nhm", "<channel|>", "it is 1")


def said(chat, conversation, text="what is it?", files=(), **switches):
    views = list(chat.reply(conversation, text, files, **{"thinking": False, "compare": True, **switches}))
    return views, views[-1]


def test_a_reply_streams_and_is_made_again_without_the_drafter():
    sampler, conversation = Scripted(THOUGHT, ids("2")), web.Conversation()
    chat = web.WebChat(sampler, system="Be brief.", seed=3)
    views, last = said(chat, conversation, files=["/tmp/a cat.png", "/tmp/audio.wav"], thinking=True)
    first = views[0].messages[-1]
    assert first["metadata"] == {"title": "Thinking", "status": "pending"}  # open while it thinks
    assert [m["role"] for m in last.messages] == ["user", "user", "user", "assistant", "assistant"]
    assert last.messages[0]["content"] == {"path": "/tmp/a cat.png"}
    assert last.messages[3] == {
        "role": "assistant", "content": "hm", "metadata": {"title": "Thinking", "status": "done"},
    }  # fmt: skip
    assert last.messages[4]["content"] == "it is 1"
    with_drafter, without = sampler.calls
    assert (with_drafter["draft_tokens"], without["draft_tokens"]) == (4, 0)
    assert with_drafter["seed"] == without["seed"] == 3
    assert with_drafter["images"] == without["images"] == ["/tmp/a cat.png"] and with_drafter["audio"] == [
        "/tmp/audio.wav"
    ]
    assert "| tokens/s | 12.3 | 12.3 |" in last.speeds and "6 of 8 (75%)" in last.speeds
    assert "Both wrote the same tokens" in last.speeds
    # A second turn knows the first, but not its thoughts, and draws with another seed.
    _, last = said(chat, conversation, "and?", compare=False)
    assert sampler.calls[-1]["seed"] == 4 and len(sampler.calls) == 3
    assert [m["role"] for m in conversation.history] == ["system", "user", "model", "user", "model"]
    assert len(last.messages) == 7


def test_tokens_are_coloured_by_who_proposed_them():
    tokens = ids("<|channel>", "thought\nhm", "<channel|>", "é😀")
    spans = web.token_spans(TOKENIZER, tokens, [i % 2 == 1 for i in range(len(tokens))])
    assert "".join(text for text, _ in spans) == "<|channel>thought\nhm<channel|>é😀"
    assert spans[0] == ("<|channel>", web.OWN)
    assert {label for _, label in spans} == {web.DRAFTED, web.OWN}
    assert web.token_spans(TOKENIZER, [], []) == []


def test_without_a_drafter_there_is_one_speed():
    sampler = Scripted(ids("2"), draft_tokens=0)
    chat = web.WebChat(sampler)
    _, last = said(chat, web.Conversation())
    assert not chat.has_drafter and len(sampler.calls) == 1
    assert "| tokens/s | – | 12.3 |" in last.speeds


def test_a_refused_message_changes_nothing():
    conversation, chat = web.Conversation(), web.WebChat(Scripted(ids("2")))
    with pytest.raises(MediaError, match=r"notes.txt is neither a picture, nor sound, nor video"):
        said(chat, conversation, files=["/tmp/notes.txt"])
    with pytest.raises(MediaError, match="broken.png is not an image"):
        said(chat, conversation, files=["/tmp/broken.png"])
    assert conversation == web.Conversation()


@pytest.mark.parametrize("compared", [False, True])
def test_a_reply_stops_when_its_conversation_ends(compared):
    conversation = web.Conversation()

    def end_during_the_last_call():
        conversation.ended = len(sampler.calls) == 1 + compared

    sampler = Scripted(ids("it is 1"), ids("it is 1"), wait=end_during_the_last_call)
    views, last = said(web.WebChat(sampler), conversation)
    assert conversation == web.Conversation(ended=True) and len(sampler.calls) == 1 + compared
    assert bool(last.speeds) == compared and not any("Both wrote" in view.speeds for view in views)


def test_options_and_config(monkeypatch):
    config = load_config("configs/chat.py:web", ROOT)[0]
    assert (config.web.host, config.web.share) == ("127.0.0.1", False)
    assert "web" not in load_config("configs/chat.py", ROOT)[0]
    with pytest.raises(ConfigError, match=r"web.port is 65536; it must be between 0 and 65535"):
        web.WebOptions(port=1 << 16)
    with pytest.raises(ConfigError, match="web.host is empty"):
        web.WebOptions(host="")
    with pytest.raises(PromptError, match="a chat needs a tokenizer"):
        web.WebChat(types.SimpleNamespace(tokenizer=None, draft_tokens=0))
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install the extra: gemma4_jax\[web\]"):
        web.load_gradio()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page over a real small model, served by launch.py; ends by SIGTERM."""
    folder = tmp_path_factory.mktemp("web")
    bundle = g4.init("tiny", config_overrides=LAYERS)
    bundle.processor.options = dataclasses.replace(bundle.processor.options, image_budget=70)
    # Target and drafter find all tokens alike, and so both choose the first that is allowed: "a".
    first = bundle.tokenizer.encode("a", bos=False)[-1]
    bundle.config = dataclasses.replace(bundle.config, suppress_tokens=tuple(range(first)))
    for module in (bundle.model, bundle.drafter):
        module.final_norm.weight[...] = jnp.zeros_like(module.final_norm.weight[...])
    g4.save(bundle, folder / "model")
    fields = {
        "web.port": 0, "chat.checkpoint": folder / "model", "chat.max_length": 512, "chat.max_new_tokens": 24,
        "chat.dtype": "float32", "chat.draft_tokens": 2, "chat.temperature": 0.0,
    }  # fmt: skip
    command = [sys.executable, "launch.py", "--config", "configs/chat.py:web", f"--workdir={folder / 'run'}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "no_proxy": "127.0.0.1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.match(r"listening on (http://127\.0\.0\.1:\d+)", line):
                break
        yield found[1]
    finally:
        process.terminate()
        process.stdout.close()
        assert process.wait() == 143


@contextlib.contextmanager
def chromium():
    """Debian's Chromium, driven by playwright, with no way to any other machine."""
    from playwright.sync_api import sync_playwright

    flags = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update"
    closed = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=[*flags.split(), closed])
        yield browser
        browser.close()


def test_a_visitor_in_a_browser(address, tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        box = page.locator("#message textarea")
        box.fill("Hello there")
        box.press("Enter")
        page.get_by_text("Both wrote the same tokens").wait_for()
        log = page.locator("#conversation")
        assert "Hello there" in log.inner_text() and "aaaa" in log.inner_text()
        rates = page.locator("#speeds td").all_inner_texts()
        assert rates[0] == "tokens/s"
        spans = page.locator("#tokens .token.highlighted")
        colours = set(spans.evaluate_all("spans => spans.map(s => getComputedStyle(s).backgroundColor)"))
        assert len(colours) == 2  # drafted, and the model's own
        page.locator("#message input[type=file]").set_input_files(tmp_path / "red.png")
        page.locator("#message .thumbnail-item, #message img").first.wait_for()
        box.fill("What is in this picture?")
        box.press("Enter")
        log.locator("img").first.wait_for()
        log.get_by_text("What is in this picture?").wait_for()
        page.locator("#message textarea:enabled").wait_for()
        page.locator("#fresh").click()
        log.get_by_text("What is in this picture?").wait_for(state="detached")


def serve_scripted(halfway, released, answers):
    """A page whose sampler says so in the middle of a reply and waits to be released; a process of its own."""

    def wait():
        halfway.set()
        assert released.wait(120)

    sampler = Scripted(ids("it is 1 1 1"), ids("2 2"), wait=wait)
    page = web.build_page(web.WebChat(sampler), compare=False)
    web.serve(page, web.WebOptions(port=0), lambda line: answers.put(line.removeprefix("listening on ")))


def test_a_new_conversation_while_a_reply_is_written():
    context = multiprocessing.get_context("spawn")
    halfway, released, answers = context.Event(), context.Event(), context.SimpleQueue()
    process = context.Process(target=serve_scripted, args=(halfway, released, answers), daemon=True)
    process.start()
    try:
        with chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.goto(answers.get())
            box, log = page.locator("#message textarea"), page.locator("#conversation")
            box.fill("what is it?")
            box.press("Enter")
            log.get_by_text("what is it?").wait_for()
            assert halfway.wait(120)
            page.locator("#fresh").click()
            log.get_by_text("what is it?").wait_for(state="detached")
            box.fill("and 3?")
            box.press("Enter")
            released.set()  # the rest of the reply comes after the page is empty, and after the next message
            log.get_by_text("2 2").wait_for()
            page.locator("#message textarea:enabled").wait_for()
            assert (
                "and 3?" in log.inner_text() and "what is" not in log.inner_text() and "it is" not in log.inner_text()
            )
    finally:
        process.terminate()
        process.join()
