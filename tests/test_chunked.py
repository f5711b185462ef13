"""Chunked cross-entropy, KL and argmax against the plain forms: values, gradients, cap (fault 18), NaN (fault 14)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.chunked import (
    ChunkSpec,
    chunked_argmax,
    chunked_cross_entropy,
    chunked_kl,
    chunked_log_probability,
)

VOCAB, WIDTH = 65, 12
RNG = np.random.default_rng(0)
SPECS = [
    ChunkSpec(1024, 16, 1),  # 65 = 4 x 16 + 1: the last chunk is mostly padding
    ChunkSpec(1024, 16, 2),
    ChunkSpec(1024, 100, 1),  # one chunk
    ChunkSpec(5, 16, 1),  # runs of positions that do not divide T
    ChunkSpec(5, 100, 2),
]


def arrays(rows=(2, 7), scale=1.0):
    hidden = jnp.asarray(scale * RNG.normal(size=(*rows, WIDTH)), jnp.float32)
    table = jnp.asarray(RNG.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, VOCAB, rows), jnp.int32).at[0, 0].set(VOCAB - 1)
    weights = jnp.asarray(RNG.uniform(0.1, 2.0, rows) * (RNG.random(rows) > 0.3), jnp.float32)
    return hidden, table, targets, weights


def plain_logits(hidden, table, cap):
    raw = hidden @ table.T
    return raw if cap is None else cap * jnp.tanh(raw / cap)


def plain_loss(hidden, table, targets, weights, cap):
    logs = jax.nn.log_softmax(plain_logits(hidden, table, cap))
    return -jnp.sum(weights * jnp.take_along_axis(logs, targets[..., None], -1)[..., 0])


def plain_kl(hidden, table, teacher_hidden, teacher_table, weights, cap):
    teacher = jax.nn.log_softmax(plain_logits(teacher_hidden, teacher_table, cap))
    student = jax.nn.log_softmax(plain_logits(hidden, table, None))
    return jnp.sum(weights * jnp.sum(jnp.exp(teacher) * (teacher - student), -1))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for ours, plain in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=2e-6 * float(jnp.max(jnp.abs(plain))))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
def test_cross_entropy(spec, cap):
    hidden, table, targets, weights = arrays()

    def chunked(hidden, table):
        return chunked_cross_entropy(hidden, table, targets, weights, softcap=cap, spec=spec)

    def plain(hidden, table):
        return plain_loss(hidden, table, targets, weights, cap)

    found = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, table)
    assert_same(found, jax.value_and_grad(plain, (0, 1))(hidden, table))
    np.testing.assert_allclose(chunked(hidden, table), found[0], rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kl(spec):
    hidden, table, _, weights = arrays()
    teacher = (
        jnp.asarray(RNG.normal(size=(2, 7, 20)), jnp.float32),
        jnp.asarray(RNG.normal(size=(VOCAB, 20)), jnp.float32),
    )

    def chunked(hidden, table, teacher):
        return chunked_kl(hidden, table, *teacher, weights, teacher_softcap=2.0, spec=spec)

    def plain(hidden, table, teacher):
        return plain_kl(hidden, table, *teacher, weights, 2.0)

    found = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(hidden, table, teacher)
    assert_same((found[0], found[1][:2]), jax.value_and_grad(plain, (0, 1))(hidden, table, teacher))
    assert not any(np.any(g) for g in found[1][2])  # nothing reaches the teacher


def test_gradient_by_finite_differences():
    hidden, table, targets, weights = arrays(scale=1.0)

    def loss(hidden, table):
        return chunked_cross_entropy(hidden, table, targets, weights, softcap=2.0, spec=SPECS[3])

    gradients = jax.grad(loss, (0, 1))(hidden, table)
    for argument in (0, 1):
        direction = jnp.asarray(RNG.normal(size=(hidden, table)[argument].shape), jnp.float32)
        step = 1e-2 * direction
        moved = [[hidden, table], [hidden, table]]
        moved[0][argument], moved[1][argument] = moved[0][argument] + step, moved[1][argument] - step
        slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-2
        np.testing.assert_allclose(slope, jnp.sum(gradients[argument] * direction), rtol=2e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_log_probability_and_argmax(spec):
    hidden, table, targets, _ = arrays()
    logs = jax.nn.log_softmax(plain_logits(hidden, table, 2.0))
    expected = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
    found = chunked_log_probability(hidden, table, targets, softcap=2.0, spec=spec)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    best = chunked_argmax(hidden, table, spec=spec)
    assert best.dtype == jnp.int32
    np.testing.assert_array_equal(best, np.argmax(hidden @ table.T, -1))
    ties = chunked_argmax(jnp.zeros((1, 2, WIDTH)), table, spec=spec)
    assert ties.tolist() == [[0, 0]]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_padding_entries_take_no_probability(spec):
    """Fault 18: a cap turns -inf into -c. All logits equal: every one of the 65 entries has probability 1/65."""
    hidden, table, targets, _ = arrays()
    found = chunked_log_probability(jnp.zeros_like(hidden), table, targets, softcap=30.0, spec=spec)
    np.testing.assert_allclose(found, -np.log(VOCAB), rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_nan_in_masked_rows_stays_out(spec):
    """Fault 14: neither the loss nor any gradient sees rows of weight 0; all weights 0 give 0."""
    hidden, table, targets, weights = arrays()
    broken = jnp.where((weights > 0)[..., None], hidden, jnp.nan)
    assert np.isnan(broken).any()
    grad = jax.jit(
        jax.value_and_grad(lambda h, t, w: chunked_cross_entropy(h, t, targets, w, softcap=30.0, spec=spec), (0, 1))
    )
    assert_same(grad(broken, table, weights), grad(hidden, table, weights))
    value, gradients = grad(broken, table, jnp.zeros_like(weights))
    assert value == 0.0
    assert not any(np.any(np.asarray(g)) for g in gradients)


def test_low_precision_accumulates_in_f32():
    hidden, table, targets, weights = arrays()
    low = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    found = chunked_cross_entropy(*low, targets, weights, softcap=30.0, spec=SPECS[0])
    assert found.dtype == jnp.float32
    expected = plain_loss(*(x.astype(jnp.float32) for x in low), targets, weights, 30.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
