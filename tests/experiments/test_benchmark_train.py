"""The training benchmark runs from the command line at tiny size; what it says is consistent."""

import json

import pytest

import launch


def test_both_sides_measured(tmp_path):
    overrides = (
        "options.model=tiny",
        "options.batch_size=2",
        "options.seq_len=16",
        "options.rounds=1",
        "benchmark.threads=1",
    )
    flags = [f"--config.{field}" for field in overrides]
    workdir = tmp_path / "w"
    assert launch.main(["--config", "configs/benchmark.py:train", "--workdir", str(workdir), "--profile", *flags]) == 0
    assert [path.name for path in (workdir / "profile").iterdir()] == ["ours"]
    (trace,) = (workdir / "profile" / "ours").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    results = json.loads((workdir / "results.json").read_text())
    assert results["tokens_per_step"] == 32
    ratio = results["ours_tokens_per_second"] / results["transformers_tokens_per_second"]
    assert results["speed_ratio"] == pytest.approx(ratio)
    assert results["ours_peak_gigabytes"] > 0
    assert "speed_ratio" in (workdir / "table.md").read_text()


def test_unknown_mode_lists_the_choices(tmp_path, capsys):
    assert launch.main(["--config", "configs/benchmark.py:walk", "--workdir", str(tmp_path / "w")]) == 2
    assert "train" in capsys.readouterr().err
