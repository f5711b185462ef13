"""The bridge to lm-eval: its numbers are ours, and those of its own class on the exported model."""

import json

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import gemma4_jax as g4
from gemma4_jax.errors import ConfigError
from gemma4_jax.evaluate.harness import Gemma4LM, run_tasks
from gemma4_jax.sample import policy

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
KINDS = {
    "choice": ("multiple_choice", 'doc_to_target: "{{label}}"\ndoc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n'
               "  - metric: acc_norm\n"),
    "answer": ("generate_until", 'doc_to_target: "{{answer}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n'
               "  do_sample: false\nmetric_list:\n  - metric: exact_match\n"),
    "whole": ("loglikelihood_rolling", 'doc_to_target: "{{question}}"\nmetric_list:\n  - metric: bits_per_byte\n'
              "  - metric: word_perplexity\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, bundle):
    """A folder of three tasks; the answers of half the questions are what the model says."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, rows = np.random.default_rng(0), []
    questions = ["import os", "for i in range", "def add(a, b):", "class Queue(", "x = [1, 2", "return self."]
    sampler = g4.Sampler(bundle, max_length=64, draft_tokens=0)
    said = sampler.generate(questions, max_new_tokens=8).texts
    for index, (question, text) in enumerate(zip(questions, said, strict=True)):
        choices = [f" {word}" for word in rng.choice(["path", "3]", "None", "object", "len(x)"], 3, replace=False)]
        answer = text.split("\n")[0] if index % 2 else "nothing"
        assert "\N{REPLACEMENT CHARACTER}" not in answer  # bytes that are no text look different in every tokenizer
        rows.append({"question": question, "choices": choices, "label": index % 3, "answer": answer})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, rest) in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", data=data, kind=kind, rest=rest))
    return folder, rows


@pytest.fixture(scope="module")
def model(bundle):
    return Gemma4LM(bundle, batch_size=4, max_length=64, draft_tokens=2)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_registered_under_its_name():
    assert get_model("gemma4_jax") is Gemma4LM


def test_log_likelihoods_are_our_own(bundle, model, log_probabilities):
    pairs = [("import os", " path"), ("x", "yz = 3"), ("", "return"), ("a b c d", " e")]
    found = model.loglikelihood(requests("loglikelihood", *pairs))
    for (context, target), (value, greedy) in zip(pairs, found, strict=True):
        row, start = bundle.tokenizer.encode(context + target), len(bundle.tokenizer.encode(context))
        assert value == pytest.approx(log_probabilities(row)[start - 1 :].sum(), abs=1e-5)
        choice = np.asarray(g4.logits(bundle, [row])[0]).argmax(-1)[start - 1 : -1]
        assert greedy == bool((choice == row[start:]).all())


def test_answers_end_at_stop_strings(model, bundle):
    prompts = ["import os", "x = [1, 2"]
    whole = g4.Sampler(bundle, max_length=64, draft_tokens=0).generate(prompts, max_new_tokens=12).texts
    stops = [text[len(text) // 2 :][:2] for text in whole]
    settings = [{"until": [stop], "max_gen_toks": 12} for stop in stops]
    found = model.generate_until(requests("generate_until", *zip(prompts, settings, strict=True)))
    assert found == [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]


def test_equal_scores_on_the_exported_model(bundle, tasks, tmp_path, monkeypatch):
    """Every kind of task, by lm-eval's own ``hf`` class on the Hugging Face folder."""
    monkeypatch.setattr(policy, "CANDIDATES", (0, policy.PROBE))  # each draft length is compiled
    folder, _ = tasks
    names = [f"local_{name}" for name in KINDS]
    ours = run_tasks(bundle, names, include_path=str(folder), batch_size=4, max_length=64)
    g4.save(bundle, tmp_path / "exported", format="huggingface")
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=2, max_length=64),
        tasks=names, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
    )["results"]  # fmt: skip
    expected = {
        f"{task}_{key.partition(',')[0]}": value
        for task, values in theirs.items()
        for key, value in values.items()
        if key.endswith(",none") and "stderr" not in key
    }
    assert set(ours) == set(expected) and len(ours) >= 5
    assert ours["local_answer_exact_match"] == 0.5
    for name, value in ours.items():
        assert value == pytest.approx(expected[name], rel=1e-5), name


def test_refused(bundle, model):
    with pytest.raises(ConfigError, match="unknown model argument 'prtrained'"):
        Gemma4LM(bundle, prtrained=1)
    with pytest.raises(ConfigError, match="generation setting 'num_beams'"):
        model.generate_until(requests("generate_until", ("x", {"num_beams": 2})))
    with pytest.raises(ConfigError, match="max_gen_toks 64 leaves no room"):
        model.generate_until(requests("generate_until", ("x", {"max_gen_toks": 64})))
