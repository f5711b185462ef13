"""Chat over a sampler: history, thoughts, tools, media, streaming, the terminal."""

import dataclasses
import json
import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image

import gemma4_jax as g4
from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.sample.terminal import TerminalChat, open_chat
from gemma4_jax.text import chat as chat_format
from gemma4_jax.text import tools
from gemma4_jax.text.pieces import Control, Pieces
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train.run_config import load_config

TOKENIZER = train_tokenizer(["Hello there, what is it? thought user model system call: 1 2 3"] * 3, 400)
ROOT = pathlib.Path(__file__).parents[2]
BYTES = {TOKENIZER.token_id(f"<0x{byte:02X}>") for byte in range(256)}
STATS = types.SimpleNamespace(tokens_per_second=12.34, drafted=8, accepted=6)


def ids(*pieces):
    """Ids of an output: control names as controls, the rest as text."""
    out = []
    for piece in pieces:
        known = TOKENIZER.special_tokens.get(piece)
        out += [known] if known is not None else TOKENIZER.encode(piece, bos=False)
    return out


class Scripted:
    """A sampler that says what it is told and remembers what it was asked."""

    def __init__(self, *outputs, reason="stop"):
        self.tokenizer, self.chat_template = TOKENIZER, None
        self.outputs, self.reason, self.calls = list(outputs), reason, []

    def generate(self, prompts, images, audio, videos, *, on_token, **settings):
        self.calls.append((prompts, images, audio, videos, settings))
        if any(b"broken" in images[0] for _ in images[0]):
            raise MediaError("row 0: image 0: broken")
        tokens = self.outputs.pop(0)
        for index in tokens:
            on_token(0, index, "")
        if tokens[-1] in BYTES:  # the rest of a character that was never completed
            on_token(0, tokens[-1], "\ufffd")
        drafted = [[bool(i % 2) for i in range(len(tokens))]]
        return types.SimpleNamespace(tokens=[tokens], drafted=drafted, finish_reasons=[self.reason], stats=STATS)

    def asked(self, call=-1):
        return "".join(self.calls[call][0][0])


def test_turns_alternate_and_settings_are_the_recommended_ones():
    sampler = Scripted(ids("Hello."), ids("it is 1"))
    chat = g4.Chat(sampler, system="Be brief.", seed=5)
    assert chat.send("Hello there").text == "Hello."
    assert chat.send("what is it?", temperature=0.0).text == "it is 1"
    assert sampler.asked() == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHello there<turn|>\n<|turn>model\nHello.<turn|>\n"
        "<|turn>user\nwhat is it?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    assert isinstance(sampler.calls[0][0][0], Pieces)
    assert [m["role"] for m in chat.history] == ["system", "user", "model", "user", "model"]
    settings = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "max_new_tokens": 1024, "seed": 5}
    assert sampler.calls[0][4] == settings
    assert sampler.calls[1][4] == settings | {"temperature": 0.0, "seed": 6}
    chat.reset()
    assert chat.history == [{"role": "system", "content": "Be brief."}]


def test_thoughts_are_shown_once_and_not_sent_back():
    sampler = Scripted(ids("<|channel>", "thought\nlet me see", "<channel|>", "it is <|channel> 1"), ids("2"))
    chat = g4.Chat(sampler, thinking=True)
    streamed = []
    reply = chat.send("what?", on_text=streamed.append)
    assert (reply.thinking, reply.text) == ("let me see", "it is <|channel> 1")
    assert "".join(f.text for f in streamed if f.kind == "answer") == reply.text
    assert "".join(f.text for f in streamed if f.kind == "thinking") == reply.thinking
    assert sampler.asked().startswith("<bos><|turn>system\n<|think|>\n<turn|>\n")
    assert sampler.asked().endswith("<|turn>model\n")
    chat.send("and?")
    assert "let me see" not in sampler.asked()
    marks = [piece for piece in sampler.calls[-1][0][0] if isinstance(piece, Control)]
    assert "<|channel>" not in marks


