"""Training adapters: what moves, what stays, on which devices, on packed weights, and by preference."""

import dataclasses

import jax
import mini_train as mini
import numpy as np
import pytest

import launch
from gemma4_jax.config import get_preset
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.model.lora import is_adapter
from gemma4_jax.quantize import dequantize_weights
from gemma4_jax.train import defaults, run_config, state, tables
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.state import Network, from_items, reference_weights, to_items

LORA = {"rank": 2, "targets": ("*_proj/weight", "drafter/*_projection/weight")}
ALONE = LossConfig(mtp_weight=0.0)  # without a drafter
TRAINABLE = ("!*", "*/lora/*")
FLAT = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0)


def lora_trainer(changes=None, **options):
    model = mini.mini_config(**{"lora": LORA, **(changes or {})})
    return mini.mini_trainer(model=model, trainable=TRAINABLE, optimizer=FLAT, **options)


@pytest.fixture(scope="module")
def adapters():
    return lora_trainer()


def steps(trainer, start, count=3):
    losses = []
    for seed in range(count):
        start, metrics = trainer.train_step(start, trainer.place(mini.random_batch(seed=seed)))
        losses.append(float(metrics["loss"]))
    return start, losses


def test_only_adapters_train(adapters):
    """The others keep every bit and have neither gradients nor moments."""
    start = adapters.init()
    before = jax.device_get({**start.params, **start.frozen})
    assert all(is_adapter(name) for name in start.params) and not any(is_adapter(name) for name in start.frozen)
    moments = [leaf for leaf in jax.tree.leaves(start.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in start.params.values())
    end, _ = steps(adapters, start)
    for name, leaf in jax.device_get({**end.params, **end.frozen}).items():
        assert np.array_equal(leaf, before[name]) == (not is_adapter(name)), name


def test_the_first_loss_is_that_of_the_base(adapters, trainer):
    """Same weights, no adapters: the same number, so the mask of what is learnt is the same too."""
    weights = {name: leaf for name, leaf in adapters.init().frozen.items()}
    start = trainer.init(jax.device_get(weights))
    _, (expected, *_) = steps(trainer, start, 1)
    _, (found, *_) = steps(adapters, adapters.init(), 1)
    assert found == expected


def test_sharded_equals_unsharded(adapters):
    """data, fsdp and tensor, and layers recomputed: the same loss and adapters.

    Each half of an adapter is cut as the side of the weight that it faces.
    """
    sharded = lora_trainer({"remat": "full"}, mesh=(2, 2, 2))
    start = jax.device_put(jax.device_get(adapters.init()), sharded.shardings)
    end, found = steps(sharded, start, 2)
    reference, expected = steps(adapters, adapters.init(), 2)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, leaf in jax.device_get(end.params).items():
        off = np.abs(leaf - jax.device_get(reference.params[name])) > 1e-4  # Adam's first steps are signs
        assert off.mean() < 0.01, name
    specs = {name: tuple(place.spec)[-2:] for name, place in sharded.shardings.params.items()}
    for name, spec in specs.items():
        if "mlp/up_proj" in name:
            assert spec == ((None, "fsdp") if name.endswith("a") else ("tensor", None)), name
        if "mlp/down_proj" in name:
            assert spec == ((None, "tensor") if name.endswith("a") else ("fsdp", None)), name


def test_packed_base():
    """Packed values and scales are frozen and stay; loss falls; the adapters' gradient is that beside unpacked weights."""
    sizes = {"hidden_size": 32, "drafter": None, "lora": {"rank": 2}}
    packed = lora_trainer({**sizes, "quantization": "int4"}, loss=ALONE)
    start = packed.init()
    kinds = {leaf.dtype.name for name, leaf in start.frozen.items() if name.endswith("/values")}
    assert kinds == {"uint8", "int8"}
    assert all(is_adapter(name) for name in start.params)
    before = jax.device_get(start.frozen)
    end, losses = steps(packed, start, 3)
    for name, leaf in jax.device_get(end.frozen).items():
        np.testing.assert_array_equal(leaf, before[name])

    plain = lora_trainer(sizes, loss=ALONE)
    again = packed.init()
    given = dequantize_weights({**again.params, **again.frozen}, "float32")
    _, expected = steps(plain, plain.init(jax.device_get(given)), 3)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_share_of_the_small_model(kind):
    """1 % or less of the weights at the config's rank."""
    config = run_config.load_config(f"configs/finetune.py:{kind}", launch.ROOT)[0]
    network = Network(defaults.adapted(get_preset("small"), config))
    names = state.trainable_names(network, LossConfig(**config.loss), config.train.trainable)
    assert names == {name for name in network.shapes if is_adapter(name)}
    share = sum(network.shapes[name].size for name in names) / sum(leaf.size for leaf in network.shapes.values())
    assert 0.005 < share <= 0.01
    table = tables.trainable_table(network.shapes, names)
    assert "all that trains" in table and f"{100 * share:8.4f} %" in table
    assert "model/groups" in table and "/self_attn/q_proj/lora/*" in table


def test_table_adds_up():
    shapes = {
        f"model/tail/{i}/x/weight": jax.ShapeDtypeStruct((3, 4), np.float32) for i in range(2)
    } | {"model/t": jax.ShapeDtypeStruct((76,), np.float32)}  # fmt: skip
    rows = tables.trainable_table(shapes, [name for name in shapes if "tail" in name]).splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "model/tail/*/x/weight 24 24.0000 %", "all that trains 24 24.0000 %", "all that is frozen 76 76.0000 %",
    ]  # fmt: skip


