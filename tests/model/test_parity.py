"""The network against the reference implementation, on small random weights, in f32."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from flax import nnx

import gemma4_jax as g4

TOLERANCE = 2e-4  # of the logit range
WIDTH = 24
LENGTHS = (1, 5, 7, 8, 9, 16, 23)  # below, at and above the window of 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a target and of its drafter, plain and with ordered embeddings, and the reference models."""
    folder = tmp_path_factory.mktemp("peers")
    models = {"target": peers.target(), "drafter": peers.drafter(), "ordered": peers.drafter(seed=3, ordered=True)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder, models


@pytest.fixture(scope="module")
def bundle(saved):
    return g4.load(saved[0] / "target", drafter=saved[0] / "drafter", dtype="float32")


def tokens_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 60, length).tolist()


def assert_close(ours, theirs):
    span = np.max(theirs) - np.min(theirs)
    worst = np.max(np.abs(np.asarray(ours) - theirs))
    assert worst <= TOLERANCE * span, f"{worst} of a range of {span}"


@functools.partial(jax.jit, static_argnums=0)
def compiled(graph, state, tokens, segment_ids, positions):
    model = nnx.merge(graph, state)
    return model.logits(model(tokens, segment_ids=segment_ids, positions=positions).hidden)


def padded_logits(bundle, rows, segments):
    """Rows with their segment ids, filled up to one width; positions restart in each segment."""
    tokens, ids, positions = (np.zeros((len(rows), WIDTH), np.int32) for _ in range(3))
    for i, (row, segment) in enumerate(zip(rows, segments, strict=True)):
        tokens[i, : len(row)], ids[i, : len(row)] = row, segment
        for number in set(segment) - {0}:
            inside = ids[i] == number
            positions[i, inside] = np.arange(inside.sum())
    return np.asarray(compiled(*nnx.split(bundle.model), tokens, ids, positions))


