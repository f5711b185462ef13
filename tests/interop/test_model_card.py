"""The card beside an exported model: true about the model, readable by a hub, and with nothing made up."""

import pytest
import yaml

import gemma4_jax as g4
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.config import get_preset
from gemma4_jax.interop.hf_export import save_folder
from gemma4_jax.interop.model_card import model_card


def header(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_12b():
    front, body = header(model_card(get_preset("gemma4_12b"), "bfloat16", name="mine"))
    assert front == {
        "library_name": "transformers", "pipeline_tag": "any-to-any", "tags": ["gemma4", "speculative-decoding"],
    }  # fmt: skip
    assert body.strip().startswith("# mine")
    assert "48 layers (8 of them global) of width 3840" in body
    assert "drafter of 422,856,960" in body and "Inputs: text, images, video, audio" in body
    assert body.count("To be filled in") == 5


@pytest.mark.parametrize("form", ["transformers", "drafter", "gguf"])
def test_text_only_without_drafter(form):
    config = get_preset("tiny", vision=None, audio=None, drafter=None)
    front, body = header(model_card(config, "float32", form=form))
    assert front["pipeline_tag"] == "text-generation" and front["tags"] == ["gemma4"]
    assert front["library_name"] == ("gguf" if form == "gguf" else "transformers")
    assert "images" not in body
    assert ("drafter=" in body) == (form == "drafter")


def test_it_lies_beside_the_export_and_loads_as_it_says(tmp_path):
    layers = {"num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "vocab_size": 64}
    bundle = g4.init("tiny", config_overrides={**layers, "vision": None, "audio": None})
    save_folder(tmp_path / "out", bundle.config, bundle_weights(bundle))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card and f"{bundle.config.num_parameters():,} weights in float32" in card
    call = next(line for line in card.splitlines() if line.startswith("bundle = "))
    names = {"g4": g4}
    exec(call.replace("FOLDER", str(tmp_path / "out")), names)
    assert names["bundle"].drafter is not None
    assert "is of no use with any other model" in (tmp_path / "out" / "drafter" / "README.md").read_text()
    # A card that the caller brings takes the template's place.
    save_folder(tmp_path / "own", bundle.config, bundle_weights(bundle), files={"README.md": "mine"})
    assert (tmp_path / "own" / "README.md").read_text() == "mine"
