"""Every config file resolves, says how it is run, and keeps its defaults (text goldens)."""

import ast
import json
from pathlib import Path

import jax
import pytest

import experiments
import launch
from gemma4_jax.errors import ConfigError
from gemma4_jax.losses import LossConfig
from gemma4_jax.train import defaults, memory_plan, run_config, sweeps
from gemma4_jax.train.optimizer import OptimizerConfig

ROOT = Path(launch.__file__).parent
TRAINING = ["quickstart.py", "pretrain.py:tiny", "pretrain.py:small", "pretrain.py:12b"]
GOLDEN = [*TRAINING, *(f"finetune.py:{kind}" for kind in ("full", "lora", "qlora", "dpo", "drafter"))]
GOLDEN += ["pretrain.py:media_base", "finetune.py:digits", "finetune.py:dtmf"]
FILES = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
ABLATION = ["ablation.py:base", "ablation.py:mini"]
GOLDEN += [*ABLATION, "ablation.py:frozen", "evaluate.py"]
GOLDENS = Path(__file__).parent / "goldens"


def load(spec):
    return run_config.load_config(f"configs/{spec}", ROOT)[0]


@pytest.mark.parametrize("name", FILES)
def test_docstring_says_how_to_run_it(name):
    text = ast.get_docstring(ast.parse((ROOT / "configs" / name).read_text()))
    assert f"launch.py --config configs/{name}" in text


@pytest.mark.parametrize("name", FILES)
def test_default_config_names_a_known_experiment(name):
    assert load(name).experiment in experiments.EXPERIMENTS


@pytest.mark.parametrize("spec", GOLDEN)
def test_resolved_config_equals_its_golden(spec):
    """A changed default shows up here; if it was meant, write the file anew as the message says."""
    golden = GOLDENS / f"{spec.replace('.py', '').replace(':', '-')}.json"
    found = run_config.resolved(load(spec))
    changed = run_config.differences(json.loads(golden.read_text()), found)
    assert not changed, (
        f"differs from {golden.name} in {changed}; if meant: launch.py --config configs/{spec} --dry_run"
    )


@pytest.mark.parametrize("spec", [*TRAINING, *ABLATION])
def test_training_configs_give_a_model(spec):
    model = defaults.model_config(load(spec))
    assert model.drafter is not None


@pytest.mark.parametrize("spec", ["quickstart.py", "pretrain.py:tiny", *ABLATION])
def test_every_sweep_resolves(spec):
    """Each member is a model and a loss that go together, and differs from every other one."""
    config, module, _ = run_config.load_config(f"configs/{spec}", ROOT)
    for name in [key.removeprefix("sweep_") for key in vars(module) if key.startswith("sweep_")]:
        members = sweeps.members(module, name, config)
        assert len(members) > 1 and len({json.dumps(run_config.resolved(m.config)) for m in members}) == len(members)
        for member in members:
            assert defaults.model_config(member.config).drafter is not None
            LossConfig(**member.config.loss), OptimizerConfig(**member.config.optimizer)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "tny", "unknown preset 'tny'.*choices: gemma4_12b"),
        ("model_overrides.hiden_size", "3", "unknown config field 'hiden_size'.*did you mean 'hidden_size'"),
        ("model_overrides.drafter.hiden_size", "3", "unknown config field 'drafter.hiden_size'"),
        ("data.vocab_size", "300", "data.vocab_size 300 differs from the model's vocab_size 512"),
        ("data.seq_len", "9999", "data.seq_len 9999 is more than the model's max_position_embeddings"),
    ],
)
def test_contradictions_name_the_fields(field, value, message):
    config = load("pretrain.py:tiny")
    run_config.set_field(config, field, value)
    with pytest.raises(ConfigError, match=message):
        defaults.model_config(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", "6", "batch 6 is not a multiple of 8 devices on axis 'data'"),
        ("mesh.data", "3", "mesh.data 3 x fsdp 1 x tensor 1 = 3, but there are 8 devices"),
        ("train.steps", "0", "train.steps is 0"),
        ("train.trainable", "nothing/*", "pattern 'nothing/\\*' matches none"),
        ("optimizer.name", "sgd", "unknown optimizer.name 'sgd'.*choices: adamw"),
        ("loss.mtp_pairing", "x", "loss.mtp_pairing is 'x'"),
        ("model_overrides.drafter", "None", "loss.mtp_steps 3 needs a drafter"),
    ],
)
def test_bad_training_sections_name_the_fields(field, value, message):
    config = load("pretrain.py:tiny")
    run_config.set_field(config, field, value)
    with pytest.raises(ConfigError, match=message):
        defaults.make_trainer(config, defaults.model_config(config))


@pytest.fixture(scope="module")
def real():
    """``pretrain:12b`` on eight devices: shapes only."""
    config = load("pretrain.py:12b")
    model = defaults.model_config(config)
    return config, model, defaults.make_trainer(config, model)


def test_12b_resolves_to_the_published_sizes(real):
    _, model, trainer = real
    weights = [leaf for name, leaf in trainer.network.shapes.items() if name not in trainer.network.variables]
    assert sum(leaf.size for leaf in weights) == model.num_parameters() + model.num_parameters(drafter=True)
    assert model.num_parameters(drafter=True) == 422_856_960


def test_12b_lowers_on_eight_devices_without_allocating(real):
    config, _, trainer = real
    batch = trainer.abstract_batch(config.data.batch_size, config.data.seq_len)
    before = len(jax.live_arrays())
    lowered = trainer.train_step.lower(trainer.abstract, batch)
    assert len(jax.live_arrays()) == before
    out_state, metrics = lowered.out_info
    assert jax.tree.structure(out_state) == jax.tree.structure(trainer.abstract)
    assert metrics["loss"].shape == () and "mtp_4_loss" in metrics


def test_12b_state_is_cut_over_all_devices(real):
    """Weights in bf16 and moments in f32: an eighth of each on every device."""
    _, _, trainer = real
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract))
    local = memory_plan.local_bytes(dict(enumerate(jax.tree.leaves(trainer.abstract))))
    assert local < 1.02 * whole / 8
    floats = [leaf for leaf in jax.tree.leaves(trainer.abstract.opt_state) if leaf.ndim]
    assert all(leaf.dtype == "float32" for leaf in floats)
