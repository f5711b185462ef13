"""Maps laid out for reading: their form by size and dtype, and what they give, against f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import prompts_of, small_bundle

import gemma4_jax as g4
from gemma4_jax.model.layers import Embedder, Linear
from gemma4_jax.sample import columns
from gemma4_jax.sample import weights as reading
from gemma4_jax.sample.columns import paired, paired_product


def map_of(dtype, outputs=96, width=64, seed=0):
    rng = np.random.default_rng(seed)
    source = Linear(width, outputs, dtype=dtype, rngs=nnx.Rngs(0))
    source.weight = nnx.Param(jnp.asarray(rng.standard_normal((outputs, width)), dtype))
    return source


def form_of(read):
    return "pairs" if read.weight[...].dtype == jnp.uint32 else "inputs first" if read.turned else "outputs first"


SHAPES = {"pairs": (32, 96), "inputs first": (64, 96), "outputs first": (96, 64)}


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "small", "measured", "often", "form"),
    [
        ("float32", True, False, False, "inputs first"),
        ("float32", False, True, False, "inputs first"),
        ("float32", False, False, True, "outputs first"),
        ("bfloat16", True, False, False, "inputs first"),
        ("bfloat16", False, True, False, "outputs first"),
        ("bfloat16", False, False, True, "pairs"),
    ],
)
def test_products_of_every_form(monkeypatch, dtype, small, measured, often, form, activations, rows):
    """Operands count as they are stored, weights rounded to the activations' dtype, sums are f32; the result has x's dtype."""
    monkeypatch.setattr(reading, "SMALL", 96 * 64 if small else 96 * 64 - 1)
    monkeypatch.setattr(reading, "inputs_first", lambda: measured)
    source = map_of(dtype)
    read = reading.ReadLinear(source, often=often)
    assert form_of(read) == form
    assert read.widened == (dtype == "bfloat16" and form != "outputs first")
    assert read.weight[...].shape == SHAPES[form]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, rows, 64)), activations)
    found = jax.jit(read)(x)
    assert found.dtype == activations
    assert found.shape == (1, rows, 96)
    weight = np.asarray(source.weight[...].astype(activations), np.float64)
    expected = np.asarray(x, np.float64) @ weight.T
    tolerance = 2e-6 if activations == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("outputs", "width"), [(1, 2), (7, 6), (513, 40), (1200, 96)])
def test_pairs_of_any_size(outputs, width, rows):
    """Also where the last block of columns begins early, and inputs are no multiple of what is written out; in a loop too."""
    weight = map_of("bfloat16", outputs, width).weight[...]
    pairs = paired(weight)
    assert (pairs.shape, pairs.dtype) == ((width // 2, outputs), jnp.uint32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, width)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T

    @jax.jit
    def summed(x, pairs):
        return jax.lax.fori_loop(
            0, 2, lambda _, y: y + paired_product(x, pairs), jnp.zeros(expected.shape, jnp.float32)
        )

    for found, times in ((paired_product(x, pairs), 1), (summed(x, pairs), 2)):
        np.testing.assert_allclose(found, times * expected, atol=4e-6 * np.abs(expected).max())


def test_pairs_are_not_widened_in_memory():
    """Not before a loop either, which would read twice the bytes in each turn."""
    pairs = jax.ShapeDtypeStruct((256, 2048), jnp.uint32)

    @jax.jit
    def chain(x, pairs):
        return jax.lax.fori_loop(0, 4, lambda _, y: paired_product(y, pairs)[:, :512], x)

    compiled = chain.lower(jax.ShapeDtypeStruct((1, 512), jnp.float32), pairs).compile()
    partial = 2048 * 4 * (256 // 8)  # sums of all groups
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * partial


def test_large_f32_is_measured_once(monkeypatch, caplog):
    """And the answer follows the times: a tie leaves outputs first."""
    for turned, expected in ((1.0, True), (1.95, False), (3.0, False)):
        both = [turned * share for share in (0.3, 0.7)] + [2.0 * share for share in (0.4, 0.6)]  # rows of both sizes
        seconds = iter([9.0] * 4 + both * columns.TURNS)
        monkeypatch.setattr(columns, "_seconds", lambda *_, seconds=seconds: next(seconds))
        columns.inputs_first.cache_clear()
        with caplog.at_level("INFO", columns.__name__):
            assert columns.inputs_first() is columns.inputs_first() is expected
    columns.inputs_first.cache_clear()
    assert [record.getMessage().split("; ")[1] for record in caplog.records] == [
        "inputs first",
        "outputs first",
        "outputs first",
    ]


def test_forms_of_a_drafter(monkeypatch):
    """Large bf16 matrices of a drafter are pairs, of the target as they were; the drafter's table is its head alone."""
    monkeypatch.setattr(reading, "SMALL", 1 << 11)  # 64 outputs of 32 inputs
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    found = {}
    for network in (reading.ReadDrafter(bundle.drafter), reading.ReadTarget(bundle.model)):
        maps = [node for _, node in nnx.iter_modules(network) if isinstance(node, reading.ReadLinear)]
        assert all((form_of(node) == "inputs first") == (_size(node) <= 1 << 11) for node in maps)
        found[type(network)] = {form_of(node) for node in maps}
    assert found[reading.ReadDrafter] == {"inputs first", "pairs"}
    assert "pairs" not in found[reading.ReadTarget]
    monkeypatch.setattr(reading, "SMALL", 0)
    embedder = reading.ReadDrafter(bundle.drafter).embedder
    assert embedder.table is None
    assert embedder.head[...].dtype == jnp.uint32
    assert reading.ReadEmbedder(bundle.model.embedder).head is None


