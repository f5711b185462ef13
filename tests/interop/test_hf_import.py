"""Reading Hugging Face folders: what is right loads bit for bit, what is wrong is named before anything is read."""

import json
import shutil

import ml_dtypes
import numpy as np
import peers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gemma4_jax as g4
from gemma4_jax.errors import CheckpointError, ConfigError, PromptError
from gemma4_jax.interop import hf_config, hf_import, names
from gemma4_jax.interop.safetensors_io import read_header, write_file
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train.state import Network

SCALAR = "model.language_model.layers.3.layer_scalar"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A target of six layers in one file, in shards, and its drafter."""
    folder = tmp_path_factory.mktemp("published")
    model = peers.target()
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    peers.drafter(ordered=True).save_pretrained(folder / "drafter")
    return folder


@pytest.fixture(scope="module")
def tensors(source):
    return load_file(source / "single" / "model.safetensors")


@pytest.fixture
def folder(source, tmp_path):
    """A copy to damage."""
    shutil.copytree(source / "single", tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, tensors, **changes):
    """The folder's tensors with some replaced, or removed (None)."""
    kept = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def read(folder):
    """Weights of a target folder as numpy, by our names."""
    values = hf_config.read_json(folder / "config.json")
    config = hf_config.model_config(values)
    rows = names.target_rows(config, names.LAYOUTS[values["model_type"]])
    return rows, hf_import.load_weights(folder, rows, Network(config).shapes, place=lambda name, leaf: leaf)


def test_every_tensor_lands_in_its_place(source, tensors):
    rows, weights = read(source / "single")
    assert {row.published for row in rows} == set(tensors)
    assert set(weights) == set(
        Network(hf_config.model_config(hf_config.read_json(source / "single/config.json"))).shapes
    )
    for row in rows:
        leaf = weights[row.ours][row.index]
        np.testing.assert_array_equal(leaf, tensors[row.published])


def test_shards_load_alike(source):
    assert len(list((source / "sharded").glob("*.safetensors"))) > 3
    ours, theirs = read(source / "sharded")[1], read(source / "single")[1]
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_global_layers_have_no_value_projection(source):
    """Fault 16."""
    rows, _ = read(source / "single")
    values = [row.published for row in rows if "v_proj" in row.published]
    assert [name.split(".")[3] for name in values] == ["0", "1", "3", "4"]


def test_casting_rounds_to_nearest(source, tensors):
    bundle = g4.load(source / "single", dtype="bfloat16")
    table = np.asarray(bundle.model.embedder.table[...])
    assert table.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(table, tensors["model.language_model.embed_tokens.weight"].astype(ml_dtypes.bfloat16))


def test_no_dtype_keeps_what_is_stored(source):
    assert g4.load(source / "single", dtype=None).config.param_dtype == "float32"


