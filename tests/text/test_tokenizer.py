"""Tokenizer: ids, losslessness, control tokens, streaming, and equality with transformers."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast

from gemma4_jax.errors import ConfigError, PromptError
from gemma4_jax.text.tokenizer import (
    BYTE_TOKENS,
    SPECIAL_TOKENS,
    Tokenizer,
    train_tokenizer,
)

CORPUS = [
    "def main(argv):\n    return 0\n\n\nif __name__ == '__main__':\n    main([])\n" * 3,
    "The quick brown fox jumps over the lazy dog; 12345 times.\n\n" * 5,
    "Ein süßer Fuchs — naïve café, 日本語のテキスト。\tTabs\r\nand returns.\n" * 4,
    "<|turn>user\nhello<turn|>\n" * 30 + '<|"|><|"|><|"|>' * 30 + "<0x41>" * 30 + "<unused0>",
]
HARD_TEXTS = (
    ["\n" * n for n in range(1, 32)]
    + [" " * n for n in range(1, 32)]
    + ["a" + "\n" * n + "b" + " " * n + "c" for n in (1, 2, 3, 7, 31)]
    + [
        "🙂",
        "👩‍👩‍👧‍👦🏽 flag 🇩🇪",
        "e\u0301 vs é",
        "ก็ नि",
        "\u202eright to left\u200b",
        "x\x00y\x07",
        "\ufffd \ufeff",
        "\r\n\r\r",
    ]
    + ["<turn|>", "<|turn>user\n", "<bos>a<eos>", "<pad>", "<unk>", '<|"|>', "<|image|>", "<0x0A>", "<unused3>", ""]
)
# U+2581 is the one character that the form itself folds into a space.
TEXT = st.text(alphabet=st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 512)


@pytest.fixture(scope="module")
def peers(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return [
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
        AutoTokenizer.from_pretrained(folder),
        GemmaTokenizer.from_pretrained(folder),
    ]


def test_table_layout(tokenizer):
    assert tokenizer.vocab_size == 512
    assert [tokenizer.token_name(i) for i in range(6)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>"]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.special_ids == {tokenizer.token_id(name) for name in SPECIAL_TOKENS}
    assert [tokenizer.token_id(name) for name in BYTE_TOKENS] == list(range(len(SPECIAL_TOKENS), 280))
    assert len({tokenizer.token_name(i) for i in range(512)}) == 512


def test_small_corpus_fills_the_table_with_unused_entries():
    tokenizer = train_tokenizer(["aaaa aaaa"], 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.token_name(299).startswith("<unused")
    assert tokenizer.decode(tokenizer.encode("<unused0> aé"), skip_special=True) == "<unused0> aé"


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(iter(CORPUS), 512).to_json() == tokenizer.to_json()


@pytest.mark.parametrize("vocab_size", [281, 282, 290, 377])
def test_small_tables(vocab_size):
    tokenizer = train_tokenizer(CORPUS, vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert all(tokenizer.decode(tokenizer.encode(text), skip_special=True) == text for text in CORPUS)


def test_too_small_table_is_refused():
    with pytest.raises(ConfigError, match="vocab_size 100 is below the 281 fixed entries"):
        train_tokenizer(CORPUS, 100)


def test_exactly_one_bos(tokenizer):
    assert tokenizer.encode("a")[0] == 2
    assert tokenizer.encode("a").count(2) == 1
    assert 2 not in tokenizer.encode("a", bos=False)
    assert tokenizer.encode("") == [2]
    rendered = tokenizer.encode("<bos><|turn>user\nhi<turn|>\n", allow_control=True)
    assert rendered.count(2) == 1
    assert rendered[:2] == [2, tokenizer.token_id("<|turn>")]


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_control_strings_in_a_text_stay_text(tokenizer, name):
    index = tokenizer.token_id(name)
    for text in (name, f"a{name}b", f"{name}{name}\n"):
        ids = tokenizer.encode(text, bos=False)
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == text
        allowed = tokenizer.encode(text, bos=False, allow_control=True)
        assert allowed.count(index) == text.count(name)
        assert tokenizer.decode(allowed) == text
        assert name not in tokenizer.decode(allowed, skip_special=True)


def test_byte_names_in_a_text_stay_text(tokenizer):
    assert tokenizer.token_id("<0x41>") not in tokenizer.encode("<0x41>")


@pytest.mark.parametrize("text", HARD_TEXTS, ids=ascii)
def test_hard_texts_survive_and_equal_the_peers(tokenizer, peers, text):
    ids = tokenizer.encode(text)
    assert ids[0] == 2
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    allowed = tokenizer.encode(text, allow_control=True)
    for peer in peers:
        assert peer(text, split_special_tokens=True)["input_ids"] == ids
        if not text.startswith("<bos>"):
            assert peer(text)["input_ids"] == allowed
        assert peer.decode(ids[1:]) == text


@settings(max_examples=200, deadline=None)
@given(TEXT)
@example(" a\n\n\n b  ")
def test_any_text_survives(tokenizer, text):
    for allow_control in (False, True):
        ids = tokenizer.encode(text, bos=False, allow_control=allow_control)
        assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == text
    assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_any_text_equals_the_peers(tokenizer, peers, text):
    for peer in peers:
        assert peer(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 511)), st.booleans())
def test_streaming_equals_decoding_for_any_ids(tokenizer, ids, skip_special):
    stream = tokenizer.stream(skip_special)
    parts = [stream.push(index) for index in ids]
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids, skip_special)


def test_streaming_waits_for_whole_characters(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("🙂a", bos=False)
    assert [stream.push(index) for index in ids] == ["", "", "", "🙂", "a"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(CORPUS, bos=False) == [tokenizer.encode(text, bos=False) for text in CORPUS]


def test_absent_names_raise_and_never_become_unk(tokenizer):
    with pytest.raises(PromptError, match="'<end_of_turn>'"):
        tokenizer.token_id("<end_of_turn>")
    assert tokenizer.token_id("<unk>") == 3
    for index in (-1, 512):
        with pytest.raises(PromptError, match=f"token id {index} is outside"):
            tokenizer.decode([index])


def test_bad_texts_are_named(tokenizer):
    with pytest.raises(PromptError, match="U\\+D800 at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(PromptError, match="got bytes"):
        tokenizer.encode(b"ab")
    with pytest.raises(PromptError, match="U\\+DC80"):
        train_tokenizer(["\udc80"], 512)


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode("a<|turn>é🙂") == tokenizer.encode("a<|turn>é🙂")
        assert loaded.fingerprint() == tokenizer.fingerprint()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("<bos> x") == tokenizer.encode("<bos> x")
    assert np.array_equal(copy.byte_lengths(), tokenizer.byte_lengths())


def test_settings_of_a_loaded_folder_are_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer", "model_max_length": 7}')
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"] == 7


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (None, None),
        ("{{ x }}", "{{ x }}"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_template_inside_of_the_settings(tokenizer, stored, found):
    settings = {} if stored is None else {"chat_template": stored}
    assert Tokenizer.from_json(tokenizer.to_json(), settings).chat_template == found
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("stored", "message"), [(7, "chat_template is int"), ([{"name": "rag", "template": "r"}], "choices: rag")]
)
def test_bad_template_inside_of_the_settings(tokenizer, stored, message):
    with pytest.raises(PromptError, match=message):
        Tokenizer.from_json(tokenizer.to_json(), {"chat_template": stored}).chat_template  # noqa: B018


def test_control_tokens_that_a_file_lists_as_ordinary_are_still_guarded(tokenizer):
    description = json.loads(tokenizer.to_json())
    for token in description["added_tokens"]:
        token["special"] = token["content"] == "<bos>"
    loaded = Tokenizer.from_json(json.dumps(description))
    assert loaded.encode("a<|turn>b") == tokenizer.encode("a<|turn>b")
    assert loaded.special_ids == tokenizer.special_ids


def test_missing_or_broken_files_are_named(tmp_path):
    with pytest.raises(PromptError, match=r"no tokenizer at .*tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PromptError, match=r"tokenizer.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PromptError, match="no field 'model'"):
        Tokenizer.load(tmp_path)


def test_other_forms_stream_too(tmp_path):
    """A tokenizer without byte fallback is decoded by its own rules, streamed or not."""
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "hello": 4, "world": 5}
    description = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    tokenizer = Tokenizer.from_json(json.dumps(description))
    ids = tokenizer.encode("hello world")
    assert ids == [2, 4, 5]
    assert tokenizer.decode(ids, skip_special=True) == "hello world"
    stream = tokenizer.stream()
    assert [stream.push(4), stream.push(5), stream.flush()] == ["hello", " world", ""]
