"""Sampling from the command line, from a checkpoint made on the spot."""

import json

import gemma4_jax as g4
import launch


def command(checkpoint, workdir, *overrides):
    fields = [f"sample.checkpoint={checkpoint}", "sample.max_length=32", "sample.max_new_tokens=6", *overrides]
    return ["--config", "configs/sample.py", "--workdir", str(workdir), *(f"--config.{field}" for field in fields)]


def test_prompts_are_continued(tmp_path):
    g4.save(g4.init("tiny", seed=0), tmp_path / "model", format="checkpoint")
    arguments = [*command(tmp_path / "model", tmp_path / "w", "sample.draft_tokens=2"), "--profile"]
    assert launch.main(arguments) == 0
    traces = list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))
    assert traces and traces[0].stat().st_size > 1000
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["prompts"] == 3
    assert 3 <= results["new_tokens"] <= 18
    assert results["accepted"] <= results["drafted"]
    assert (tmp_path / "w" / "samples.md").read_text().count("Continuation") == 3


def test_missing_checkpoint_is_named(tmp_path, capsys):
    assert launch.main(command(tmp_path / "nowhere", tmp_path / "w")) in (2, 3)
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert len(error.strip().splitlines()) == 1
