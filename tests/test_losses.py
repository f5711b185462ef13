"""Next-token and multi-token losses: weights and denominators (faults 7, 8, 14), and a per-position reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma4_jax as g4
from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import (
    LossConfig,
    compute_losses,
    draft_agreement,
    evaluation_sums,
    loss_denominators,
    next_token_weights,
    shifted_weights,
)
from gemma4_jax.model.drafter import cross_attend
from gemma4_jax.model.rope import rope_table

CONFIG = get_preset(
    "tiny", vocab_size=64, num_hidden_layers=2, sliding_window_pattern=2, sliding_window=3, vision=None, audio=None,
    **{"drafter.hidden_size": 16, "drafter.intermediate_size": 24},
)  # fmt: skip
LOSS = LossConfig(mtp_steps=2, token_chunk=7, vocab_chunk=48)


@pytest.fixture(scope="module")
def parts():
    bundle = g4.init(CONFIG, seed=1)
    return nnx.split((bundle.model, bundle.drafter))


def batch(rows=2, length=11, seed=0):
    """Two packed examples and padding in each row; some tokens are not supervised."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([[1, 2, 0]], rows, 0).repeat([length - 7, 5, 2], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (length - 7, 5, 2)])
    return {
        "tokens": jnp.asarray(rng.integers(0, 64, (rows, length)), jnp.int32),
        "loss_mask": jnp.asarray(rng.random((rows, length)) > 0.2),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(np.repeat(positions[None], rows, 0), jnp.int32),
    }


@functools.lru_cache
def compiled(graph, config):
    def loss(state, data, counts):
        return compute_losses(*nnx.merge(graph, state), data, config, counts)

    return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))


def losses(parts, data, config=LOSS, counts=None):
    counts = loss_denominators(data, config) if counts is None else counts
    return compiled(parts[0], config)(parts[1], data, counts)


def test_weights_are_rolled_with_their_targets():
    """Fault 8: weight[i] is the mask of token i+1, zero at each segment's end."""
    mask = jnp.asarray([[0, 1, 1, 0, 1, 1]], jnp.float32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]], jnp.int32)
    assert next_token_weights(mask, segments).tolist() == [[1, 1, 0, 1, 1, 0]]
    assert shifted_weights(mask, segments, 2).tolist() == [[1, 0, 0, 1, 0, 0]]
    assert shifted_weights(mask, segments, 9).tolist() == [[0] * 6]
    assert next_token_weights(mask, jnp.zeros_like(segments)).tolist() == [[0] * 6]


def test_micro_batches_weigh_by_their_tokens(parts):
    """Fault 7: sum over the step / tokens of the step, however the tokens are split."""
    data = batch()
    data["loss_mask"] = data["loss_mask"] & (jnp.arange(11)[None] < jnp.asarray([[3], [11]]))
    (whole, _), whole_gradient = losses(parts, data)
    counts = loss_denominators(data, LOSS)
    total, gradient = 0.0, None
    for row in ([[True], [False]], [[False], [True]]):  # unsupervised rows, so that one program serves all
        piece = {**data, "loss_mask": data["loss_mask"] & jnp.asarray(row)}
        (value, _), part = losses(parts, piece, counts=counts)
        total += value
        gradient = part if gradient is None else jax.tree.map(_add, gradient, part)
    np.testing.assert_allclose(total, whole, rtol=1e-6)
    jax.tree.map(_assert_near, gradient, whole_gradient)


def _add(a, b):
    return a if a.dtype == jax.dtypes.float0 else a + b


def _assert_near(a, b):
    if a.dtype != jax.dtypes.float0:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_published_arithmetic_of_fault_7():
    """x=1 with one token and x=3 with four: the gradient of w is 13/5, not the mean of means 2."""

    def loss(w):
        parts = [(1.0, [1, 0, 0, 0]), (3.0, [1, 1, 1, 1])]
        total = sum(sum(mask) for _, mask in parts)
        return sum(w * x * sum(mask) / total for x, mask in parts)

    assert jax.grad(loss)(1.0) == pytest.approx(2.6)