def test_adapters_of_another_run_are_refused():
    config = run_config.load_config("configs/finetune.py:lora", launch.ROOT)[0]
    base = defaults.adapted(get_preset("small"), config)
    assert defaults.adapted(base, config) == base
    config.lora.rank = 4
    with pytest.raises(ConfigError, match="has adapters of rank 8, but lora.rank is 4"):
        defaults.adapted(base, config)


# ------------------------------------------------------------------------------------------------------------- preference


def pairs(rows=8, seed=0):
    """Two halves a row: questions in common, answers out of two different halves of the vocabulary."""
    rng = np.random.default_rng(seed)
    half = mini.SEQ_LEN // 2
    tokens = np.zeros((rows, mini.SEQ_LEN), np.int32)
    tokens[:, : half - 3] = tokens[:, half : 2 * half - 3] = rng.integers(5, 64, (rows, half - 3))
    tokens[:, half - 3 : half] = rng.integers(5, 34, (rows, 3))
    tokens[:, 2 * half - 3 :] = rng.integers(34, 64, (rows, 3))
    return {
        "tokens": tokens,
        "loss_mask": np.tile(np.arange(mini.SEQ_LEN) % half >= half - 3, (rows, 1)),
        "segment_ids": np.tile(1 + np.arange(mini.SEQ_LEN, dtype=np.int32) // half, (rows, 1)),
        "positions": np.tile(np.arange(mini.SEQ_LEN, dtype=np.int32) % half, (rows, 1)),
    }


DPO = LossConfig(name="dpo", beta=0.2)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_dpo_raises_margins(kind):
    """From log 2 on; the reference stays where training began and holds no more than what trains."""
    alone = {"drafter": None, "lora": {"rank": 8} if kind == "lora" else None}
    trainer = mini.mini_trainer(
        model=mini.mini_config(**alone), loss=DPO,
        optimizer=dataclasses.replace(FLAT, learning_rate=1e-2 if kind == "lora" else 3e-2),
        trainable=TRAINABLE if kind == "lora" else ("*",), accumulation=1 if kind == "lora" else 2,
    )  # fmt: skip
    start = trainer.init()
    first = jax.device_get(start.params)
    assert reference_weights(start.frozen).keys() == first.keys()
    assert all(is_adapter(name) == (kind == "lora") for name in first)
    history = []
    for seed in range(60 if kind == "lora" else 12):  # adapters of a random model learn slowly
        start, metrics = trainer.train_step(start, trainer.place(pairs(rows=32, seed=seed)))
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert history[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    end = {name: np.mean([row[name] for row in history[-4:]]) for name in history[0]}
    # With the table frozen, one direction of 16 has to tell the two halves of the vocabulary apart.
    assert end["reward_margin"] > 0.2 and end["reward_accuracy"] > (0.7 if kind == "lora" else 0.9)
    assert end["loss"] < 0.6
    for name, leaf in jax.device_get(reference_weights(start.frozen)).items():
        np.testing.assert_array_equal(leaf, first[name])
    sums = trainer.eval_step(start.params, start.frozen, trainer.place(pairs(seed=99)))
    assert float(sums["reward_margin"] / sums["count_preference"]) > 0.1
    items = to_items(start)
    assert "reference" not in items["params"] and set(items["train"]["reference"]) <= {"model", "drafter"}
    back = from_items(items, start)
    assert jax.tree.structure(back) == jax.tree.structure(start)
    assert all(back.frozen[name] is leaf for name, leaf in start.frozen.items())


def test_dpo_and_pairs_go_together():
    config = run_config.load_config("configs/finetune.py:dpo", launch.ROOT)[0]
    config.data.format = "chat"
    with pytest.raises(ConfigError, match="loss.name 'dpo' does not go with data.format 'chat'"):
        defaults.make_trainer(config, dataclasses.replace(mini.mini_config(), max_position_embeddings=4096))
