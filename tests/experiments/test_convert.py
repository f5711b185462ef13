"""Conversions from the command line: there and back with the same weights, and a report that adds up."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gemma4_jax as g4
import launch
from gemma4_jax.bundle import bundle_weights

OVERRIDES = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "vision": None, "audio": None}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    bundle = g4.init("tiny", seed=3, config_overrides=OVERRIDES)
    g4.save(bundle, folder / "checkpoint")
    return folder / "checkpoint", bundle


def convert(kind, source, workdir, *fields):
    flags = [f"--config.convert.{field}" for field in (f"source={source}", *fields)]
    return launch.main(["--config", f"configs/convert.py:{kind}", "--workdir", str(workdir), *flags])


def test_to_hugging_face_and_back(start, tmp_path):
    source, bundle = start
    assert convert("to_hf", source, tmp_path / "a") == 0
    report = json.loads((tmp_path / "a" / "results.json").read_text())
    output = Path(report["output"])
    assert report["tensors"] == len(bundle_weights(bundle))
    assert report["bytes_after"] == sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    sums = json.loads((tmp_path / "a" / "checksums.json").read_text())
    assert sums["config.json"] == hashlib.sha256((output / "config.json").read_bytes()).hexdigest()
    assert "drafter/model.safetensors" in sums
    assert convert("from_hf", output, tmp_path / "b", f"drafter={output / 'drafter'}") == 0
    back = g4.load(tmp_path / "b" / "output", dtype=None)
    theirs = bundle_weights(bundle)
    for name, leaf in bundle_weights(back).items():
        np.testing.assert_array_equal(leaf, theirs[name])


def test_bad_arguments_are_one_line(start, tmp_path, capsys):
    assert convert("to_onnx", start[0], tmp_path / "w") == 2
    assert "choices: from_hf, to_hf, to_gguf, quantize" in capsys.readouterr().err
    assert convert("to_gguf", start[0], tmp_path / "x") == 2  # a tokenizer without merges
    assert "no merges" in capsys.readouterr().err
    assert convert("to_hf", tmp_path / "absent", tmp_path / "y") != 0
    error = capsys.readouterr().err
    assert "absent is not a folder" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x" / "output").exists()


def test_quantize_from_hugging_face(start, tmp_path):
    """The report adds up; an interrupted run, which leaves a half-written result, is done again over it."""
    _, bundle = start
    g4.save(bundle, tmp_path / "hf", format="huggingface")
    half = tmp_path / "a" / "output" / "params"
    source = tmp_path / "hf"
    fields = (f"drafter={source / 'drafter'}", "quantization=int8")
    assert convert("quantize", source, tmp_path / "a", *fields) == 0
    (tmp_path / "a" / "results.json").unlink()
    shutil.rmtree(tmp_path / "a" / "output")
    half.mkdir(parents=True)
    (half / "junk").write_text("half")
    assert convert("quantize", source, tmp_path / "a", *fields) == 0
    report = json.loads((tmp_path / "a" / "results.json").read_text())
    assert report["quantization"] == "int8"
    back = g4.load(report["output"], dtype=None)
    assert back.quantization == "int8"
    assert report["bytes_in_memory"] == sum(leaf.nbytes for leaf in bundle_weights(back).values())
    assert report["bytes_in_memory"] < 0.35 * report["bytes_before"]
    assert not (half / "junk").exists()
    assert convert("quantize", source, tmp_path / "b", *fields) == 0
    a, b = (
        # data files have names drawn at random
        {name for name in json.loads((tmp_path / run / "checksums.json").read_text()) if "/d/" not in name}
        for run in "ab"
    )
    assert a == b
    assert (
        convert("quantize", source, tmp_path / "c", f"output={report['output']}", *fields) != 0
    )  # nothing is overwritten