def _size(read):
    return read.weight[...].size * (2 if form_of(read) == "pairs" else 1)


@pytest.mark.parametrize("rows", [1, 2])
def test_speculation_with_a_drafter_of_pairs(monkeypatch, rows):
    """The drafter proposes alike in either form, up to the order of sums; the text is the target's own."""
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    prompts = prompts_of([9] * rows)
    outs = []
    for size in (1 << 19, 1 << 8):
        monkeypatch.setattr(reading, "SMALL", size)
        sampler = g4.Sampler(bundle, max_length=64, draft_tokens=3)
        outs.append(sampler.generate(prompts, max_new_tokens=24, stop_ids=[]))
    plain = sampler.with_draft_tokens(0).generate(prompts, max_new_tokens=24, stop_ids=[])
    assert outs[1].tokens == plain.tokens
    assert abs(outs[0].stats.rounds - outs[1].stats.rounds) <= 2


@pytest.mark.parametrize("small", [True, False])
def test_a_bf16_table_is_read_alike_in_either_form(monkeypatch, small):
    """Rows are the table's own numbers scaled, logits f32 of exact products."""
    monkeypatch.setattr(reading, "SMALL", 1 << 19 if small else 0)
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    source = bundle.model.embedder
    assert type(source) is Embedder
    read = reading.ReadEmbedder(source)
    assert read.widened is small
    tokens = jnp.asarray([[3, 9, 0]], jnp.int32)
    np.testing.assert_array_equal(read.encode(tokens, jnp.bfloat16), source.encode(tokens, jnp.bfloat16))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, source.table[...].shape[1])), jnp.bfloat16)
    expected = np.asarray(hidden, np.float64) @ np.asarray(source.table[...], np.float64).T
    found = read.decode(hidden)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_widening_stays_far_within_bf16(monkeypatch):
    """bf16 numbers are exact in f32: sums differ in their order alone, and what that adds up to over all layers is small."""
    bundle = small_bundle(dtype="bfloat16", param_dtype="bfloat16")
    prompt = [np.asarray(prompts_of([9])[0], np.int32)]
    hidden = []
    for size in (1 << 19, 0):
        monkeypatch.setattr(reading, "SMALL", size)
        sampler = g4.Sampler(bundle, max_length=32, draft_tokens=0)
        hidden.append(np.asarray(sampler.prefill(prompt).hidden, np.float32))
    np.testing.assert_allclose(*hidden, atol=0.03 * np.abs(hidden[1]).max())
