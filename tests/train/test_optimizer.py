"""Optimiser: f32 moments, the AdamW formula, schedules, masks and selections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import optimizer as opt
from gemma4_jax.train.state import Network, trainable_names, untrained

NAMES = ("model/embedder/table", "model/final_norm/weight")


def parameters(dtype):
    rng = np.random.default_rng(0)
    return {
        NAMES[0]: jnp.asarray(rng.normal(size=(4, 3)), dtype),
        NAMES[1]: jnp.asarray(rng.normal(size=(3,)), dtype),
    }


def test_moments_are_f32_for_bf16_parameters():
    """optax.adamw alone keeps both moments in bf16, and with mu_dtype=f32 still the second."""
    optimizer = opt.make_optimizer(opt.OptimizerConfig(), lambda _: 1e-3, NAMES)
    params = parameters(jnp.bfloat16)
    state = opt.init(optimizer, params)
    new, state = opt.update(optimizer, params, state, params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 4 and all(leaf.dtype == jnp.float32 for leaf in floats)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in new.values())


def test_adamw_equals_its_formula():
    """Three updates against the textbook in f64: clipping, bias correction, decay of matrices only."""
    config = opt.OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.3, clip_norm=0.5
    )
    optimizer = opt.make_optimizer(config, opt.make_schedule(config, 10), NAMES)
    params = parameters(jnp.float32)
    state = opt.init(optimizer, params)
    w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in w.items()} for _ in range(2))
    rng = np.random.default_rng(1)
    for t in range(1, 4):
        grads = {name: rng.normal(size=leaf.shape) for name, leaf in w.items()}
        params, state = opt.update(optimizer, {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, params)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, gradient in grads.items():
            g = gradient * min(1.0, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            direction = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            w[name] -= 0.1 * (direction + (0.3 * w[name] if name == NAMES[0] else 0.0))
            np.testing.assert_allclose(params[name], w[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.1]),
    ],
)
def test_schedules(schedule, expected):
    """Warm-up of 2 of 12 steps, at steps 0, 1, 2, 7 and 12."""
    config = opt.OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule, final_fraction=0.1)
    values = [float(opt.make_schedule(config, 12)(step)) for step in (0, 1, 2, 7, 12)]
    assert values == pytest.approx(expected, abs=1e-6)


def test_wsd_falls_linearly_at_the_end():
    config = opt.OptimizerConfig(
        learning_rate=1.0, warmup_steps=0, schedule="wsd", final_fraction=0.0, decay_fraction=0.2
    )
    values = [float(opt.make_schedule(config, 10)(step)) for step in (7, 8, 9, 10)]
    assert values == pytest.approx([1.0, 1.0, 0.5, 0.0], abs=1e-6)


@pytest.fixture(scope="module")
def everything():
    """A network with every kind of parameter: media embedders and ordered embeddings too."""
    return Network(get_preset("tiny", **{"drafter.use_ordered_embeddings": True, "drafter.num_centroids": 64}))


def test_decay_rules_cover_every_parameter(everything):
    names = [name for name in everything.shapes if name not in everything.variables]
    mask = opt.decay_mask(names)
    assert mask.keys() == set(names)
    for name, decays in mask.items():
        stacked = name.startswith("model/groups/")
        matrix = len(everything.shapes[name].shape) - stacked == 2
        assert decays == matrix, name


def test_uncovered_parameter_is_an_error():
    with pytest.raises(ConfigError, match="covers parameter model/new_thing"):
        opt.decay_mask(["model/embedder/table", "model/new_thing"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("drafter/*",), "says nothing about model/"),
        (("*", "!model/layer/*"), "'!model/layer/\\*' matches none"),
        ((), "says nothing about"),
        (("!*",), "leaves nothing to train"),
    ],
)
def test_bad_selections(everything, patterns, message):
    with pytest.raises(ConfigError, match=message):
        trainable_names(everything, LossConfig(), patterns)


def test_last_matching_pattern_decides(everything):
    names = list(everything.shapes)
    chosen = opt.select(names, ("!*", "drafter/*", "!drafter/embedder/*"))
    assert chosen == {n for n in names if n.startswith("drafter/") and not n.startswith("drafter/embedder/")}


def test_dead_weights_stay_out_of_the_optimiser(everything):
    """Layer scalars, centroids and token order; media without media; the feed-back projection when K = 1."""
    dead = untrained(everything, LossConfig(mtp_steps=1), media_kinds=())
    for fragment in ("layer_scalar", "centroids", "token_ordering", "post_projection", "model/vision", "model/audio"):
        assert any(fragment in name for name in dead), fragment
    assert not any("q_proj" in name or "table" in name for name in dead)
    more_steps = untrained(everything, LossConfig(mtp_steps=2), media_kinds=("vision", "audio"))
    assert {name.rpartition("/")[2] for name in more_steps} == {"layer_scalar", "centroids", "token_ordering"}
    for kind, other in (("vision", "audio"), ("audio", "vision")):
        one_kind = untrained(everything, LossConfig(mtp_steps=2), media_kinds=(kind,))
        assert {name for name in one_kind if "model/vision/" in name or "model/audio/" in name} == {
            name for name in everything.shapes if name.startswith(f"model/{other}/")
        }
    no_drafter = untrained(everything, LossConfig(mtp_weight=0.0), media_kinds=("vision", "audio"))
    assert all(name in no_drafter for name in everything.shapes if name.startswith("drafter/"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "unknown optimizer.name 'adam'.*adamw"),
        ({"schedule": "linear"}, "unknown optimizer.schedule 'linear'.*cosine, wsd, constant"),
        ({"b1": 1.5}, "optimizer.b1 is 1.5"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm is -1.0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        opt.OptimizerConfig(**fields)


def test_warmup_longer_than_the_run():
    with pytest.raises(ConfigError, match="warmup_steps 100 is more than train.steps 10"):
        opt.make_schedule(opt.OptimizerConfig(warmup_steps=100), 10)