def test_half_a_character_at_the_end_is_one_token():
    cut = ids("hm 😀")[:-1]
    streamed = []
    reply = g4.Chat(Scripted(cut, reason="length")).send("what?", on_text=lambda f: streamed.append(f.text))
    assert reply.tokens == tuple(cut)
    assert "".join(streamed) == reply.text == "hm \ufffd"


def test_thought_cut_off_by_the_limit():
    chat = g4.Chat(Scripted(ids("<|channel>", "thought\nlet me"), reason="length"), thinking=True)
    reply = chat.send("what?")
    assert (reply.text, reply.thinking, reply.finish_reason) == ("", "let me", "length")
    assert chat.history[-1] == {"role": "model", "content": ""}


WEATHER = {"name": "weather", "description": "Tells it.", "parameters": {"properties": {"place": {"type": "string"}}}}


def test_tool_round_trip():
    written = tools.call("weather", {"place": "Rome"})
    sampler = Scripted(ids("<|tool_call>", *written, "<tool_call|>"), ids("It is blue."))
    chat = g4.Chat(sampler, tools=[WEATHER])
    reply = chat.send("weather?")
    assert (reply.text, reply.tool_calls) == ("", (tools.ToolCall("weather", {"place": "Rome"}),))
    assert "<|tool>declaration:weather{" in sampler.asked()
    with pytest.raises(PromptError, match="2 tool results for 1 tool calls"):
        chat.respond(["a", "b"])
    assert chat.respond([{"sky": "blue"}]).text == "It is blue."
    assert sampler.asked().endswith(
        '<|turn>model\n<|tool_call>call:weather{place:<|"|>Rome<|"|>}<tool_call|>'
        '<|tool_response>response:weather{sky:<|"|>blue<|"|>}<tool_response|>'
    )
    assert [m["role"] for m in chat.history] == ["user", "model", "tool", "model"]
    with pytest.raises(PromptError, match="1 tool results for 0 tool calls"):
        chat.respond(["late"])


def test_media_stay_in_the_history():
    sampler = Scripted(ids("a cat"), ids("yes"))
    chat = g4.Chat(sampler)
    chat.send("what is it?", images=["cat.png"], audio=["purr.wav"])
    chat.send("really?", images=["dog.png"])
    assert sampler.calls[-1][1:4] == ([["cat.png", "dog.png"]], [["purr.wav"]], [[]])
    assert "<|turn>user\n\n\n<|image|>\n\n<|audio|>what is it?<turn|>" in sampler.asked()


def test_failed_turn_leaves_the_conversation_as_it_was():
    chat = g4.Chat(Scripted(ids("yes")))
    with pytest.raises(MediaError, match="broken"):
        chat.send("x", images=[b"broken"])
    assert chat.history == []
    assert chat.send("x").text == "yes"


def test_turns_that_are_no_turns():
    chat = g4.Chat(Scripted(ids("yes")))
    for media, name in (("cat.png", "str"), (np.zeros((2, 2, 3), np.uint8), "ndarray")):
        with pytest.raises(MediaError, match=f"images is {name}; a list of sources is expected"):
            chat.send("x", images=media)
    with pytest.raises(PromptError, match="the text of a turn is NoneType"):
        chat.send(None)
    assert chat.history == []
    assert chat.send("x", images=None, audio=()).text == "yes"


def test_refused_at_the_start():
    with pytest.raises(PromptError, match="a chat needs a tokenizer"):
        g4.Chat(types.SimpleNamespace(tokenizer=None))
    with pytest.raises(PromptError, match="has no name"):
        g4.Chat(Scripted(), tools=[{}])


def test_a_checkpoints_own_template_is_used():
    sampler = Scripted(ids("x"))
    sampler.chat_template = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}"
    g4.Chat(sampler).send("hi <turn|>")
    assert sampler.calls[0][0][0] == ["<bos>", "<|turn>", "hi <turn|>", "<turn|>"]


