"""Evaluation from the command line: every part on a checkpoint made on the spot."""

import json

import pytest

import gemma4_jax as g4
import launch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {
        "num_hidden_layers": 2,
        "layer_types": ("sliding_attention", "full_attention"),
        "audio": None,
    }
    g4.save(g4.init("tiny", config_overrides={**sizes, "drafter.num_hidden_layers": 1}), folder / "m")
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    (folder / "b.py").write_text('"""Adds."""\n\n\ndef add(a, b):\n    """Sum of two."""\n    return a + b\n' * 5)
    return folder


def command(folder, workdir, *overrides):
    fields = [
        f"bundle.checkpoint={folder / 'm'}", "text.split=whole", "text.window=32", "text.stride=16", "text.batch_size=2",
        f'text.sources=("prose=text:{folder}/a.txt","doc=text:{folder}/b.py#docstrings")', "text.characters=300",
        "acceptance.steps=2", "acceptance.prompts=2", "acceptance.prompt_tokens=8", "acceptance.new_tokens=6",
        "needle.lengths=(128,)", "needle.depths=(0.5,)", "needle.trials=1", *overrides,
    ]  # fmt: skip
    return ["--config", "configs/evaluate.py", "--workdir", str(workdir), *(f"--config.{field}" for field in fields)]


def test_texts_drafts_and_needles(checkpoint, tmp_path):
    assert launch.main(command(checkpoint, tmp_path / "w")) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    for kind, size in (("prose", 300), ("doc", 70)):
        assert results[f"{kind}_bytes"] == size
        assert results[f"{kind}_bits_per_byte"] > 0 and results[f"{kind}_perplexity"] > 1
        for way in ("teacher_forced", "decoding_0", "decoding_1"):
            assert 0 <= results[f"{kind}_acceptance_{way}_2"] <= 1
            assert 1 <= results[f"{kind}_tokens_per_round_{way}"] <= 3
        assert 0 <= results[f"{kind}_acceptance_sampled_teacher_forced_1"] <= 1
    assert results["needle_128_0.5_found"] == 0.0 and "needle_128_0.5_gain" in results
    assert "| prose_bits_per_byte |" in (tmp_path / "w" / "table.md").read_text()
    drawn = {path.name for path in (tmp_path / "w" / "plots").iterdir()}
    assert {
        "acceptance_teacher_forced.png",
        "acceptance_decoding_0.png",
        "needle_found.png",
        "needle_gain.png",
    } <= drawn


def test_digits_and_a_task_of_lm_eval(checkpoint, tmp_path):
    """Only these parts: a random model asked for two digits, seeing and blind, and a task file of our own."""
    (checkpoint / "data.jsonl").write_text(json.dumps({"question": "a b", "answer": " c"}) + "\n")
    (checkpoint / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {checkpoint}/data.jsonl\n"
        'output_type: loglikelihood\ntest_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    parts = [
        "text.sources=()",
        'media.tasks=("digits",)',
        "media.count=2",
        "media.new_tokens=3",
        "media.max_length=512",
    ]
    harness = ['harness.tasks=("mine",)', f"harness.include_path={checkpoint}"]
    assert launch.main(command(checkpoint, tmp_path / "w", *parts, *harness)) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["digits_count"] == 2 and results["digits_exact"] == 0.0 == results["digits_blind_exact"]
    assert results["mine_acc"] == 0.0 and results["mine_perplexity"] > 1
    assert "prose_bytes" not in results


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.sources=()", "nothing to evaluate"),
        ("text.stride=32", "text.stride 32 must be below text.window 32"),
        ("text.sources=x", "write NAME=SPEC"),
        ("text.sources=x=python_stdlib#y", "unknown view of a text 'y'"),
        ("text.split=train", "text.split is 'train'; choices: heldout, whole"),
        ("acceptance.prompt_tokens=1", "acceptance.prompt_tokens is 1; it must be at least 2"),
    ],
)
def test_bad_fields_are_named(checkpoint, tmp_path, capsys, override, message):
    assert launch.main(command(checkpoint, tmp_path / "w", override)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
