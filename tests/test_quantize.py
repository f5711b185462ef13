"""Packed weights: the gguf package's own numbers, the planned bytes, and models that compute with them."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import gemma4_jax as g4
from gemma4_jax import packed, quantize
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.config import get_preset
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.model.layers import Linear
from gemma4_jax.train.state import Network

KIND = gguf.GGMLQuantizationType
SMALL = {"num_hidden_layers": 3, "sliding_window_pattern": 2, "vocab_size": 96}


def numbers(shape, dtype, seed=0):
    """Random weights with rows of zeros, ties of either sign first, and one block of a single value."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    w[3] = 0
    w[5, :32] = 1
    w[6, :4] = [-4, 4, 4, -4]
    w[7, :4] = [4, -4, -4, 4]
    return w


def host_pack(w, scheme):
    values, scale = (np.empty(s.shape, s.dtype) for s in packed.packed_shapes(w.shape, scheme))
    packed.pack_into(w, values, scale)
    return values, scale


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_numbers_are_those_of_the_gguf_package(scheme, dtype):
    """int4 is Q4_0; int8 is Q8_0 where a row is one block. On the host, traced, and back."""
    w = numbers((40, 32) if scheme == "int8" else (40, 256), dtype)
    kind = KIND.Q8_0 if scheme == "int8" else KIND.Q4_0
    file = gguf.quantize(w.astype(np.float32), kind)
    blocks = file.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    values, scale = host_pack(w, scheme)
    np.testing.assert_array_equal(scale.reshape(-1, 1).view(np.uint8), blocks[:, :2])
    np.testing.assert_array_equal(values.view(np.uint8).reshape(blocks[:, 2:].shape), blocks[:, 2:])
    traced = jax.jit(packed.pack, static_argnums=1)(w, scheme)  # may fuse, so that ties fall otherwise
    assert np.mean(np.asarray(traced[0]) != values) < 0.02
    np.testing.assert_array_equal(traced[1], scale)
    np.testing.assert_array_equal(packed.unpack(values, scale), gguf.dequantize(file, kind).reshape(w.shape))


def test_int8_rows_are_one_block_each():
    w = numbers((8, 96), np.float32)
    values, scale = host_pack(w, "int8")
    expected = np.abs(w).max(-1, keepdims=True) / 127
    np.testing.assert_array_equal(scale, expected.astype(np.float16))
    # Half a step of the row, and what rounding the scale to f16 moves its largest number.
    assert (np.abs(packed.unpack(values, scale) - w) <= (0.5 + 127 * 2.0**-11) * expected).all()


def test_stacks_keep_their_leading_axes():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 8, 64)), jnp.bfloat16)
    for scheme in quantize.SCHEMES:
        values, scale = quantize.pack_leaf(w, scheme)
        for ours, part in zip((values, scale), host_pack(np.asarray(w[1, 2]), scheme), strict=True):
            np.testing.assert_array_equal(ours[1, 2], part)


def test_columns_of_packed_weights():
    w = numbers((16, 128), np.float32)
    for scheme in quantize.SCHEMES:
        values, scale = packed.pack(jnp.asarray(w), scheme)
        whole = packed.unpack(values, scale)
        for columns in (slice(None, 64), slice(64, None)):
            part = packed.unpack(*packed.input_columns(values, scale, columns))
            np.testing.assert_array_equal(part, whole[:, columns])


@pytest.fixture(scope="module")
def bundle():
    return g4.init("tiny", seed=1, config_overrides=SMALL)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_model_computes_what_it_stands_for(bundle, scheme):
    """Target and drafter: logits of the packed weights against those of the unpacked ones."""
    small = quantize.quantize_model(bundle, scheme)
    assert small.quantization == scheme
    plain = quantize.dequantize(small)
    assert plain.quantization is None
    assert set(bundle_weights(plain)) == set(bundle_weights(bundle))
    rows = [[2, 5, 9, 31, 7], [2, 8, 60]]
    ours, theirs = g4.logits(small, rows), g4.logits(plain, rows)
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * float(jnp.ptp(theirs)))
    drafts = g4.draft_logits(plain, rows, steps=2)
    np.testing.assert_allclose(g4.draft_logits(small, rows, steps=2), drafts, atol=2e-4 * float(jnp.ptp(drafts)))
    assert float(jnp.abs(theirs - g4.logits(bundle, rows)).max()) > 1e-4


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_everything_that_is_a_matrix_is_packed(bundle, scheme):
    """Fault 26: stored dtypes and bytes changed, drafter and media projections included."""
    small = quantize.quantize_model(bundle, scheme)
    weights, before = bundle_weights(small), bundle_weights(bundle)
    assert weights["model/embedder/values"].dtype == jnp.int8
    assert weights["drafter/embedder/scale"].shape == (96, 1)
    kind = jnp.int8 if scheme == "int8" else jnp.uint8
    for part in ("model/vision/patch_dense", "model/audio/embedding_projection", "drafter/pre_projection"):
        assert weights[f"{part}/values"].dtype == kind
    assert "model/vision/patch_dense/bias" in weights
    for module in (small.model, small.drafter):
        kinds = {type(m) for _, m in nnx.iter_modules(module)}
        assert Linear not in kinds
        assert not [v for v in jax.tree.leaves(nnx.state(module, nnx.Param)) if v.ndim > 3]
    plan = quantize.planned_bytes(before, quantize.packed_of(weights), scheme)
    assert sum(leaf.nbytes for leaf in weights.values()) == plan
    # Of what was a matrix: the table of positions, f32 in either form, is over half of a model as small as this.
    matrices = sum(before[name].nbytes for name in quantize.packed_of(weights))
    rest = sum(leaf.nbytes for name, leaf in before.items() if name not in quantize.packed_of(weights))
    assert plan - rest < (0.26 if scheme == "int8" else 0.15) * matrices
    kept = {name for name, leaf in weights.items() if leaf.ndim > 1 and not quantize.is_packed(name)}
    assert {name for name in kept if not name.startswith("model/groups/")} == {"model/vision/pos_embedding"}