def test_with_a_real_sampler():
    bundle = g4.init(
        "tiny", config_overrides={"num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention")}
    )
    bundle.processor.options = dataclasses.replace(bundle.processor.options, image_budget=70)
    chat = g4.Chat(g4.Sampler(bundle, max_length=512, draft_tokens=0), temperature=0.0, max_new_tokens=5)
    pieces = []
    reply = chat.send("hi", images=[np.zeros((4, 4, 3), np.uint8)], on_text=lambda f: pieces.append(f.text))
    assert len(reply.tokens) <= 5
    assert "".join(pieces).strip() == reply.text + (reply.thinking or "")
    again = g4.Chat(chat._sampler, temperature=0.0, max_new_tokens=5)
    assert again.send("hi", images=[np.zeros((4, 4, 3), np.uint8)]).tokens == reply.tokens


def terminal(chat, *lines):
    out, left = [], list(lines)

    def read(_):
        if not left:
            raise EOFError
        return left.pop(0)

    TerminalChat(chat, read, out.append).run()
    return "".join(out)


def test_terminal(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "my cat.png")
    sampler = Scripted(ids("<|channel>", "thought\nhm", "<channel|>", "a cat"), ids("yes"))
    chat = g4.Chat(sampler)
    text = terminal(
        chat, "", "/nonsense", "/image nowhere.png", f"/image '{tmp_path}/my cat.png'", "/think", "what is it?",
        "really?", f"/save {tmp_path}/x.jsonl", "/reset", "/help", "/quit", "never read",
    )  # fmt: skip
    assert "! no command /nonsense; choices: /image, /audio" in text
    assert "! /image: 'nowhere.png' is not a file" in text
    assert "thinking is on" in text
    assert "[thinking] hm\n[answer] a cat\n" in text
    assert "12.3 tokens/s, 6 of 8 drafted tokens accepted (75%)]" in text
    assert sampler.calls[0][1] == [[f"{tmp_path}/my cat.png"]]
    saved = json.loads((tmp_path / "x.jsonl").read_text())["messages"]
    assert [m["content"] for m in saved[1::2]] == ["a cat", "yes"]
    assert chat.history == []
    assert terminal(chat).endswith("\n")


def test_terminal_survives_odd_lines(tmp_path, monkeypatch):
    """Paths with an apostrophe or relative ones, a file that is no image, nowhere to save, Ctrl-C in a reply."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "it's.png")
    sampler = Scripted(ids("a cat"), ids("yes"))

    def interrupted(_row, _index, _text):
        raise KeyboardInterrupt

    chat = g4.Chat(sampler)
    text = terminal(chat, "/image it's.png", "/image", "/image no'where.png", "/save", "what?", "/save x.jsonl")
    assert "added it's.png" in text
    assert sampler.calls[0][1] == [[f"{tmp_path}/it's.png"]]
    assert "! /image: '' is not a file" in text
    assert '! /image: "no\'where.png" is not a file' in text
    assert "! /save: give the path of a file" in text
    row = json.loads((tmp_path / "x.jsonl").read_text())
    assert chat_format.media_sources(row["messages"])["image"] == [f"{tmp_path}/it's.png"]
    before = list(chat.history)
    generate = sampler.generate
    sampler.generate = lambda *args, on_token, **more: generate(*args, on_token=interrupted, **more)
    text = terminal(chat, "/image it's.png", "/reset", "never answered", "/quit")
    assert "! stopped; this turn is forgotten" in text
    assert before and chat.history == []
    assert sampler.calls[-1][1] == [[]]  # /reset also drops what was attached


def test_chat_of_a_config(tmp_path):
    layers = {"num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "drafter": None}
    g4.save(g4.init("tiny", config_overrides=layers), tmp_path / "saved")
    section = load_config("configs/chat.py", ROOT)[0].chat
    with pytest.raises(ConfigError, match=r"chat.checkpoint is empty"):
        open_chat(section)
    section.update(checkpoint=str(tmp_path / "saved"), dtype="float32", max_new_tokens=3, max_length=256)
    text = terminal(open_chat(section), "hello")
    assert re.search(r"\[\d+ tokens, [\d.]+ tokens/s", text)
