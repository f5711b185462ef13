"""The training step: accumulation, empty batches, meshes."""

import functools

import jax
import jax.numpy as jnp
import mini_train as mini
import numpy as np
import pytest

from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import step as steps


@functools.cache
def compiled_gradients(trainer, accumulation):
    return jax.jit(functools.partial(steps.gradients, trainer.network, trainer.loss, accumulation=accumulation))


def gradients_of(trainer, batch, accumulation):
    state = trainer.init()
    return jax.device_get(compiled_gradients(trainer, accumulation)(state.params, state.frozen, batch))


@pytest.fixture(scope="module")
def whole(trainer):
    return gradients_of(trainer, mini.random_batch(), 1)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_equals_whole_batch(trainer, whole, accumulation):
    """8x1 = 4x2 = 1x8 with unequal numbers of supervised tokens (the plain mean of means is off by far more)."""
    grads, metrics = gradients_of(trainer, mini.random_batch(), accumulation)
    off = {name: np.linalg.norm(grads[name] - expected) for name, expected in whole[0].items()}
    size = {name: np.linalg.norm(expected) for name, expected in whole[0].items()}
    # Sums in f32 of other shapes: 1e-6 as XLA optimises them, three times that at the level at which tests compile.
    assert np.linalg.norm([*off.values()]) <= 5e-6 * np.linalg.norm([*size.values()])
    for name in off:  # a small leaf has fewer roundings to average over
        assert off[name] <= 1e-5 * size[name] + 1e-8, name
    for name, expected in whole[1].items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)


def test_micro_batches_weigh_by_tokens():
    """loss = sum(w x m) / sum(m) over two micro-batches with 1 and 4 supervised tokens: gradient 2.6, not 2.0."""
    x = jnp.asarray([[1.0] * 4, [3.0] * 4])
    mask = jnp.asarray([[1.0, 0, 0, 0], [1.0, 1, 1, 1]])
    count = mask.sum()
    parts = [jax.grad(lambda w, i=i: jnp.sum(w * x[i] * mask[i]) / count)(1.0) for i in (0, 1)]
    assert float(sum(parts)) == pytest.approx(2.6)


def test_micro_batches_take_every_row_once():
    rows = {"tokens": jnp.arange(8, dtype=jnp.int32)[:, None]}
    split = steps._micro_batches(rows, 4, None)["tokens"]
    assert split.shape == (4, 2, 1)
    assert sorted(split.reshape(-1).tolist()) == list(range(8))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_supervised_gives_zero(trainer, accumulation):
    batch = mini.random_batch()
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    grads, metrics = gradients_of(trainer, batch, accumulation)
    assert metrics["loss"] == 0.0 and metrics["supervised_tokens"] == 0.0
    assert all((leaf == 0).all() for leaf in grads.values())


def test_empty_steps_are_counted_and_harmless(trainer):
    """Rows of length 0, 1 and 2 train without NaN; the step without a target is counted."""
    state = trainer.init()
    empty = []
    for filled in (0, 1, 2):
        batch = {key: np.zeros_like(value) for key, value in mini.random_batch().items()}
        batch["segment_ids"][:, :filled] = 1
        batch["loss_mask"][:, :filled] = True
        batch["positions"][:, :filled] = np.arange(filled)
        state, metrics = trainer.train_step(state, trainer.place(batch))
        empty.append(float(metrics["empty_steps"]))
        assert np.isfinite(float(metrics["loss"]))
    assert empty == [1.0, 1.0, 0.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.device_get(state.params).values())


def one_update(trainer, state):
    state, metrics = trainer.train_step(state, trainer.place(mini.random_batch()))
    return state, jax.device_get((state.params, metrics["loss"], metrics["gradient_norm"]))


