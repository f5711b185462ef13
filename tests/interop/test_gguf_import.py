"""GGUF files in: what we wrote comes back, packed blocks as they are, and broken files are named."""

import dataclasses

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemma4_jax as g4
from gemma4_jax import quantize
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop import gguf_import
from gemma4_jax.text.tokenizer import train_tokenizer

CHANGES = {
    "num_hidden_layers": 3,
    "sliding_window_pattern": 2,
    "vision": None,
    "audio": None,
    "partial_rotary_factor": 0.5,
}


@pytest.fixture(scope="module")
def bundle():
    bundle = g4.init("tiny", seed=4, config_overrides=CHANGES)
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, bundle.config.vocab_size)
    config = g4.bundle.with_token_ids(bundle.config, tokenizer)
    return dataclasses.replace(bundle, tokenizer=tokenizer, config=config, chat_template="{{ messages }}")


@pytest.fixture(scope="module")
def files(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for dtype in ("float32", "q8_0", "q4_0"):
        g4.save(bundle, folder / dtype, format="gguf", dtype=dtype)
    return folder


def load(folder, **options):
    return g4.load(next(folder.glob("model-*")), next(folder.glob("drafter-*")), **options)


@pytest.mark.parametrize("dtype", ["float32", "q8_0", "q4_0"])
def test_round_trip(bundle, files, dtype):
    """Configuration, tokenizer, template; weights as the package dequantises what it has quantised."""
    back = load(files / dtype, dtype="float32")
    # A file lists every layer's kind and not the period they were made from, which nothing reads once they are known.
    assert back.config == dataclasses.replace(bundle.config, sliding_window_pattern=back.config.sliding_window_pattern)
    assert back.tokenizer.fingerprint() == bundle.tokenizer.fingerprint()
    assert back.tokenizer.encode("the brown dog<turn|>") == bundle.tokenizer.encode("the brown dog<turn|>")
    assert back.chat_template == bundle.chat_template
    kind = gguf.GGMLQuantizationType[{"float32": "F32"}.get(dtype, dtype.upper())]
    theirs = bundle_weights(bundle)
    for name, leaf in bundle_weights(back).items():
        expected = np.asarray(theirs[name])
        if name.endswith(("_proj/weight", "projection/weight", "/table")):
            expected = gguf.dequantize(gguf.quantize(expected, kind), kind)
        np.testing.assert_array_equal(leaf, expected)


def test_q4_0_blocks_are_taken_as_they_are(files, tmp_path):
    """A file whose largest numbers are not -8: rounding anew would change them."""
    path = next((files / "q4_0").glob("model-*"))
    data = bytearray(path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    blocks = np.array(tensor.data).reshape(-1, 18)
    blocks[:, 2:] = 0x9A  # numbers 2 and 1
    data[tensor.data_offset : tensor.data_offset + blocks.nbytes] = blocks.tobytes()
    changed = tmp_path / "model.gguf"
    changed.write_bytes(data)
    weights = bundle_weights(g4.load(changed, quantization="int4"))
    name = next(n for n in weights if n.startswith("model/groups/") and n.endswith("up_proj/values"))
    first = (0,) * (weights[name].ndim - 2)
    assert (np.asarray(weights[name][first]) == 0x9A).all()


@pytest.mark.parametrize(("scheme", "short"), [("int8", "q8_0"), ("int4", "q4_0")])
def test_packed_weights_leave_and_return_unchanged(bundle, scheme, short, tmp_path):
    small = quantize.quantize_model(bundle, scheme)
    g4.save(small, tmp_path / "out", format="gguf")
    assert (tmp_path / "out" / f"model-{short}.gguf").is_file()
    plain = bundle_weights(quantize.dequantize(small))
    for name, leaf in bundle_weights(load(tmp_path / "out", dtype="float32")).items():
        np.testing.assert_array_equal(leaf, plain[name])
    theirs = bundle_weights(small)
    for name, leaf in bundle_weights(load(tmp_path / "out", dtype="float32", quantization=scheme)).items():
        np.testing.assert_array_equal(leaf, theirs[name])
    g4.save(small, tmp_path / "hf", format="huggingface")
    for name, leaf in bundle_weights(g4.load(tmp_path / "hf", tmp_path / "hf" / "drafter", dtype="float32")).items():
        np.testing.assert_array_equal(leaf, plain[name])


def test_packed_media_projections(tmp_path):
    """Columns of the patch projection change places: rows of int8 stay packed, groups of int4 become f32."""
    bundle = g4.init("tiny", seed=5, config_overrides={**CHANGES, "vision": {"mm_embed_dim": 64}, "audio": {}})
    bundle = dataclasses.replace(bundle, tokenizer=train_tokenizer(["ab ab ab"] * 9, bundle.config.vocab_size))
    order = np.arange(6912).reshape(48, 48, 3).transpose(2, 0, 1).reshape(-1)
    for scheme, kind in (("int8", "Q8_0"), ("int4", "F32")):
        small = quantize.quantize_model(bundle, scheme)
        g4.save(small, tmp_path / scheme, format="gguf")
        tensors = {t.name: t for t in gguf.GGUFReader(next((tmp_path / scheme).glob("mmproj-*"))).tensors}
        found = tensors["v.patch_embd.weight"]
        assert found.tensor_type.name == kind
        expected = np.asarray(quantize.dequantize(small).model.vision.patch_dense.weight[...])[:, order]
        np.testing.assert_array_equal(gguf.dequantize(found.data, found.tensor_type).reshape(expected.shape), expected)


def test_wrong_files_are_named(files, tmp_path):
    model = next((files / "float32").glob("model-*"))
    drafter = next((files / "float32").glob("drafter-*"))
    with pytest.raises(ConfigError, match="architecture is 'gemma4-assistant'; a text model has 'gemma4'"):
        g4.load(drafter)
    with pytest.raises(ConfigError, match="a drafter has 'gemma4-assistant'"):
        g4.load(model, model)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        g4.load(tmp_path / "absent.gguf")
    data = model.read_bytes()
    for size in (10, 200, len(data) - 64):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            g4.load(tmp_path / "cut.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_give_named_errors(files, tmp_path, data):
    """Bytes of the keys and of the table of tensors changed: an error of ours or a sound file, never another exception."""
    original = next((files / "q4_0").glob("drafter-*")).read_bytes()
    content = bytearray(original[:3000])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content + original[3000:])
    try:
        gguf_import.File(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
