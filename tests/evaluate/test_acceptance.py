"""Acceptance against a loop over prefixes, and against what a scripted drafter must give."""

import dataclasses

import numpy as np
import pytest
from small_models import script, script_weights

import gemma4_jax as g4
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.evaluate import decoding_acceptance, teacher_forced_acceptance

TEXT = "for x in y:\n  z"


def test_teacher_forced_first_step_equals_draft_logits(bundle):
    """Prefix by prefix: the drafter's argmax from ``g4.draft_logits``, the target's from ``g4.logits``."""
    ids = bundle.tokenizer.encode(TEXT)
    choice = np.asarray(g4.logits(bundle, [ids])[0]).argmax(-1)
    prefixes = [ids[: t + 1] for t in range(1, len(ids) - 1)]
    drafted = np.asarray(g4.draft_logits(bundle, prefixes, steps=1))[0].argmax(-1)
    expected = np.mean(drafted == choice[1 : len(ids) - 1])
    found = teacher_forced_acceptance(bundle, [TEXT], steps=2, window=32, batch_size=2)
    assert found.per_step[0] == pytest.approx(expected)
    assert found.tokens_per_round == pytest.approx(1 + found.per_step[0] * (1 + found.per_step[1]))
    assert 0 < found.sampled < 1


def test_decoding_with_a_drafter_that_errs_on_purpose(bundle):
    """Right but for its third draft: steps 1 and 2 always kept, step 3 never, three tokens a round."""
    prompts = [bundle.tokenizer.encode("x ="), bundle.tokenizer.encode("def f(")]
    plain = g4.Sampler(bundle, max_length=96, draft_tokens=0)
    answers = plain.generate(prompts, max_new_tokens=40, stop_ids=[]).tokens
    sampler = g4.Sampler(bundle, max_length=96, draft_tokens=4)
    sampler.replace_drafter(script, script_weights(prompts, answers, wrong_step=(2,)))
    found, stats = decoding_acceptance(sampler, prompts, new_tokens=31)
    assert found.per_step == (1.0, 1.0, 0.0, 0.0)
    assert found.tokens_per_round == pytest.approx(3.0) and stats.rounds == 20


def test_refused(bundle):
    with pytest.raises(ConfigError, match="no drafter"):
        teacher_forced_acceptance(dataclasses.replace(bundle, drafter=None), [TEXT], steps=1)
    with pytest.raises(DataError, match="no text to draft in"):
        teacher_forced_acceptance(bundle, [""], steps=1)
    with pytest.raises(ConfigError, match="draft_tokens is 'auto'"):
        decoding_acceptance(g4.Sampler(bundle, max_length=16), [[2, 3]], new_tokens=2)
