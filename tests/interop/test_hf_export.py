"""Hugging Face folders out: the same bits back, in both spellings, and the reference loads them without a complaint."""

import dataclasses
import json
import os

import numpy as np
import peers
import pytest
from safetensors.numpy import load_file

import gemma4_jax as g4
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.config import get_preset
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop import hf_config
from gemma4_jax.interop.hf_export import save_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    models = {"target": peers.target(), "drafter": peers.drafter(ordered=True)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder, models


@pytest.fixture(scope="module")
def bundle(source):
    return g4.load(source[0] / "target", drafter=source[0] / "drafter", dtype="float32")


def write(bundle, path, **options):
    return save_folder(path, bundle.config, bundle_weights(bundle), **options)


@pytest.fixture(scope="module", params=hf_config.SPELLINGS)
def exported(request, bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / request.param
    report = write(bundle, folder, spelling=request.param, shard_bytes=150_000)
    return folder, report


def test_the_same_bits_in_the_file(source, exported):
    folder, report = exported
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    written = {name: value for file in files for name, value in load_file(file).items()}
    original = load_file(source[0] / "target" / "model.safetensors")
    drafter = load_file(folder / "drafter" / "model.safetensors")
    expected = load_file(source[0] / "drafter" / "model.safetensors")
    for ours, theirs in ((written, original), (drafter, expected)):
        assert set(ours) == set(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert report["tensors"] == len(original) + len(expected)
    assert report["files"] == len(files) + 1
    assert report["bytes"] == sum(v.nbytes for part in (original, expected) for v in part.values())


def test_coming_back(bundle, exported):
    folder, _ = exported
    back = g4.load(folder, drafter=folder / "drafter", dtype="float32")
    assert back.config == bundle.config
    ours, theirs = bundle_weights(back), bundle_weights(bundle)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_the_reference_loads_it(source, exported):
    folder, _ = exported
    row = np.random.default_rng(0).integers(3, 60, 14).tolist()
    for name, place, kind in (
        ("target", folder, peers.transformers.Gemma4UnifiedForConditionalGeneration),
        ("drafter", folder / "drafter", peers.transformers.Gemma4UnifiedAssistantForCausalLM),
    ):
        model, info = kind.from_pretrained(place, output_loading_info=True, attn_implementation="eager")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        ours, theirs = (m.config.get_text_config().to_dict() for m in (model, source[1][name]))
        assert ours | {"dtype": None} == theirs | {"dtype": None}
        if name == "target":
            np.testing.assert_array_equal(peers.logits(model, [row]), peers.logits(source[1]["target"], [row]))


def test_global_layers_have_no_value_projection(exported):
    """Fault 16."""
    names = json.loads((exported[0] / "model.safetensors.index.json").read_text())["weight_map"]
    layers = [name.split(".")[3] for name in names if "v_proj" in name]
    assert sorted(layers) == ["0", "1", "3", "4"]


def test_a_text_only_bundle_with_its_tokenizer(tmp_path):
    overrides = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "vision": None, "audio": None, "drafter": None}
    bundle = g4.init("tiny", config_overrides=overrides)
    bundle.chat_template = "{{ bos_token }}"
    g4.save(bundle, tmp_path / "out", format="huggingface", dtype="bfloat16")
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    tokenizer = peers.transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hé 1")["input_ids"] == bundle.tokenizer.encode("Hé 1")
    model = peers.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == peers.torch.bfloat16
    assert model.generation_config.eos_token_id == list(bundle.config.stop_token_ids)
    back = g4.load(tmp_path / "out", dtype=None)
    low = {"dtype": "bfloat16", "param_dtype": "bfloat16", "sliding_window_pattern": 6}  # the last says nothing here
    assert back.config == dataclasses.replace(bundle.config, **low)
    assert back.chat_template == "{{ bos_token }}"


def test_the_12b_config_survives_both_spellings():
    config = get_preset("gemma4_12b")
    for spelling in hf_config.SPELLINGS:
        values = json.loads(json.dumps(hf_config.published_config(config, spelling)))
        drafter = json.loads(json.dumps(hf_config.published_drafter_config(config, spelling)))
        generation = hf_config.published_generation_config(config)
        back = hf_config.model_config(values, generation)
        own = hf_config.drafter_config(drafter, back)
        assert dataclasses.replace(back, drafter=own, dtype="bfloat16", param_dtype="bfloat16") == config
        if spelling == "per_layer_config":
            assert set(values["text_config"][spelling]) == {"05", "11", "17", "23", "29", "35", "41", "47"}


def test_what_cannot_be_expressed_is_named(bundle, tmp_path):
    for field, value in (("value_norm", False), ("attention_scale", 0.5), ("global_rope_scaling_factor", 8.0)):
        with pytest.raises(ConfigError, match=field):
            hf_config.published_config(dataclasses.replace(bundle.config, **{field: value}))
    heads = dataclasses.replace(bundle.config, attention_k_eq_v=False)
    with pytest.raises(ConfigError, match="only the spelling per_layer_config"):
        hf_config.published_config(heads, "global_fields")
    with pytest.raises(ConfigError, match=r"unknown config spelling 'x'.*per_layer_config"):
        hf_config.published_config(bundle.config, "x")


def test_nothing_is_overwritten_or_left_behind(bundle, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="full is not empty; nothing is overwritten"):
        write(bundle, tmp_path / "full")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(bundle, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "x").read_text() == "x"


def test_a_folder_that_cannot_be_made(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        write(bundle, tmp_path / "file" / "out")
