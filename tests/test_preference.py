"""DPO against its formula, written down with plain logits of answers that stand alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma4_jax as g4
from gemma4_jax.chunked import ChunkSpec, chunked_log_probability
from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.preference import REWARDS, pair_mask, preference_denominators, preference_losses, preference_means

CONFIG = get_preset(
    "tiny", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window_pattern=2,
    sliding_window=5, vision=None, audio=None, drafter=None,
)  # fmt: skip
LOSS = LossConfig(name="dpo", beta=0.3, token_chunk=7, vocab_chunk=48)
# Rows of pairs (prompt, chosen, rejected) by length; the second row has one pair and padding.
PAIRS = [[(3, 4, 2), (2, 1, 5)], [(4, 3, 3)]]
LENGTH = 22


def pack(rng):
    """A batch of PAIRS, and each answer alone: (tokens, first learnt index)."""
    batch = {name: np.zeros((len(PAIRS), LENGTH), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros((len(PAIRS), LENGTH), bool)
    alone = []
    for row, pairs in enumerate(PAIRS):
        at = segment = 0
        for prompt, *answers in pairs:
            start = rng.integers(3, 64, prompt)
            for length in answers:
                tokens = np.concatenate([start, rng.integers(3, 64, length)])
                here, segment = slice(at, at + len(tokens)), segment + 1
                batch["tokens"][row, here], batch["segment_ids"][row, here] = tokens, segment
                batch["positions"][row, here] = np.arange(len(tokens))
                batch["loss_mask"][row, at + prompt : at + len(tokens)] = True
                alone.append((tokens, prompt))
                at += len(tokens)
    return {name: jnp.asarray(value) for name, value in batch.items()}, alone


@pytest.fixture(scope="module")
def models():
    return [g4.init(CONFIG, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def case():
    return pack(np.random.default_rng(0))


def test_loss_equals_its_formula(models, case):
    """Packed pairs, chunked logits and a soft-cap against -log sigmoid(beta * …) of answers that stand alone, in f64."""
    batch, alone = case
    scores = []
    for bundle in models:
        logits = np.asarray(g4.logits(bundle, [tokens.tolist() for tokens, _ in alone]), np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores.append([
            sum(logs[i, t - 1, tokens[t]] for t in range(prompt, len(tokens)))
            for i, (tokens, prompt) in enumerate(alone)
        ])  # fmt: skip
    rewards = 0.3 * (np.asarray(scores[0]) - np.asarray(scores[1])).reshape(-1, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    counts = preference_denominators(batch)
    (graph, state), (_, reference) = (nnx.split(bundle.model) for bundle in models)

    @jax.jit
    def compute(state, reference):
        return preference_losses(nnx.merge(graph, state), nnx.merge(graph, reference), batch, LOSS, counts)

    loss, sums = compute(state, reference)
    means = preference_means(sums, counts)
    assert float(counts["preference"]) == 3 and float(counts["next_token"]) == 18
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
    assert means["preference_loss"] == pytest.approx(float(loss))
    want = [margin.mean(), (margin > 0).mean(), rewards[:, 0].mean(), rewards[:, 1].mean()]
    assert [float(means[name]) for name in REWARDS] == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert float(means["next_token_loss"]) == pytest.approx(-sum(scores[0]) / 18, rel=1e-5)


def test_at_the_reference(models, case):
    """Margin 0 and loss log 2; the gradient is beta / 2 times that of the answers' log-probabilities."""
    batch, _ = case
    graph, state, rest = nnx.split(models[0].model, nnx.Param, ...)
    counts = preference_denominators(batch)
    sign = jnp.where(batch["segment_ids"] % 2 == 1, 1.0, -1.0)

    @jax.jit
    def both(state, rest):
        def dpo(moving):
            models = (nnx.merge(graph, part, rest) for part in (moving, state))
            return preference_losses(*models, batch, LOSS, counts)[0]

        def plain(state):
            moving = nnx.merge(graph, state, rest)
            hidden = moving(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]).hidden
            logs = jax.nn.log_softmax(moving.logits(hidden))
            targets = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
            picked = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
            learnt = jnp.pad(batch["loss_mask"][:, 1:], ((0, 0), (0, 1)))
            return -0.3 / 2 / 3 * jnp.sum(jnp.where(learnt, sign * picked, 0.0))

        return jax.value_and_grad(dpo)(state), jax.grad(plain)(state)

    (loss, got), want = both(state, rest)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 + 1e-4 * np.abs(theirs).max())


def test_gradient_of_log_probabilities():
    """Weights of either sign, rows that weigh nothing (NaN included), several chunks, a soft-cap."""
    rng = np.random.default_rng(3)
    hidden, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 8), (19, 8)))
    hidden = hidden.at[0, 1].set(jnp.nan)
    targets = jnp.asarray(rng.integers(0, 19, (2, 5)), jnp.int32)
    g = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32).at[0, 1].set(0.0)

    def ours(hidden, table):
        return chunked_log_probability(hidden, table, targets, softcap=3.0, spec=ChunkSpec(4, 6))

    def plain(hidden, table):
        logs = jax.nn.log_softmax(3.0 * jnp.tanh(jnp.where(jnp.isnan(hidden), 0.0, hidden) @ table.T / 3.0))
        return jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]

    got, want = (jax.vjp(f, hidden, table)[1](g) for f in (ours, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_which_pairs_are_there():
    segments = jnp.asarray([[1, 1, 2, 3, 4, 0], [0] * 6])
    np.testing.assert_array_equal(pair_mask(segments), [[True, True, False], [False] * 3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"name": "ppo"}, "unknown loss.name 'ppo'.*next_token, dpo"), ({"beta": 0.0}, "loss.beta is 0")],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**fields)


def test_dpo_has_no_multi_token_term():
    assert LossConfig().uses_drafter and not LOSS.uses_drafter
