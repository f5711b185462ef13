"""The library ``peft`` loads our adapters and gives our logits."""

import dataclasses
import json

import numpy as np
import peers
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

import gemma4_jax as g4
from gemma4_jax.bundle import add_lora, bundle_weights
from gemma4_jax.config import LoraConfig
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop.peft_export import save_folder
from gemma4_jax.model.lora import is_adapter
from gemma4_jax.train.state import Network

# peft asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROW = np.random.default_rng(0).integers(3, 60, 14).tolist()


def with_random_adapters(bundle, lora):
    bundle = add_lora(bundle, lora)
    rng = np.random.default_rng(2)
    weights = {
        name: leaf if not is_adapter(name) else leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        for name, leaf in bundle_weights(bundle).items()
    }
    bundle.model, bundle.drafter = Network(bundle.config).merge(weights)
    return bundle


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name, model in {"target": peers.target(media=False), "drafter": peers.drafter()}.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def adapted(published):
    base = g4.load(published / "target", drafter=published / "drafter", dtype="float32")
    return with_random_adapters(base, LoraConfig(rank=3, alpha=7.0, targets=("*",)))


def test_peft_gives_our_logits(published, adapted, tmp_path):
    g4.save(adapted, tmp_path / "adapter", format="peft")
    model = peers.transformers.Gemma4UnifiedForConditionalGeneration.from_pretrained(
        published / "target", attn_implementation="eager"
    )
    before = peers.logits(model, [ROW])
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    got, want = peers.logits(model, [ROW]), np.asarray(g4.logits(adapted, [ROW]))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - before).max() > 0.1
    found = {name for name, _ in model.named_parameters() if "lora_" in name}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default.", ".") for name in found} == set(written)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(peers.logits(merged, [ROW]), want, atol=1e-4)


def test_text_model_and_drafter(published, adapted, tmp_path):
    """Module names of the text model alone; the drafter's adapters fit the published drafter."""
    report = save_folder(
        tmp_path / "a", adapted.config, bundle_weights(adapted), base="hub/name", model_type="gemma4_unified_text"
    )
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "hub/name" and settings["r"] == 3 and settings["lora_alpha"] == 7.0
    assert "model.layers.0.self_attn.q_proj" in settings["target_modules"]
    text = load_file(tmp_path / "a" / "adapter_model.safetensors")
    draft = load_file(tmp_path / "a" / "drafter" / "adapter_model.safetensors")
    assert report == {
        "tensors": len(text) + len(draft),
        "bytes": sum(v.nbytes for v in [*text.values(), *draft.values()]),
    }
    model = peers.transformers.Gemma4UnifiedAssistantForCausalLM.from_pretrained(published / "drafter")
    model = PeftModel.from_pretrained(model, tmp_path / "a" / "drafter")
    state = dict(model.named_parameters())
    for name, value in draft.items():
        np.testing.assert_array_equal(state[name.replace(".weight", ".default.weight")].detach(), value)


def test_what_is_refused(adapted, tmp_path):
    weights = bundle_weights(adapted)
    with pytest.raises(ConfigError, match="unknown model type 'x'.*gemma4_unified"):
        save_folder(tmp_path / "a", adapted.config, weights, model_type="x")
    with pytest.raises(ConfigError, match="no adapters to write"):
        save_folder(tmp_path / "a", dataclasses.replace(adapted.config, lora=None), weights)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="full is not empty"):
        save_folder(tmp_path / "full", adapted.config, weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
