"""Every notebook says what its readable twin says, and runs from top to bottom at tiny size."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
REPOSITORY = "gemma4-jax/gemma4_jax"  # where Colab finds the notebooks
CODE = f"text:{ROOT}/gemma4_jax/sample/*.py"
SMALL = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "drafter.num_hidden_layers": 1}
# The names that a notebook's cell tagged "parameters" sets, smaller.
TINY = {
    "sampling": {"MODEL": SMALL, "NEW_TOKENS": 6},
    "multimodal": {"MODEL": SMALL, "NEW_TOKENS": 2},
    "finetuning_lora": {"MODEL": SMALL, "DRAFT_STEPS": 1, "STEPS": 2, "RANK": 2},
    "multi_token_prediction": {
        "SOURCE": CODE,
        "LAYERS": 2,
        "DRAFT_STEPS": 1,
        "STEPS": 2,
        "EVALUATE_EVERY": 1,
        "NEW_TOKENS": 6,
    },
    "ablation_sweep": {"SOURCE": CODE, "DRAFT_STEPS": 1, "STEPS": 2, "SEEDS": (0,)},
    "checkpoints": {"MODEL": SMALL},
}


def read(name, extension):
    return jupytext.read(ROOT / "notebooks" / f"{name}.{extension}")


def test_all_notebooks_are_here():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_twin_is_in_step(name):
    cells, twin = (
        [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in read(name, ending).cells]
        for ending in ("ipynb", "py")
    )
    assert cells == twin, f"run: jupytext --sync notebooks/{name}.py"


@pytest.mark.parametrize("name", TINY)
def test_it_opens_with_a_badge_and_an_install_cell(name):
    title, install = read(name, "py").cells[:2]
    assert f"colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb" in title.source
    assert "pip" in install.source and f"github.com/{REPOSITORY}" in install.source


@pytest.mark.parametrize("name", TINY)
def test_it_runs(name, tmp_path):
    notebook = read(name, "py")
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    assigned = {line.split(" = ")[0] for line in notebook.cells[place].source.splitlines()}
    assert set(TINY[name]) <= assigned
    small = "\n".join(f"{key} = {value!r}" for key, value in TINY[name].items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(small))
    client = NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    one_device = "--xla_backend_optimization_level=0"
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": one_device, "TMPDIR": str(tmp_path)})
    printed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(output.output_type == "stream" and output.name == "stdout" for output in printed)
