"""Needles: contexts of the asked length with the fact in its place; a model that looks them up finds all of them."""

import types

import pytest

from gemma4_jax.errors import ConfigError
from gemma4_jax.evaluate import Scorer, needle_scores
from gemma4_jax.evaluate.needle import QUESTION


class Looks:
    """A sampler that searches its prompt for the fact, as far back as it remembers."""

    def __init__(self, tokenizer, memory):
        self.tokenizer, self.memory, self.prompts = tokenizer, memory, []

    def generate(self, prompts, max_new_tokens, stop_ids):
        self.prompts += prompts
        return types.SimpleNamespace(tokens=[self._answer(prompt) for prompt in prompts])

    def _answer(self, prompt):
        text = self.tokenizer.decode(prompt[-self.memory :])
        name = text[text.rindex("of ") + 3 : text.rindex(" is")]
        _, found, rest = text.partition(f"number of {name} is ")
        number = rest.partition(".")[0]
        return self.tokenizer.encode(f" {number}." if found and number.isdigit() else "?", bos=False)


def test_lengths_depths_and_what_is_found(bundle):
    filler = bundle.tokenizer.encode("import os\n" * 40, bos=False)
    sampler = Looks(bundle.tokenizer, memory=160)
    scores = needle_scores(sampler, filler, lengths=(150, 300), depths=(0.0, 1.0), trials=3)
    assert [(s.length, s.depth, s.found, s.gain) for s in scores] == [
        (150, 0.0, 1.0, None), (150, 1.0, 1.0, None), (300, 0.0, 0.0, None), (300, 1.0, 1.0, None),
    ]  # fmt: skip
    assert [len(prompt) for prompt in sampler.prompts] == [150] * 6 + [300] * 6
    assert bundle.tokenizer.decode(sampler.prompts[0][1:20]).startswith("\nThe secret")
    assert len(set(map(tuple, sampler.prompts))) == 12
    question = QUESTION.format(name="")[:-3]
    assert all(question in bundle.tokenizer.decode(prompt) for prompt in sampler.prompts)


def test_gain_is_finite_for_a_real_model(bundle):
    filler = bundle.tokenizer.encode("import os\n" * 40, bos=False)
    sampler = Looks(bundle.tokenizer, memory=0)
    (score,) = needle_scores(
        sampler, filler, lengths=(128,), depths=(0.5,), trials=2, scorer=Scorer(bundle, batch_size=2)
    )
    assert score.gain is not None and abs(score.gain) < 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (20,)}, "a context of 20 tokens does not hold fact and question"),
        ({"depths": (1.5,)}, "depth 1.5 is not in"),
        ({"filler": []}, "no text to hide"),
    ],
)
def test_refused(bundle, fields, message):
    values = {"filler": [5], "lengths": (200,), "depths": (0.5,), "trials": 1, **fields}
    with pytest.raises(ConfigError, match=message):
        needle_scores(Looks(bundle.tokenizer, 1), values.pop("filler"), **values)
