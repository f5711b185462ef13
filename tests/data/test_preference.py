"""Preference pairs: what is learnt, how both halves stay together, and what is refused."""

import json

import numpy as np
import pytest

from gemma4_jax.data import DataOptions, get_tokenizer, make_dataset
from gemma4_jax.data.examples import make_encoder
from gemma4_jax.data.preference import PairSplitter, PreferenceEncoder
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user model thought\n hello there, how are you? fine, thanks!\n"] * 3, 340)


def encode(tokenizer, **document):
    (example,) = PreferenceEncoder(tokenizer, "messages")([document], ["here"])
    return example


def sides(tokenizer, example):
    second = list(example.ids).index(tokenizer.bos_id, 1)
    halves = (slice(0, second), slice(second, None))
    return [(list(example.ids)[half], np.asarray(example.learnt)[half]) for half in halves]


def test_halves_are_conversations_of_their_own(tokenizer):
    """Each is what a chat of that answer would be; a prompt is what a user says."""
    example = encode(tokenizer, prompt="how are you?", chosen="fine, thanks!", rejected="no")
    for (ids, learnt), answer in zip(sides(tokenizer, example), ("fine, thanks!", "no"), strict=True):
        messages = [{"role": "user", "content": "how are you?"}, {"role": "model", "content": answer}]
        (chat,) = make_encoder(DataOptions(format="chat"), tokenizer)([{"messages": messages}], ["here"])
        assert ids == list(chat.ids)
        np.testing.assert_array_equal(learnt, chat.learnt)
        assert answer in tokenizer.decode(np.asarray(ids)[learnt])
    assert example.bytes > 0


def test_only_the_last_answer_is_learnt(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "model", "content": "bb"}, {"role": "user", "content": "c"}]
    example = encode(tokenizer, messages=messages, chosen="yes", rejected="thanks")
    for (ids, learnt), answer in zip(sides(tokenizer, example), ("yes", "thanks"), strict=True):
        text = tokenizer.decode(np.asarray(ids)[learnt])
        assert answer in text and "bb" not in text


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "here: one of the fields 'prompt' and 'messages' is needed"),
        ({"prompt": "p", "messages": [], "chosen": "a", "rejected": "b"}, "one of the fields"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field 'prompt' must be a text"),
        ({"messages": [], "chosen": "a", "rejected": "b"}, "field 'messages' must be a list"),
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' must be a text"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "field 'chosen' must be a text"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same answer"),
    ],
)
def test_bad_documents_are_named(tokenizer, document, message):
    with pytest.raises(DataError, match=message):
        encode(tokenizer, **document)


def test_splitting():
    """Two packed pieces of two halves each, and padding."""
    tokens = np.asarray([[2, 5, 2, 6, 7, 2, 8, 9, 2, 4, 0]])
    segments = np.asarray([[1] * 5 + [2] * 5 + [0]])
    batch = {"tokens": tokens, "segment_ids": segments, "positions": None, "loss_mask": tokens > 4}
    split = PairSplitter(2)(batch, [])
    assert split["segment_ids"].tolist() == [[1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 0]]
    assert split["positions"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 0]]
    assert split["segment_ids"].dtype == split["positions"].dtype == np.int32
    assert split["loss_mask"] is batch["loss_mask"]


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": f"{i}!" * (i % 5 + 1), "rejected": "no"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "source": f"jsonl:{path}", "format": "preference", "long_examples": "error", "seq_len": 96, "batch_size": 4,
        "vocab_size": 300,
    }  # fmt: skip


def test_batches_hold_whole_pairs(section, tmp_path):
    """Every row: an even number of segments, bos in front of each, an equal question in both of a pair."""
    tokenizer = get_tokenizer(section, tmp_path)
    data = make_dataset(section, tokenizer, "heldout", tmp_path)
    found = 0
    for batch in data:
        for tokens, segments, positions, learnt in zip(
            batch["tokens"], batch["segment_ids"], batch["positions"], batch["loss_mask"], strict=True
        ):
            count = segments.max()
            assert count % 2 == 0
            for segment in range(1, count + 1):
                here = segments == segment
                assert tokens[here][0] == tokenizer.bos_id
                np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
                assert learnt[here].any()
            for chosen in range(1, count, 2):
                asked = [tokens[segments == s][~learnt[segments == s]] for s in (chosen, chosen + 1)]
                np.testing.assert_array_equal(*[a[: min(map(len, asked)) - 1] for a in asked])
                assert "no" in tokenizer.decode(tokens[(segments == chosen + 1) & learnt])
            found += count // 2
    assert found == sum(report["documents"] for report in data.reports)


def test_pairs_are_never_cut(section, tmp_path):
    with pytest.raises(ConfigError, match="format preference needs data.long_examples error"):
        DataOptions.of({**section, "long_examples": "truncate"})
    short = {**section, "seq_len": 20}
    with pytest.raises(DataError, match="longer than data.seq_len 20"):
        make_dataset(short, get_tokenizer(short, tmp_path), "train", tmp_path)
