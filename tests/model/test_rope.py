"""Rotary embedding: the proportional form (fault 4), relative positions, exactness of what does not turn."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import FULL, SLIDING, get_preset
from gemma4_jax.model.rope import apply_rope, inverse_frequencies, rope_table


def positions(*values):
    return jnp.asarray([values], jnp.int32)


def test_proportional_frequencies_of_the_12b():
    """Fault 4: frequencies of the full head width, not of the 128 turned dims (which gives 0.8058 and 1.24e-06)."""
    found = inverse_frequencies(512, 1e6, 0.25)
    assert found.shape == (64,)
    np.testing.assert_allclose(found[[0, 1, 63]], [1.0, 0.9474635, 0.0333762], rtol=1e-5)


def test_default_frequencies_of_the_12b():
    found = inverse_frequencies(256, 1e4)
    np.testing.assert_allclose(found, 1e4 ** (-np.arange(128) / 128.0), rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, 63, 256, 257, 319])
def test_a_turned_dim_meets_its_other_half(dim):
    """Fault 4: dim d turns with d + 256, half of the full head, not with d + 64."""
    config = get_preset("gemma4_12b")
    x = jnp.zeros((1, 1, 1, 512)).at[..., dim].set(1.0)
    y = np.asarray(apply_rope(x, rope_table(config, FULL, positions(1))))[0, 0, 0]
    assert set(np.flatnonzero(y)) == {dim, (dim + 256) % 512}
    assert np.hypot(*y[[dim, (dim + 256) % 512]]) == pytest.approx(1.0)


def test_other_dims_of_global_layers_pass_unchanged():
    config = get_preset("gemma4_12b")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 512)), jnp.float32)
    y = apply_rope(x, rope_table(config, FULL, positions(1, 77, 100_000)))
    still = [*range(64, 256), *range(320, 512)]
    np.testing.assert_array_equal(y[..., still], x[..., still])
    assert np.abs(y - x)[..., :64].max() > 0.1


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_scores_depend_on_distance_only(kind):
    config = get_preset("tiny")
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, config.head_width(kind))), jnp.float32) for _ in range(2))

    def score(at_query, at_key):
        turned = (apply_rope(x, rope_table(config, kind, positions(p))) for x, p in ((q, at_query), (k, at_key)))
        return float(jnp.sum(next(turned) * next(turned)))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 8)) > 1e-4


def test_position_zero_turns_nothing():
    config = get_preset("tiny")
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 4, 16)), jnp.float32)
    np.testing.assert_array_equal(apply_rope(x, rope_table(config, SLIDING, positions(0))), x)
