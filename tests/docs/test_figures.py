"""The pictures are what the code draws, and say what the preset says."""

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from gemma4_jax.config import get_preset

ROOT = Path(__file__).parents[2]


def _figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = _figures()


def outline(path):
    """Words of a picture, and how many shapes it has: what does not depend on the version of the drawing library."""
    elements = list(ET.parse(path).iter())
    texts = sorted("".join(e.itertext()).strip() for e in elements if e.tag.endswith("}text"))
    return texts, sum(e.tag.endswith("}path") for e in elements)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    FIGURES.write(folder)
    return folder


@pytest.mark.parametrize("name", FIGURES.FIGURES)
def test_the_committed_picture_is_what_the_code_draws(drawn, name):
    assert outline(drawn / name) == outline(ROOT / "docs" / "figures" / name), "run: python docs/figures.py"
    assert f"docs/figures/{name}" in (ROOT / "README.md").read_text()


def test_numbers_come_from_the_configuration(tmp_path):
    small = get_preset("gemma4_12b", hidden_size=640, num_hidden_layers=12)
    figure = FIGURES.architecture(small)
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "2 groups of 6 layers = 12 layers" in words
    assert "2 × 640 → 1,024" in words


@pytest.mark.parametrize(("steps", "kept"), [(1, 0), (3, 3), (4, 2)])
def test_a_round_keeps_the_right_beginning_and_one_more(steps, kept):
    texts = [text.get_text() for text in FIGURES.speculative_round(steps, kept).axes[0].texts]
    assert texts.count("decoder's") == 1
    assert texts.count("dropped") == steps - kept
    assert f"{kept + 1} tokens for one pass instead of {kept + 1} passes" in texts[-1]
