"""Optimiser: f32 moments, the AdamW formula, schedules, masks and selections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import optimizer as opt
from gemma4_jax.train import trees
from gemma4_jax.train.state import Network, trainable_names, untrained

NAMES = ("model/embedder/table", "model/final_norm/weight")
LOSS = jnp.float32(jnp.nan)  # decides nothing


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
    new, state, _ = opt.update(optimizer, params, state, params, LOSS)
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
        moved = {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}
        params, state, _ = opt.update(optimizer, moved, state, params, LOSS)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, gradient in grads.items():
            g = gradient * min(1.0, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            direction = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            w[name] -= 0.1 * (direction + (0.3 * w[name] if name == NAMES[0] else 0.0))
            np.testing.assert_allclose(params[name], w[name], rtol=2e-5, atol=1e-6)


def stacked_and_single(shape, layers, seed=0):
    """Weights and three gradients of a (2, layers / 2) stack of matrices and of a vector in each layer."""
    rng = np.random.default_rng(seed)
    lead = (2, layers // 2)
    names = {"model/groups/runs/0/mlp/up_proj/weight": shape, "model/groups/runs/0/input_layernorm/weight": shape[-1:]}

    def draw():
        return {
            name: jnp.asarray(
                rng.normal(scale=rng.uniform(0.1, 2.0, (*lead, 1, 1)[: 2 + len(s)]), size=(*lead, *s)), "float32"
            )
            for name, s in names.items()
        }

    return draw(), [draw() for _ in range(3)]


def layer_of(tree, layer):
    return {name: leaf.reshape(-1, *leaf.shape[2:])[layer] for name, leaf in tree.items()}


def published(name):
    """The optax optimiser that ``optimizer.name`` means, on the weights of one layer."""
    if name == "adafactor":
        return optax.adafactor(0.1)
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    parts = {
        "matrix": optax.contrib.muon(0.1, beta=0.9, consistent_rms=0.2, muon_weight_dimension_numbers=axes),
        "vector": optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.0),
    }
    return optax.partition(parts, lambda tree: {k: "matrix" if v.ndim == 2 else "vector" for k, v in tree.items()})


@pytest.mark.parametrize(("name", "shape"), [("muon", (6, 4)), ("muon", (3, 8)), ("adafactor", (130, 128))])
def test_stacked_layers_move_as_if_each_were_alone(name, shape):
    config = opt.OptimizerConfig(
        name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0, momentum=0.9
    )
    start, gradients = stacked_and_single(shape, layers=4)
    optimizer = opt.make_optimizer(config, opt.make_schedule(config, 10), list(start))
    params, state = start, opt.init(optimizer, start)
    step = jax.jit(functools.partial(opt.update, optimizer))
    for grads in gradients:
        params, state, _ = step(grads, state, params, LOSS)
    single = published(name)
    move = jax.jit(single.update)
    for layer in range(4):
        alone = layer_of(start, layer)
        memory = single.init(alone)
        for grads in gradients:
            updates, memory = move(layer_of(grads, layer), memory, alone)
            alone = optax.apply_updates(alone, updates)
        for key, leaf in layer_of(params, layer).items():
            np.testing.assert_allclose(leaf, alone[key], rtol=2e-5, atol=2e-6, err_msg=f"{key} of layer {layer}")


def test_muon_takes_the_matrices_between_hidden_states(everything):
    """Tables, norms and the media embedders have two moments of adamw, the others one momentum."""
    names = sorted(set(everything.shapes) - everything.variables)
    optimizer = opt.make_optimizer(opt.OptimizerConfig(name="muon"), lambda _: 1e-3, names)
    state = jax.eval_shape(
        lambda: opt.init(optimizer, {n: jnp.zeros(s.shape) for n, s in everything.shapes.items() if n in names})
    )
    leaves = list(trees.named_leaves(state))
    for name in names:
        hidden = any(part in name for part in ("/self_attn/", "/mlp/")) and name.endswith("_proj/weight")
        held = [leaf.removesuffix(f"/{name}").rpartition("/")[2] for leaf in leaves if leaf.endswith(f"/{name}")]
        assert sorted(held) == (["mu"] if hidden else ["mu", "nu"]), name
    assert sum("q_proj" in name for name in names) > 2


def test_weight_decay_is_scaled_by_the_learning_rate_everywhere():
    """Without gradients adamw, adafactor and muon all shrink matrices by lr x decay, and nothing else."""
    start, _ = stacked_and_single((4, 4), layers=2)
    zero = {name: jnp.zeros_like(leaf) for name, leaf in start.items()}
    for name in opt.OPTIMIZERS:
        config = opt.OptimizerConfig(
            name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5
        )
        optimizer = opt.make_optimizer(config, opt.make_schedule(config, 10), list(start))
        params, _, metrics = opt.update(optimizer, zero, opt.init(optimizer, start), start, LOSS)
        for key, leaf in params.items():
            factor = 0.95 if key.endswith("_proj/weight") else 1.0
            np.testing.assert_allclose(leaf, factor * start[key], rtol=1e-6, err_msg=f"{name}: {key}")
        assert 0.03 < float(metrics["update_ratio"]) <= 0.05


def test_moments_keep_their_dtypes():
    """``mu_dtype`` is of the first moment; the second stays f32, with bf16 parameters too."""
    for name, mu, second in (("adamw", "bfloat16", 2), ("muon", "bfloat16", 2), ("adafactor", "float32", None)):
        optimizer = opt.make_optimizer(opt.OptimizerConfig(name=name, mu_dtype=mu), lambda _: 1e-3, NAMES)
        params = parameters(jnp.bfloat16)
        state = opt.init(optimizer, params)
        _, after, _ = opt.update(optimizer, params, state, params, LOSS)
        for tree in (state, after):
            kinds = [leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            if second is None:
                assert set(kinds) == {"float32"}
            else:
                assert kinds.count("bfloat16") == 2 and set(kinds) == {"float32", "bfloat16"}


def test_average_of_weights():
    """Against the recursion in f64; the first decays are those of the warm-up."""
    rng = np.random.default_rng(0)
    expected = w = rng.normal(size=5)
    mean = {"w": jnp.asarray(w, jnp.float32)}
    for step in range(12):
        w = rng.normal(size=5)
        keep = min(0.6, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * w
        mean = opt.average(mean, {"w": jnp.asarray(w, jnp.float32)}, 0.6, jnp.int32(step))
    np.testing.assert_allclose(mean["w"], expected, rtol=1e-5)


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
        stacked = 2 * name.startswith("model/groups/")
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
        ({"name": "adam"}, "unknown optimizer.name 'adam'.*adamw, adafactor, muon"),
        ({"schedule": "linear"}, "unknown optimizer.schedule 'linear'.*cosine, wsd, constant"),
        ({"b1": 1.5}, "optimizer.b1 is 1.5"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm is -1.0"),
        ({"momentum": 2.0}, "optimizer.momentum is 2.0"),
        ({"mu_dtype": "float16"}, "unknown optimizer.mu_dtype 'float16'.*float32, bfloat16"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        opt.OptimizerConfig(**fields)


def test_warmup_longer_than_the_run():
    with pytest.raises(ConfigError, match="warmup_steps 100 is more than train.steps 10"):
        opt.make_schedule(opt.OptimizerConfig(warmup_steps=100), 10)


def test_learning_rates_of_their_own():
    """Factors 0 and 2 by name: nothing, and twice the step that one learning rate gives (decay included)."""
    params = parameters(jnp.float32)
    moved = {}
    for multipliers in ((), (("*", 2.0), ("*/embedder/*", 0.0))):
        config = opt.OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, lr_multipliers=multipliers)
        optimizer = opt.make_optimizer(config, opt.make_schedule(config, 10), NAMES)
        new = opt.update(optimizer, params, opt.init(optimizer, params), params, LOSS)[0]
        moved[multipliers] = {name: np.asarray(new[name] - params[name]) for name in NAMES}
    plain, own = moved.values()
    assert np.any(plain[NAMES[0]]) and not np.any(own[NAMES[0]])
    np.testing.assert_allclose(own[NAMES[1]], 2 * plain[NAMES[1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ((("model/final_norm/*", 2.0),), "says nothing about model/embedder/table and 0 more; begin with"),
        ((("*", 1.0), ("drafter/*", 2.0)), "pattern 'drafter/\\*' matches none of the 2 trained parameters"),
        (("*", 1.0), "has '\\*'; it takes pairs"),
        ((("*", -1.0),), "takes pairs \\(pattern, factor\\), factor at least 0"),
    ],
)
def test_bad_learning_rates_of_their_own(multipliers, message):
    config = opt.OptimizerConfig(lr_multipliers=multipliers)
    with pytest.raises(ConfigError, match=message):
        opt.make_optimizer(config, lambda _: 1e-3, NAMES)


@pytest.mark.parametrize("name", sorted(opt.OPTIMIZERS))
def test_a_few_parameters_at_a_time_move_as_all_together(name, monkeypatch):
    """Parameters, state and metrics, with clipping and layers that do not train."""
    start, gradients = stacked_and_single((6, 4), layers=4)
    start = {**start, "model/embedder/table": jnp.ones((2, 3))}
    assert len(opt._parts(start)) > 1
    config = opt.OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, clip_norm=0.5)
    masks = {key: np.asarray([[True, False], [False, True]]) for key in gradients[0]}
    optimizer = opt.make_optimizer(config, opt.make_schedule(config, 10), list(start), masks)
    ends = []
    for apart in (True, False):
        monkeypatch.setattr(opt, "runs_apart", lambda apart=apart: apart)
        step = jax.jit(functools.partial(opt.update, optimizer))
        params, state = start, opt.init(optimizer, start)
        for grads in gradients:
            grads = {**grads, "model/embedder/table": jnp.full((2, 3), 0.2)}
            params, state, metrics = step(grads, state, params, LOSS)
        ends.append((params, state, metrics))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), *ends)