def test_nothing_supervised_gives_zero(parts):
    """Fault 14."""
    data = batch()
    data["loss_mask"] = jnp.zeros_like(data["loss_mask"])
    (value, sums), gradients = losses(parts, data)
    assert value == 0.0
    assert all(total == 0.0 for total in sums.values())
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(np.asarray(leaf))


@pytest.mark.parametrize("lengths", [(1, 2), (0, 1)])
def test_texts_of_no_one_and_two_tokens(parts, lengths):
    """Fault 14."""
    data = batch()
    data["segment_ids"] = (jnp.arange(11)[None] < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
    data["loss_mask"] = jnp.ones_like(data["loss_mask"])
    counts = loss_denominators(data, LOSS)
    assert [float(counts[name]) for name in ("next_token", "mtp_1", "mtp_2")] == [lengths.count(2), 0, 0]
    (value, _), gradients = losses(parts, data)
    assert np.isfinite(value)
    assert (value > 0) == (2 in lengths)
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(np.asarray(leaf)).all()


def reference_sums(parts, data, config):
    """Every round of every position on its own, keys chosen by a loop: {term: (sum, count)}, and agreement counts."""
    model, drafter = nnx.merge(*parts)
    tokens, mask, segments = (np.asarray(data[n]) for n in ("tokens", "loss_mask", "segment_ids"))
    inputs = {name: data[name] for name in ("positions", "segment_ids")}
    output = jax.jit(lambda state: nnx.merge(parts[0], state)[0](data["tokens"], **inputs))(parts[1])
    logs = jax.nn.log_softmax(model.logits(output.hidden))
    choice = np.argmax(logs, -1)
    step = jax.jit(
        lambda e, h, p, kv, masks: drafter.step(
            drafter.project_embedding(e),
            h,
            {kind: rope_table(CONFIG, kind, p) for kind in CONFIG.drafter.layer_types},
            cross_attend(kv, masks, 1.0),
        )
    )
    sums = dict.fromkeys(["next_token", *(f"mtp_{j}" for j in range(1, config.mtp_steps + 1))], (0.0, 0))
    agree = {}

    def add(name, value):
        sums[name] = (sums[name][0] + float(value), sums[name][1] + 1)

    length = tokens.shape[1]
    for b in range(tokens.shape[0]):
        for t in range(length):
            inside = [u < length and segments[b, u] == segments[b, t] != 0 for u in range(t + config.mtp_steps + 1)]
            if inside[t + 1] and mask[b, t + 1]:
                add("next_token", -logs[b, t, tokens[b, t + 1]])
            if (
                t == 0
                or segments[b, t] != segments[b, t - 1]
                or segments[b, t] == 0
                or (t - 1) % config.mtp_query_stride
            ):
                continue
            before = [u for u in range(t) if segments[b, u] == segments[b, t]]
            visible = {"full_attention": before, "sliding_attention": before[-(CONFIG.sliding_window + 1) :]}
            masks = {kind: np.isin(np.arange(length), keys)[None, None] for kind, keys in visible.items()}
            kv = {kind: (k[b : b + 1], v[b : b + 1]) for kind, (k, v) in output.kv.items()}
            hidden, newest = output.hidden[b : b + 1, t - 1 : t], tokens[b, t]
            position = data["positions"][b : b + 1, t : t + 1]
            for j in range(1, config.mtp_steps + 1):
                embedding = model.embedder.encode(jnp.asarray([[newest]], jnp.int32), jnp.float32)
                y, hidden = step(embedding, hidden, position, kv, masks)
                logits = drafter.logits(y)[0, 0]
                if not inside[t + j]:
                    break
                row, target = t + j - 1, tokens[b, t + j]
                if mask[b, t + j]:
                    student = jax.nn.log_softmax(logits)
                    kl = jnp.sum(jnp.exp(logs[b, row]) * (logs[b, row] - student))
                    add(f"mtp_{j}", kl if config.mtp_distill else -student[target])
                    hits, rounds = agree.get(j, (0, 0))
                    agree[j] = (hits + int(np.argmax(logits) == choice[b, row]), rounds + 1)
                newest = target if config.mtp_teacher_forcing else int(np.argmax(logits))
    return sums, agree


@pytest.mark.parametrize(
    "changes",
    [{}, {"mtp_distill": True, "mtp_query_stride": 2}, {"mtp_teacher_forcing": False}],
    ids=["labels", "distilled", "own tokens"],
)
def test_against_a_loop_over_positions(parts, changes):
    config = dataclasses.replace(LOSS, **changes)
    data = batch()
    expected, agree = reference_sums(parts, data, config)
    counts = loss_denominators(data, config)
    value, sums = jax.jit(lambda state: compute_losses(*nnx.merge(parts[0], state), data, config, counts))(parts[1])
    for name, (total, count) in expected.items():
        assert counts[name] == count
        np.testing.assert_allclose(sums[name], total, rtol=2e-5)
    means = {name: total / count for name, (total, count) in expected.items()}
    decay = np.asarray([0.8**j for j in range(1, config.mtp_steps + 1)])
    drafted = sum(w * means[f"mtp_{j}"] for j, w in enumerate(decay / decay.sum(), start=1))
    np.testing.assert_allclose(value, means["next_token"] + drafted, rtol=2e-5)
    if not changes:
        found = jax.jit(lambda state: draft_agreement(*nnx.merge(parts[0], state), data, config))(parts[1])
        assert {j: (found[f"agree_{j}"], found[f"count_{j}"]) for j in agree} == agree


def test_agreement_is_measured_alike_however_drafters_are_trained(parts):
    """In the pairing of inference and with the true tokens, so that ablations of both compare; losses are their own."""
    data = batch()

    def sums(config, function=evaluation_sums):
        return jax.jit(lambda state: function(*nnx.merge(parts[0], state), data, config))(parts[1])

    expected = sums(LOSS, draft_agreement)
    other = sums(dataclasses.replace(LOSS, mtp_pairing="same_row", mtp_teacher_forcing=False))
    for name, value in expected.items():
        assert other[name] == value
    assert other["mtp_2"] != sums(LOSS)["mtp_2"]


def test_stop_gradient_trains_the_drafter_only(parts):
    def norms(config):
        _, gradients = losses(parts, batch(), config)
        return [
            sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(part) if leaf.dtype != jax.dtypes.float0)
            for part in (gradients[0], gradients[1])
        ]

    stopped = norms(dataclasses.replace(LOSS, mtp_stop_gradient=True))
    alone = norms(dataclasses.replace(LOSS, mtp_weight=0.0))
    joint = norms(LOSS)
    assert alone[1] == 0.0
    assert stopped[0] == pytest.approx(alone[0], rel=1e-5)
    assert stopped[1] == pytest.approx(joint[1], rel=1e-5)
    assert abs(joint[0] - alone[0]) > 1e-3


def test_the_other_pairing_shifts_targets(parts):
    config = dataclasses.replace(LOSS, mtp_pairing="same_row", mtp_steps=1)
    counts = loss_denominators(batch(), config)
    data = batch()
    data["loss_mask"] = jnp.ones_like(data["loss_mask"])
    full = loss_denominators(data, config)
    assert full["mtp_1"] == 2 * (1 + 2)  # examples of 4 and 5 tokens: rows 1… whose second next token is inside
    assert counts["mtp_1"] <= full["mtp_1"]


@pytest.mark.parametrize("changes", [{"mtp_steps": -1}, {"mtp_decay": 0.0}, {"mtp_pairing": "x"}, {"token_chunk": 0}])
def test_bad_settings_are_named(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        LossConfig(**changes)


def test_step_weights_are_normalised():
    weights = LossConfig(mtp_steps=4, mtp_decay=0.5).step_weights()
    np.testing.assert_allclose(weights, np.asarray([8, 4, 2, 1]) / 15)