def test_logits_below_at_and_above_the_window(saved, bundle):
    rows = [tokens_of(n, n) for n in LENGTHS]
    ours = g4.logits(bundle, rows)
    assert ours.dtype == jnp.float32
    assert ours.shape == (len(rows), max(LENGTHS), 64)
    assert np.isfinite(ours).all()
    for row, mine in zip(rows, ours, strict=True):
        assert_close(mine[: len(row)], peers.logits(saved[1]["target"], [row])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(saved, bundle, side):
    rows = [tokens_of(n, n) for n in (4, 12, 15)]
    pads = [15 - len(row) for row in rows]
    front = pads if side == "left" else [0] * 3
    back = [0] * 3 if side == "left" else pads
    tokens = [[0] * a + row + [0] * b for a, row, b in zip(front, rows, back, strict=True)]
    mask = [[0] * a + [1] * len(row) + [0] * b for a, row, b in zip(front, rows, back, strict=True)]
    ours = padded_logits(bundle, tokens, mask)
    assert np.isfinite(ours).all()
    mask = peers.torch.tensor(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = peers.logits(saved[1]["target"], tokens, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        place = slice(front[i], front[i] + len(row))
        assert_close(ours[i, place], theirs[i, place])


def test_padding_changes_nothing(bundle):
    """Fault 15: the padding mask is a further AND, so real positions see what they see alone."""
    row = tokens_of(11)
    pads = range(1, 10)
    left = padded_logits(bundle, [[0] * n + row for n in pads], [[0] * n + [1] * 11 for n in pads])
    right = padded_logits(bundle, [row + [0] * n for n in pads], [[1] * 11 + [0] * n for n in pads])
    alone = np.asarray(g4.logits(bundle, [row]))[0]
    for i, n in enumerate(pads):
        np.testing.assert_allclose(left[i, n : n + 11], alone, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(right[i, :11], alone, atol=2e-5, rtol=1e-5)


def test_a_later_token_changes_nothing_before_it(bundle):
    """Fault 15: with a padding mask given, logits at and before t do not depend on token t+1."""
    row, mask = tokens_of(14), [0, 0] + [1] * 14
    changed = {t: [*row[: t + 1], 3 + (row[t + 1] - 2) % 50, *row[t + 2 :]] for t in (0, 6, 12)}
    out = padded_logits(bundle, [[0, 0, *r] for r in (row, *changed.values())], [mask] * 4)[:, 2:]
    for after, t in zip(out[1:], changed, strict=True):
        np.testing.assert_array_equal(out[0, : t + 1], after[: t + 1])
        assert np.abs(out[0, t + 1] - after[t + 1]).max() > 1e-3


def test_packed_equals_separate(saved, bundle):
    rows = [tokens_of(n, n) for n in (5, 12, 3)]
    segments = [number for number, row in enumerate(rows, start=1) for _ in row]
    packed = padded_logits(bundle, [[t for row in rows for t in row]], [segments])
    start = 0
    for row in rows:
        assert_close(packed[0, start : start + len(row)], peers.logits(saved[1]["target"], [row])[0])
        start += len(row)


def test_greedy_64_tokens(saved, bundle):
    prompt = tokens_of(6, 5)
    expected = peers.greedy(saved[1]["target"], prompt, 64)
    row = [*prompt]
    for _ in range(64):
        padding = 80 - len(row)  # one length, so that one program serves all steps
        row.append(int(np.argmax(g4.logits(bundle, [row + [3] * padding])[0, len(row) - 1])))
    assert row[len(prompt) :] == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("kind", ["drafter", "ordered"])
def test_draft_logits_of_the_first_round(saved, bundle, kind):
    """Fault 11: order of the halves, hidden row, constant position, keys of each kind, depth, feedback."""
    if kind == "ordered":
        bundle = g4.load(saved[0] / "target", drafter=saved[0] / "ordered", dtype="float32")
    rows, expected = [], []
    for n in (1, 6, 7, 8, 9, 10, 17, 30):
        prompt = tokens_of(n, n)
        newest, drafted = peers.first_round(saved[1]["target"], saved[1][kind], prompt, 4)
        rows.append([*prompt, newest])
        expected.append(drafted)
    ours = g4.draft_logits(bundle, rows, steps=4)
    assert ours.shape == (4, len(rows), 64)
    for i in range(len(rows)):
        assert_close(ours[:, i], expected[i])
        np.testing.assert_array_equal(np.argmax(ours[:, i], -1), np.argmax(expected[i], -1))


def test_both_config_spellings_and_the_reference_agree(saved, bundle, tmp_path):
    """Fault 16: sizes of global layers from ``per_layer_config`` (zero-padded or not) or from fields of their own."""
    source = saved[0] / "target"
    values = json.loads((source / "config.json").read_text())
    layers = values["text_config"].pop("per_layer_config")
    assert layers == {i: {"head_dim": 32, "num_key_value_heads": 1} for i in ("2", "5")}
    row = tokens_of(12)
    expected = g4.logits(bundle, [row])
    spellings = {
        "fields": {"global_head_dim": 32, "num_global_key_value_heads": 1},
        "padded": {"per_layer_config": {"02": layers["2"], "05": layers["5"]}},
    }
    for name, own in spellings.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(source / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**values, "text_config": {**values["text_config"], **own}}))
        other = g4.load(folder, dtype="float32")
        np.testing.assert_array_equal(g4.logits(other, [row]), expected)


def rope(**full):
    sliding = {"rope_type": "default", "rope_theta": 10_000.0}
    return {"sliding_attention": sliding, "full_attention": full}


SWITCHES = {
    "separate values, no soft-cap": {"attention_k_eq_v": False, "final_logit_softcapping": None},
    "separate values, own heads, half rope": {
        "attention_k_eq_v": False,
        "per_layer_config": {i: {"head_dim": 32, "num_key_value_heads": 4} for i in (2, 5)},
        "rope_parameters": rope(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=500.0),
    },
    "full rope, equal head widths": {
        "global_head_dim": 16,
        "rope_parameters": rope(rope_type="default", rope_theta=1_000_000.0),
    },
    "a tail": {"num_hidden_layers": 5, "layer_types": [*peers.PATTERN[:2], "full_attention", *peers.PATTERN[1:]]},
    "only global": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name, tmp_path):
    model = peers.target(seed=4, media=False, **SWITCHES[name])
    model.save_pretrained(tmp_path)
    row = tokens_of(14)
    assert_close(g4.logits(g4.load(tmp_path, dtype="float32"), [row])[0], peers.logits(model, [row])[0])


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 20.0, "rope_parameters": None}], ids=["27b", "1b"])
def test_gemma3_fits_the_same_decoder(changes, tmp_path):
    """No value norm, separate values, an attention scale, full (scaled) RoPE, no soft-cap, no layer scalars."""
    model = peers.gemma3(**changes)
    model.save_pretrained(tmp_path)
    loaded = g4.load(tmp_path, dtype="float32")
    assert not loaded.config.value_norm
    assert loaded.config.attention_scale == pytest.approx(1 / 3)
    row = tokens_of(14)
    assert_close(g4.logits(loaded, [row])[0], peers.logits(model, [row])[0])


def test_text_only_folder(tmp_path):
    config = peers.text_config()
    model = peers.randomize(peers.transformers.Gemma4UnifiedForCausalLM(config), 6)
    model.save_pretrained(tmp_path)
    loaded = g4.load(tmp_path, dtype="float32")
    assert loaded.config.vision is None
    row = tokens_of(14)
    assert_close(g4.logits(loaded, [row])[0], peers.logits(model, [row])[0])


def test_bfloat16_is_near_its_own_reference(saved):
    """Fault 19: the embedding scale is rounded with the table; what is left is bf16 rounding in between."""
    low = g4.load(saved[0] / "target")
    assert low.config.dtype == low.config.param_dtype == "bfloat16"
    row = tokens_of(14)
    reference = peers.target().to(peers.torch.bfloat16)
    theirs = reference(input_ids=peers.torch.tensor([row])).logits.float().detach().numpy()
    span = theirs.max() - theirs.min()
    exact = peers.logits(saved[1]["target"], [row])
    ours = np.asarray(g4.logits(low, [row]))
    assert np.abs(ours - exact).mean() <= 1.2 * np.abs(theirs - exact).mean() + 1e-3 * span