def damaged(name):
    """Tensors to change for each kind of damage, and what the message must name."""
    projection = "model.language_model.layers.2.self_attn.k_proj.weight"
    values = "model.language_model.layers.5.self_attn.v_proj.weight"
    return {
        "a scalar is missing": ({SCALAR: None}, SCALAR),
        "a matrix is missing": ({projection: None}, projection),
        "an extra tensor": ({values: np.ones((32, 64), np.float32)}, values),
        "a layer too many": ({"model.language_model.layers.6.layer_scalar": np.ones(1, np.float32)}, "layers.6"),
        "a shape": ({projection: np.ones((64, 32), np.float32)}, projection),
        "a scalar's shape": ({SCALAR: np.ones((), np.float32)}, SCALAR),
        "a whole-number dtype": ({projection: np.ones((32, 64), np.int32)}, projection),
        "a NaN": ({projection: np.full((32, 64), np.nan, np.float32)}, projection),
        "an infinity": ({SCALAR: np.full(1, np.inf, np.float32)}, SCALAR),
        "another head": ({"lm_head.weight": np.ones((64, 64), np.float32)}, "lm_head.weight"),
        "a head of another shape": ({"lm_head.weight": np.ones((65, 64), np.float32)}, "lm_head.weight"),
        "the table under two names": (
            {"model.embed_vision.patch_ln1.bias": np.ones(108, np.float32)}, "model.vision_embedder.patch_ln1.bias"
        ),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["a scalar is missing", "a matrix is missing", "an extra tensor", "a layer too many", "a shape", "a scalar's shape",
     "a whole-number dtype", "a NaN", "an infinity", "another head", "a head of another shape",
     "the table under two names"],
)  # fmt: skip
def test_wrong_tensors_are_named(folder, tensors, name):
    """Fault 5 (a scalar that is not loaded) and its whole kind."""
    changes, culprit = damaged(name)
    rewrite(folder, tensors, **changes)
    with pytest.raises(CheckpointError, match=culprit) as error:
        read(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_tied_head_is_accepted(folder, tensors):
    rewrite(folder, tensors, **{"lm_head.weight": tensors["model.language_model.embed_tokens.weight"]})
    read(folder)


def test_module_names_of_the_reference_are_accepted(folder, tensors):
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("model.vision_embedder.", "model.embed_vision.")
        name = name.replace(
            "embed_vision.embedding_projection", "embed_vision.multimodal_embedder.embedding_projection"
        )
        renamed[name] = value
    save_file(renamed, folder / "model.safetensors")
    read(folder)


def test_overflow_in_a_cast_is_named(folder, tensors):
    rewrite(folder, tensors, **{SCALAR: np.full(1, 1e6, np.float32)})
    with pytest.raises(CheckpointError, match="overflows float16"):
        g4.load(folder, dtype="float16")


@pytest.fixture
def shards(source, tmp_path):
    shutil.copytree(source / "sharded", tmp_path / "shards")
    return tmp_path / "shards"


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard(shards):
    file = index_of(shards)[SCALAR]
    (shards / file).unlink()
    with pytest.raises(CheckpointError, match=f"shard {file} is missing"):
        read(shards)


def test_an_index_that_names_an_absent_tensor(shards):
    write_index(shards, {**index_of(shards), "model.ghost": index_of(shards)[SCALAR]})
    with pytest.raises(CheckpointError, match=r"model\.ghost is not in"):
        read(shards)


def test_an_index_that_omits_a_tensor(shards):
    weight_map = index_of(shards)
    del weight_map[SCALAR]
    write_index(shards, weight_map)
    with pytest.raises(CheckpointError, match=f"{SCALAR} is in"):
        read(shards)


def test_a_tensor_in_two_shards(shards):
    weight_map = index_of(shards)
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[SCALAR])
    save_file({**load_file(shards / other), SCALAR: np.ones(1, np.float32)}, shards / other)
    with pytest.raises(CheckpointError, match=SCALAR):
        read(shards)


def test_an_index_that_leaves_the_folder(shards):
    write_index(shards, {**index_of(shards), SCALAR: "../../etc/passwd"})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        read(shards)


def test_shards_without_an_index(shards):
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        read(shards)


def test_a_truncated_shard(shards):
    path = shards / index_of(shards)[SCALAR]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{path.name}: truncated"):
        read(shards)


