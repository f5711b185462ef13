"""Finetuning from a saved model: what moves, what stays, what is refused."""

import json

import jax
import numpy as np
import pytest

import gemma4_jax as g4
import launch
from gemma4_jax.bundle import bundle_weights, with_token_ids
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train import run_config
from gemma4_jax.train.state import Network

FIELDS = [
    "data.seq_len=32", "data.batch_size=8", "loss.mtp_steps=1", "train.steps=2", "train.eval_every=0",
    "train.checkpoint_every=0", "train.final_eval_batches=1", "optimizer.warmup_steps=1", "optimizer.learning_rate=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model in f32 with a byte-level tokenizer, saved as a checkpoint."""
    config = g4.get_preset(
        "tiny", vision=None, audio=None, vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        **{"drafter.num_hidden_layers": 1, "drafter.hidden_size": 16, "drafter.intermediate_size": 16},
    )  # fmt: skip
    tokenizer = train_tokenizer([], config.vocab_size)
    config = with_token_ids(config, tokenizer)
    network = Network(config)
    rng = np.random.default_rng(0)
    weights = {
        name: jax.numpy.asarray(rng.normal(1.0 if "norm" in name else 0.0, 0.05, leaf.shape), leaf.dtype)
        for name, leaf in network.shapes.items()
    }
    model, drafter = network.merge(weights)
    folder = tmp_path_factory.mktemp("base") / "model"
    g4.save(g4.Bundle(config, model, drafter, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "talk.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "model", "content": f"{i}!"}]} for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(kind, base, data, workdir, *more):
    fields = [*FIELDS, f"base.checkpoint={base}", f"data.source=jsonl:{data}", "data.format=chat", *more]
    return ["--config", f"configs/finetune.py:{kind}", "--workdir", str(workdir), *(f"--config.{f}" for f in fields)]


def test_drafter_only_leaves_the_target_alone(base, conversations, tmp_path):
    assert launch.main(command("drafter", base, conversations, tmp_path / "w")) == 0
    before, after = bundle_weights(g4.load(base, dtype=None)), bundle_weights(g4.load(tmp_path / "w", dtype=None))
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        still = np.array_equal(np.asarray(leaf), np.asarray(after[name]))
        stays = name.startswith("model/") or name.endswith("layer_scalar") or "post_projection" in name
        assert still == stays, name
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["train_steps"] == 2 and len(results["acceptance_per_step"]) == 1


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["base.checkpoint=/nowhere"], 3, "/nowhere is not a folder"),
        (["model_overrides.hidden_size=32"], 3, "the base model: drafter/"),
        (["data.seq_len=99999"], 2, "data.seq_len 99999 is more than the model's max_position_embeddings 4096"),
        (["train.trainable=drafter/*"], 2, "train.trainable says nothing about model/"),
    ],
)
def test_bad_input_is_one_line(base, conversations, tmp_path, capsys, more, code, message):
    assert launch.main(command("full", base, conversations, tmp_path / "w", *more)) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_bundled_task_is_trained_asked_and_kept(tmp_path):
    """Two steps on pictures of digits: sound's embedder stays as it was, numbers are there, the run says how it sees."""
    layers = {
        "num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "drafter": None,
        "vision.patch_size": 2, "vision.pooling_kernel_size": 2,
    }  # fmt: skip
    base = g4.init("tiny", config_overrides=layers)
    base.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content[1].text }}{% endfor %}{{ '<|image|>' }}"
    g4.save(base, tmp_path / "base")
    fields = ["train.steps=2", "train.checkpoint_every=0", "train.eval_every=0", "train.final_eval_batches=1",
              "data.workers=0", "optimizer.warmup_steps=1", "answers.count=3", "answers.max_new_tokens=2"]  # fmt: skip
    command = ["--config", "configs/finetune.py:digits", "--workdir", str(tmp_path / "w")]
    fields = [*fields, f"base.checkpoint={tmp_path / 'base'}"]
    assert launch.main([*command, *(f"--config.{field}" for field in fields)]) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["answers_asked"] == results["blind_answers_asked"] == 3
    for name in ("correct", "characters", "positions"):
        assert 0 <= results[f"answers_{name}"] <= 1 and 0 <= results[f"blind_answers_{name}"] <= 1
    assert 0 <= results["input_wait_share"] < 1
    assert "of 3 held-out answers are right" in (tmp_path / "w" / "samples.md").read_text()
    trained = g4.load(tmp_path / "w", dtype=None)
    assert trained.processor.options.image_budget == 70
    assert trained.chat_template == base.chat_template
    before, after = bundle_weights(base), bundle_weights(trained)
    moved = {name for name in before if not np.array_equal(np.asarray(before[name]), np.asarray(after[name]))}
    assert not any(name.startswith("model/audio/") for name in moved)
    assert {name for name in before if name.startswith("model/vision/")} <= moved


def test_asking_needs_conversations(base, conversations, tmp_path, capsys):
    more = ["data.format=text", "answers.ask=True"]
    assert launch.main(command("full", base, conversations, tmp_path / "w", *more)) == 2
    assert "answers.ask needs data.format 'chat', got 'text'" in capsys.readouterr().err


def test_configs():
    config, _, name = run_config.load_config("configs/finetune.py:drafter", launch.ROOT)
    assert (
        name == "finetune-drafter" and config.train.trainable == ("!*", "drafter/*") and config.loss.mtp_stop_gradient
    )
    assert "model" not in config
