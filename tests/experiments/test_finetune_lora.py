"""Finetuning with adapters from the command line: on plain and packed weights, and by preference."""

import json

import jax
import numpy as np
import pytest

import gemma4_jax as g4
import launch
from gemma4_jax.bundle import bundle_weights, merge_lora, with_token_ids
from gemma4_jax.model.lora import is_adapter
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train.state import Network

FIELDS = [
    "data.seq_len=64", "data.batch_size=8", "loss.mtp_weight=0.0", "train.steps=2", "train.eval_every=0", "lora.rank=2",
    "train.checkpoint_every=0", "train.final_eval_batches=1", "optimizer.warmup_steps=1", "optimizer.learning_rate=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose rows fill the groups of int4, with a byte-level tokenizer, as a checkpoint."""
    config = g4.get_preset(
        "tiny", vision=None, audio=None, drafter=None, vocab_size=300, hidden_size=32, intermediate_size=32,
        num_hidden_layers=2, sliding_window_pattern=2,
    )  # fmt: skip
    tokenizer = train_tokenizer([], config.vocab_size)
    config = with_token_ids(config, tokenizer)
    network = Network(config)
    rng = np.random.default_rng(0)
    weights = {
        name: jax.numpy.asarray(rng.normal(1.0 if "norm" in name else 0.0, 0.1, leaf.shape), leaf.dtype)
        for name, leaf in network.shapes.items()
    }
    model, _ = network.merge(weights)
    folder = tmp_path_factory.mktemp("base") / "model"
    g4.save(g4.Bundle(config, model, None, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    talk = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "model", "content": "!"}]} for i in range(40)]
    pairs = [{"prompt": f"{i}?", "chosen": "!", "rejected": "."} for i in range(40)]
    for name, rows in {"talk": talk, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"chat": folder / "talk.jsonl", "preference": folder / "pairs.jsonl"}


def command(kind, base, data, workdir, *more):
    form = "preference" if kind == "dpo" else "chat"
    fields = [*FIELDS, f"base.checkpoint={base}", f"data.source=jsonl:{data[form]}", f"data.format={form}", *more]
    return ["--config", f"configs/finetune.py:{kind}", "--workdir", str(workdir), *(f"--config.{f}" for f in fields)]


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """A finished run of ``finetune:lora``."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert launch.main(command("lora", base, data, workdir)) == 0
    return workdir


def test_a_run_keeps_the_base_and_its_adapters(base, run):
    before, after = bundle_weights(g4.load(base, dtype=None)), bundle_weights(g4.load(run, dtype=None))
    assert all(np.array_equal(leaf, after[name]) for name, leaf in before.items())
    added = {name: leaf for name, leaf in after.items() if name not in before}
    assert added and all(is_adapter(name) and "self_attn" in name for name in added)
    assert all(np.any(leaf) for leaf in added.values())
    assert json.loads((run / "results.json").read_text())["train_steps"] == 2


def test_merged_files_give_the_same_logits(run, tmp_path):
    bundle = g4.load(run, dtype=None)
    g4.save(bundle, tmp_path / "hf", format="huggingface")
    rows = [[5, 6, 7, 8, 9]]
    want = g4.logits(bundle, rows)
    np.testing.assert_allclose(g4.logits(g4.load(tmp_path / "hf", dtype=None), rows), want, atol=1e-5)
    np.testing.assert_allclose(g4.logits(merge_lora(bundle), rows), want, atol=1e-5)


def test_going_on_from_adapters(run, data, tmp_path, capsys):
    """Another rank is refused, unless they are merged first; the plan says what would train."""
    assert launch.main(command("lora", run, data, tmp_path / "w", "lora.rank=3")) == 2
    assert "has adapters of rank 2, but lora.rank is 3" in capsys.readouterr().err
    more = ("lora.rank=3", "base.merge_adapters=True")
    assert launch.main([*command("lora", run, data, tmp_path / "w", *more), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "self_attn/q_proj/lora/*" in line and "model" in line.split()[0]][:1]
    assert row.split()[-1] == "%"
    assert any(line.startswith("all that trains") for line in lines)
    assert not (tmp_path / "w").exists()


def test_a_plan_needs_the_base(data, tmp_path, capsys):
    assert launch.main([*command("lora", "/nowhere", data, tmp_path / "w"), "--dry_run"]) == 0
    assert "no plan without the base model: /nowhere is not a folder" in capsys.readouterr().out


def test_packed_base(base, data, tmp_path):
    """Saved packed, loaded packed, and merged into plain weights."""
    assert launch.main(command("qlora", base, data, tmp_path / "w")) == 0
    bundle = g4.load(tmp_path / "w", dtype=None)
    assert bundle.config.quantization == "int4" and bundle.config.lora.rank == 2
    kinds = {leaf.dtype.name for name, leaf in bundle_weights(bundle).items() if name.endswith("/values")}
    assert kinds == {"uint8", "int8"}
    rows = [[5, 6, 7, 8, 9]]
    merged = merge_lora(bundle)
    assert merged.config.quantization is None
    np.testing.assert_allclose(g4.logits(merged, rows), g4.logits(bundle, rows), atol=1e-4)


def test_preference(base, data, tmp_path):
    assert launch.main(command("dpo", base, data, tmp_path / "w", "train.steps=6")) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["reward_margin"] > 0 and results["reward_accuracy"] > 0.5
    assert results["preference_loss"] < np.log(2)
    g4.load(tmp_path / "w", dtype=None)
