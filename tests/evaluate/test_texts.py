"""Kinds of text: what is read of them, and what is refused."""

import ast

import pytest

from gemma4_jax.data import data_defaults
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.evaluate.texts import docstrings, read_texts, spread_prompts

MODULE = '"""One."""\n\n\nclass A:\n    """Two."""\n\n    def f(self):\n        """Three."""\n        return "no"\n'


def test_docstrings():
    assert sorted(docstrings(MODULE).split("\n\n")) == ["One.", "Three.", "Two."]
    assert docstrings("x = 1\n") == ""


def test_held_out_code_and_its_prose():
    kinds = ("code=python_stdlib", "prose=python_stdlib#docstrings")
    texts = read_texts(kinds, data_defaults(), split="heldout", characters=20_000)
    assert {name: sum(map(len, pieces)) for name, pieces in texts.items()} == {"code": 20_000, "prose": 20_000}
    ast.parse(texts["code"][0])
    assert "import " in "".join(texts["code"])
    of_whole_modules = list(filter(None, map(docstrings, texts["code"][:-1])))
    assert of_whole_modules and texts["prose"][: len(of_whole_modules)] == of_whole_modules


def test_prompts_are_spread_evenly(bundle):
    ids = bundle.tokenizer.encode("abcdefgh", bos=False)
    found = spread_prompts(bundle.tokenizer, ["abcd", "efgh"], 2, 3)
    assert found == [[bundle.tokenizer.bos_id, *ids[:2]], [bundle.tokenizer.bos_id, *ids[3:5]]]
    assert spread_prompts(bundle.tokenizer, ["a"], 0, 3) == []


def test_refused(tmp_path):
    (tmp_path / "a.txt").write_text("   ")
    for entry, error, message in (
        ("python_stdlib", ConfigError, "write NAME=SPEC"),
        ("a=python_stdlib#x", ConfigError, "unknown view of a text 'x'"),
        (f"a=text:{tmp_path}/a.txt", DataError, "has no text"),
    ):
        with pytest.raises(error, match=message):
            read_texts((entry,), data_defaults(), split="whole", characters=0)
