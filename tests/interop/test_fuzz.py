"""Published folders with changed descriptions, and places that cannot be written: one line that names the culprit."""

import copy
import json
import resource
import shutil

import numpy as np
import peers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma4_jax as g4
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop import hf_config, hf_import
from gemma4_jax.text.tokenizer import train_tokenizer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    peers.target().save_pretrained(folder / "shards", max_shard_size="200KB")
    return folder / "shards"


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(draw, values):
    """The values with one to three places replaced or removed."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(values))[1:] or [("x",)]))
        node = values
        for key in path[:-1]:
            node = node[key]
        if isinstance(node, dict) and draw(st.booleans()):
            node.pop(path[-1], None)
        else:
            node[path[-1]] = draw(JSON)
    return values


def one_line(function, *args):
    """Calls it; only our errors may come out, and each must be one line."""
    try:
        function(*args)
    except (CheckpointError, ConfigError) as error:
        return "\n" not in str(error)
    return True


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_configurations(shards, data):
    values = json.loads((shards / "config.json").read_text())
    assert one_line(hf_config.model_config, changed(data.draw, values))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_changed_indices(shards, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "changed-index"
    if not folder.exists():
        shutil.copytree(shards, folder)
    values = json.loads((shards / hf_import.INDEX).read_text())
    (folder / hf_import.INDEX).write_text(json.dumps(changed(data.draw, values)))
    assert one_line(hf_import.list_tensors, folder)


@pytest.fixture(scope="module")
def bundle():
    bundle = g4.init("tiny", config_overrides={"num_hidden_layers": 2, "sliding_window_pattern": 2, "vision": None})
    bundle.tokenizer = train_tokenizer(["ab ab ab"] * 9, bundle.config.vocab_size)
    return bundle


@pytest.mark.parametrize("form", ["huggingface", "gguf", "checkpoint"])
def test_a_full_disk(bundle, form, tmp_path):
    """No file may grow beyond 16 kB here: an error with the path, and nothing that looks complete."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(CheckpointError, match=r"out.* (be written|write)|cannot write .*out") as error:
            g4.save(bundle, tmp_path / "out", format=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError):
        g4.load(tmp_path / "out")
    g4.save(bundle, tmp_path / "out", format=form)  # what was left does not stand in the way


@pytest.mark.parametrize("form", ["huggingface", "gguf", "checkpoint"])
def test_a_folder_that_cannot_be_written(bundle, form, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file/out") as error:
        g4.save(bundle, tmp_path / "file" / "out", format=form)
    assert "\n" not in str(error.value)


def test_what_a_killed_process_left_is_removed(bundle, tmp_path):
    left = tmp_path / ".out.999999999.tmp"
    (left / "drafter").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    g4.save(bundle, tmp_path / "out", format="huggingface")
    assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_weight_that_is_not_finite_stops_a_packed_import(shards, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(shards, tmp_path / "copy")
    name = "model.language_model.layers.2.self_attn.k_proj.weight"
    file = json.loads((shards / hf_import.INDEX).read_text())["weight_map"][name]
    tensors = load_file(tmp_path / "copy" / file)
    tensors[name][3, 5] = np.inf
    save_file(tensors, tmp_path / "copy" / file)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite numbers"):
        g4.load(tmp_path / "copy", quantization="int8")