def test_the_check_sees_what_was_not_packed(bundle):
    config = dataclasses.replace(bundle.config, quantization="int4")
    network = Network(config)
    weights = quantize.quantize_weights(bundle_weights(bundle), network)
    plan = sum(leaf.nbytes for leaf in weights.values())
    quantize.check_packed(weights, network, plan)
    name = "drafter/pre_projection/values"
    for change, message in (
        ({name: jnp.zeros((32, 128), jnp.float32)}, "after quantisation"),
        ({name: None}, "lack"),
    ):
        changed = {k: v for k, v in {**weights, **change}.items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            quantize.check_packed(changed, network, plan)
    with pytest.raises(CheckpointError, match="were planned"):
        quantize.check_packed(weights, network, plan * 2)


def test_bad_requests_are_named(bundle):
    with pytest.raises(ConfigError, match="unknown quantization 'int3'"):
        quantize.quantize_model(bundle, "int3")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize.quantize_model(quantize.quantize_model(bundle, "int8"), "int8")
    with pytest.raises(ConfigError, match="not quantised"):
        quantize.dequantize(bundle)
    with pytest.raises(ConfigError, match="down_proj has rows of 48 numbers; int4 needs a multiple of 32"):
        Network(get_preset("tiny", intermediate_size=48, quantization="int4"))


def test_gradients_pass_packed_weights():
    """x gets the gradient of the unpacked product; fake quantisation hands its own straight through."""
    w = jnp.asarray(numbers((8, 64), np.float32))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 64)), jnp.float32)
    values, scale = packed.pack(w, "int4")
    found = jax.grad(lambda x: jnp.sum(jnp.sin(packed.packed_matmul(x, values, scale))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ packed.unpack(values, scale).T)))(x)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    rounded, gradient = jax.value_and_grad(lambda w: jnp.sum(packed.fake_quantize(w, "int4") * w[::-1]))(w)
    del rounded
    np.testing.assert_array_equal(packed.fake_quantize(w, "int4"), packed.unpack(values, scale))
    assert gradient.shape == w.shape


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_checkpoints_keep_the_bits(bundle, scheme, tmp_path):
    small = quantize.quantize_model(bundle, scheme)
    g4.save(small, tmp_path / "packed")
    g4.save(bundle, tmp_path / "plain")
    for back in (
        g4.load(tmp_path / "packed", dtype=None),
        g4.load(tmp_path / "packed", dtype="float32", quantization=scheme),
        g4.load(tmp_path / "plain", dtype=None, quantization=scheme),
    ):
        assert back.quantization == scheme
        theirs = bundle_weights(small)
        for name, leaf in bundle_weights(back).items():
            assert leaf.dtype == theirs[name].dtype
            np.testing.assert_array_equal(leaf, theirs[name])
    other = {"int8": "int4", "int4": "int8"}[scheme]
    with pytest.raises(ConfigError, match=f"holds weights in '{scheme}'"):
        g4.load(tmp_path / "packed", quantization=other)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_import_packs_as_it_reads(bundle, scheme, tmp_path):
    """From a Hugging Face folder: the numbers that packing the whole model gives."""
    g4.save(bundle, tmp_path / "hf", format="huggingface")
    back = g4.load(tmp_path / "hf", tmp_path / "hf" / "drafter", dtype="float32", quantization=scheme)
    theirs = bundle_weights(quantize.quantize_model(bundle, scheme))
    ours = bundle_weights(back)
    assert set(ours) == set(theirs)
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        np.testing.assert_array_equal(leaf, theirs[name])


def test_a_mesh_holds_packed_weights(bundle, tmp_path):
    g4.save(bundle, tmp_path / "hf", format="huggingface")
    grid = np.asarray(jax.devices()[:2]).reshape(1, 1, 2)
    mesh = jax.sharding.Mesh(grid, ("data", "fsdp", "tensor"))
    back = g4.load(tmp_path / "hf", dtype="float32", quantization="int4", mesh=mesh)
    ours = bundle_weights(back)
    assert len(ours["model/embedder/values"].sharding.device_set) == 2
    theirs = bundle_weights(quantize.quantize_model(bundle, "int4"))
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name])
