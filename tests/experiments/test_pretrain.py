"""Pretraining from the command line to results.json, on a corpus made on the spot."""

import json

import numpy as np
import pytest

import gemma4_jax as g4
import launch
from experiments import report
from gemma4_jax.train.metrics import read_metrics

SMALL = [
    "model_overrides.hidden_size=16", "model_overrides.intermediate_size=16", "model_overrides.num_hidden_layers=2",
    "model_overrides.drafter.num_hidden_layers=1", "loss.mtp_steps=2", "data.seq_len=32", "train.steps=3",
    "train.eval_every=0", "train.checkpoint_every=0", "train.final_eval_batches=2", "optimizer.warmup_steps=1",
]  # fmt: skip


def command(source, workdir, *overrides):
    fields = [*SMALL, f"data.source={source}", *overrides]
    return [
        "--config",
        "configs/pretrain.py:tiny",
        "--workdir",
        str(workdir),
        *(f"--config.{field}" for field in fields),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps"]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 80)) + ".\n")
    return f"text:{folder}/*.txt"


def test_from_corpus_to_results(corpus, tmp_path):
    overrides = ("samples.prompts=2", "samples.prompt_tokens=6", "samples.new_tokens=8")
    assert launch.main(command(corpus, tmp_path / "w", *overrides)) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    for field in (
        "params", "train_tokens", "tokens_per_second", "val_bits_per_byte", "xz_bits_per_byte",
        "next_token_loss_without_mtp_delta", "acceptance_per_step", "mean_accepted", "decode_tokens_per_second",
        "speculative_tokens_per_second", "speedup", "speedup_vs_best_plain", "acceptance_sampled",
        "speculative_equals_greedy",
    ):  # fmt: skip
        assert field in results
    assert results["speculative_equals_greedy"] is True and results["speculative_compared_tokens"] == 16
    assert len(results["acceptance_per_step"]) == 2
    assert 0 < results["val_bits_per_byte"] < 20 and results["train_tokens"] <= 3 * 8 * 32
    assert [row["kind"] for row in read_metrics(tmp_path / "w")] == ["train", "eval"]
    text = (tmp_path / "w" / "samples.md").read_text()
    assert text.count("Continuation") == 2 and "## 2" in text
    bundle = g4.load(tmp_path / "w", dtype=None)  # the run's folder is a checkpoint
    assert bundle.tokenizer.token_id("<eos>") in bundle.config.stop_token_ids
    assert launch.main(command(corpus, tmp_path / "w", *overrides, "seed=1")) == 2  # another config: refused


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("text:/nowhere/*.txt", 3, "/nowhere/*.txt"),
        ("books", 2, "books"),
        ("jsonl:/nowhere/x.jsonl", 3, "/nowhere/x.jsonl"),
    ],
)
def test_bad_sources(tmp_path, capsys, source, code, message):
    assert launch.main(command(source, tmp_path / "w")) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_drafted_tokens_are_marked():
    class Tokens:
        def stream(self):
            return self

        def push(self, token):
            return {1: "a", 2: "<", 3: ""}[token]

        def flush(self):
            return "!"

    assert report._marked(Tokens(), [1, 2, 3, 1, 2], [False, True, True, True, False]) == "a<b>&lt;a</b>&lt;!"