def test_pickled_weights_are_never_opened(tmp_path, source):
    shutil.copy(source / "single" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled and is never opened"):
        read(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        g4.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        g4.load(tmp_path)


def test_token_ordering_must_be_a_permutation(source, tmp_path):
    shutil.copytree(source / "drafter", tmp_path / "drafter")
    path = tmp_path / "drafter" / "model.safetensors"
    save_file({**load_file(path), "masked_embedding.token_ordering": np.zeros(64, np.int64)}, path)
    with pytest.raises(CheckpointError, match="not a permutation"):
        g4.load(source / "single", drafter=tmp_path / "drafter", dtype="float32")
    save_file({**load_file(path), "masked_embedding.token_ordering": np.arange(64, dtype=np.float32)}, path)
    with pytest.raises(CheckpointError, match="an integer one is needed"):
        g4.load(source / "single", drafter=tmp_path / "drafter", dtype="float32")


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_mutated_files_never_crash(data, tmp_path_factory):
    """Whatever the bytes: a header that can be trusted, or a named error."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int32)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path.write_bytes(bytes(content))
    try:
        found, _ = read_header(path)
    except CheckpointError as error:
        one_line = "\n" not in str(error)
        found = {} if one_line else None
    assert found is not None
    for tensor in found.values():
        assert tensor.read().shape == tensor.shape


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{{"a":{ONE},"a":{ONE}}}', "'a' appears twice"),
        (f'{{"a":{ONE},"b":{ONE}}}', "tensors a and b share bytes"),
        ('{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', "dtype F8_E4M3"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "malformed"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}', "needs 12 bytes"),
        ('{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}', "truncated"),
        ("[1]", "not an object"),
        ("{", "not valid JSON"),
    ],
)  # fmt: skip
def test_malformed_headers_are_named(tmp_path, text, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_writing_is_read_by_the_reference(tmp_path):
    values = {"a": np.ones((2, 3), ml_dtypes.bfloat16), "b": np.arange(4, dtype=np.int64)}
    size = write_file(tmp_path / "x.safetensors", {n: (v.dtype, v.shape) for n, v in values.items()}, values.get)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    for name, value in load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(value, values[name])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


CHANGES = {
    "attention_bias": True,
    "hidden_activation": "relu",
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "use_bidirectional_attention": "all",
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 16,
    "rope_parameters": {"full_attention": {"rope_type": "yarn"}},
    "per_layer_config": {"0": {"head_dim": 32}},
    "head_dim": None,
    "layer_types": ["full_attention"] * 5 + ["sliding_attention"],
}


@pytest.mark.parametrize("field", CHANGES)
def test_unsupported_settings_are_named(source, field):
    values = json.loads((source / "single" / "config.json").read_text())
    values["text_config"][field] = CHANGES[field]
    with pytest.raises(ConfigError, match=f"text_config.{field}"):
        hf_config.model_config(values)


@pytest.mark.parametrize("layers", [{"9": {}}, {"5": {}, "05": {}}, {"x": {}}, {"5": {"sliding_window": 4}}, {"2": {}}])
def test_bad_layer_maps_are_named(source, layers):
    values = json.loads((source / "single" / "config.json").read_text())
    values["text_config"]["per_layer_config"] = {"5": {"head_dim": 32}, **layers}
    with pytest.raises(ConfigError, match="per_layer_config"):
        hf_config.model_config(values)


def test_unknown_families_are_named(source):
    with pytest.raises(ConfigError, match="'llama' is not supported; choices: gemma4_unified"):
        hf_config.model_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match="this is a drafter"):
        g4.load(source / "drafter")
    with pytest.raises(ConfigError, match="model_type is 'gemma4_unified'"):
        g4.load(source / "single", drafter=source / "single")


@pytest.mark.parametrize(("field", "value"), [("sliding_window", 16), ("head_dim", 8), ("vocab_size", 65)])
def test_a_drafter_of_another_target_is_refused(source, field, value):
    target = hf_config.model_config(json.loads((source / "single" / "config.json").read_text()))
    values = json.loads((source / "drafter" / "config.json").read_text())
    values["text_config"][field] = value
    with pytest.raises(ConfigError, match=f"drafter {field} is {value} but the target's is"):
        hf_config.drafter_config(values, target)
    values = {**json.loads((source / "drafter" / "config.json").read_text()), "backbone_hidden_size": 32}
    with pytest.raises(ConfigError, match="backbone_hidden_size is 32 but the target's hidden_size is 64"):
        hf_config.drafter_config(values, target)


def test_stop_ids_are_the_union(tmp_path):
    """Fault 24: the generation list and the tokenizer's eos; a name outside of the vocabulary is an error, not unk."""
    tokenizer = train_tokenizer([], 300)
    tokenizer.settings = {"eos_token": "<eos>"}
    assert hf_config.stop_token_ids([7], {"eos_token_id": [106, 50]}, tokenizer) == (106, 50, 1)
    assert hf_config.stop_token_ids([7], {"eos_token_id": [1, 106, 50]}, tokenizer) == (1, 106, 50)
    assert hf_config.stop_token_ids([7], {"eos_token_id": 9}) == (9,)
    assert hf_config.stop_token_ids([7], {}, tokenizer) == (7, 1)
    tokenizer.settings = {"eos_token": {"content": "<turn|>"}}
    assert hf_config.stop_token_ids([1], {}, tokenizer) == (1, tokenizer.token_id("<turn|>"))
    tokenizer.settings = {"eos_token": "<end_of_turn>"}
    with pytest.raises(PromptError, match="<end_of_turn>"):
        hf_config.stop_token_ids([1], {}, tokenizer)


def test_a_folder_with_tokenizer_and_generation_settings(folder):
    tokenizer = train_tokenizer([], 300)
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 13], "suppress_tokens": [20]}')
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    bundle = g4.load(folder, dtype="float32")
    assert bundle.config.stop_token_ids == (5, 13, 1)
    assert bundle.config.suppress_tokens == (20,)
    assert bundle.config.image_token_id == 60
    assert bundle.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert bundle.chat_template == "{{ bos_token }}"
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ messages }}"}))
    assert g4.load(folder, dtype="float32").chat_template == "{{ bos_token }}"
    (folder / "chat_template.jinja").unlink()
    assert g4.load(folder, dtype="float32").chat_template == "{{ messages }}"
