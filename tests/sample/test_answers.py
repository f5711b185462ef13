"""Scoring of answers: exact and by character, blanked media, and what is refused."""

import types

import numpy as np
import pytest

from gemma4_jax.data.tasks import Digits, question
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.sample.answers import AnswerOptions, edit_distance, score_answers
from gemma4_jax.text.tokenizer import train_tokenizer


class Looks:
    """A sampler that names the brightest digit it was trained on by heart: right exactly when it sees the picture."""

    chat_template = None
    tokenizer = train_tokenizer([], 320)

    def __init__(self):
        source = Digits("heldout")
        self.known = {}
        for index in range(len(source)):
            content, answer = source[index]["messages"]
            self.known[np.asarray(content["content"][0]["image"]).tobytes()] = answer["content"]
        self.batches = []

    def generate(self, prompts, images, audio, videos, max_new_tokens):
        self.batches.append(len(prompts))
        return types.SimpleNamespace(
            texts=[f" {self.known.get(np.asarray(row[0]).tobytes(), 'zero')}\n" for row in images]
        )


def test_seeing_and_blind():
    sampler = Looks()
    score = score_answers(sampler, Digits("heldout"), 50, batch_size=20)
    assert (score.exact, score.characters, score.positions, score.count, score.wrong) == (1.0, 1.0, 1.0, 50, ())
    assert sampler.batches == [20, 20, 10]
    blind = score_answers(sampler, Digits("heldout"), 50, blind=True)
    assert blind.exact < 0.3
    assert max(blind.positions, blind.characters) < 0.6
    assert len(blind.wrong) == 8
    assert blind.wrong[0][1] == "zero"


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("123", "123", 0), ("123", "13", 1), ("123", "1123", 1), ("kitten", "sitting", 3)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_shares_of_characters():
    """One digit left out: one edit of four, but only what stands before it is at its place."""
    sampler = types.SimpleNamespace(tokenizer=Looks.tokenizer, chat_template=None)
    sampler.generate = lambda prompts, **_: types.SimpleNamespace(texts=["134"] * len(prompts))
    document = {"talk": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "1234"}]}
    score = score_answers(sampler, [document], field="talk")
    assert (score.exact, score.characters, score.positions) == (0.0, 0.75, 0.25)


def test_declared_tools_are_in_the_prompt():
    asked = []
    sampler = types.SimpleNamespace(tokenizer=Looks.tokenizer, chat_template=None)
    sampler.generate = lambda prompts, **_: asked.extend(prompts) or types.SimpleNamespace(texts=["y"] * len(prompts))
    messages = [{"role": "user", "content": "x"}, {"role": "model", "content": "y"}]
    score_answers(sampler, [{"messages": messages, "tools": [{"name": "weather"}]}])
    assert "declaration:weather{" in "".join(asked[0])


@pytest.mark.parametrize("field", ["count", "batch_size", "max_new_tokens"])
def test_options(field):
    with pytest.raises(ConfigError, match=rf"answers.{field} is -1; it must be at least [01]"):
        AnswerOptions(**{field: -1})


def test_refused():
    with pytest.raises(DataError, match="no conversations to score"):
        score_answers(Looks(), [])
    unanswered = {"messages": question("image", np.zeros((2, 2)), "x", "y")["messages"][:1]}
    with pytest.raises(DataError, match="conversation 0 does not end with an answer"):
        score_answers(Looks(), [unanswered])