@pytest.mark.parametrize(("mesh", "accumulation"), [((1, 8, 1), 1), ((2, 2, 2), 2)], ids=str)
def test_sharded_equals_unsharded(trainer, mesh, accumulation):
    """fsdp alone, and data, fsdp and tensor together with accumulation: same loss, same weights after one update."""
    sharded = mini.mini_trainer(mesh=mesh, accumulation=accumulation)
    start = jax.device_put(jax.device_get(trainer.init()), sharded.shardings)
    _, (expected_params, expected_loss, expected_norm) = one_update(trainer, trainer.init())
    state, (params, loss, norm) = one_update(sharded, start)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert norm == pytest.approx(float(expected_norm), rel=1e-5)
    for name, expected in expected_params.items():
        # Adam's first update is lr * sign(gradient): rounding can move it where the gradient is about 0.
        off = np.abs(params[name] - expected) > 1e-4
        assert off.mean() < 0.01, f"{name}: {off.sum()} of {off.size} weights differ"
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == sharded.shardings


def test_state_is_created_where_it_belongs_with_the_same_values(trainer):
    """No process ever holds a whole cut weight, and the mesh does not change the initial values."""
    cut = mini.mini_trainer(mesh=(1, 4, 2))
    state = cut.init()
    weight = state.params["model/groups/runs/0/mlp/up_proj/weight"]
    assert weight.shape == (1, 1, 32, 16)
    assert weight.addressable_shards[0].data.shape == (1, 1, 16, 4)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == weight.shape]
    assert moments and all(leaf.addressable_shards[0].data.shape == (1, 1, 16, 4) for leaf in moments)
    for name, leaf in jax.device_get(trainer.init().params).items():
        np.testing.assert_array_equal(leaf, jax.device_get(state.params[name]))


def test_a_step_compiled_ahead_is_not_compiled_again():
    trainer = mini.mini_trainer()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    trainer.compile_ahead(8, mini.SEQ_LEN)
    state, batch = trainer.init(), trainer.place(mini.random_batch())
    jax.block_until_ready((state.params, batch))
    assert any("backend_compile" in event for event in compiled)
    compiled.clear()
    trainer.train_step(state, batch)
    assert not [event for event in compiled if "backend_compile" in event]


def test_the_state_is_donated(trainer):
    state = trainer.init()
    trainer.train_step(state, trainer.place(mini.random_batch()))
    assert all(leaf.is_deleted() for leaf in state.params.values())


def test_a_step_compiles_once(trainer):
    state = trainer.init()
    for seed in range(3):
        state, _ = trainer.train_step(state, trainer.place(mini.random_batch(seed=seed)))
    assert trainer.train_step._cache_size() == 1


def test_merge_inverts_weights(trainer):
    state = trainer.init()
    weights = {**state.params, **state.frozen}
    model, drafter = trainer.network.merge(weights)
    again = trainer.network.weights({"model": model, "drafter": drafter})
    assert again.keys() == weights.keys() == trainer.network.shapes.keys()
    assert all(again[name] is weights[name] for name in weights)


def test_eval_means():
    loss = LossConfig(mtp_steps=2)
    sums = {"next_token": 6.0, "count_next_token": 3.0, "mtp_1": 4.0, "count_mtp_1": 2.0, "mtp_2": 0.0, "count_mtp_2": 0.0,
            "agree_1": 1.0, "count_1": 2.0, "agree_2": 1.0, "count_2": 4.0, "probability_1": 0.5}  # fmt: skip
    means = steps.eval_means(sums, loss)
    assert means == {
        "next_token_loss": 2.0, "mtp_1_loss": 2.0, "mtp_2_loss": 0.0, "acceptance_1": 0.5, "acceptance_2": 0.25,
        "mean_accepted": 1.625, "acceptance_sampled_1": 0.25,
    }  # fmt: skip


def test_drafter_loss_needs_a_drafter():
    with pytest.raises(ConfigError, match="mtp_steps 2 needs a drafter"):
        mini.mini_trainer(model=mini.mini_config(drafter=None))
