"""A sweep's comparison: seeds of one setting together, numbers by hand, pictures there."""

import csv
import json
import types

import pytest

from gemma4_jax.train import comparison, sweeps

RESULTS = {
    (("loss.k", 1), 0): {"val_loss": 1.0, "acceptance_per_step": [0.5, 0.25], "same": 3, "name": "x"},
    (("loss.k", 1), 1): {"val_loss": 2.0, "acceptance_per_step": [0.7, 0.35], "same": 3, "name": "y"},
    (("loss.k", 2), 0): {"val_loss": 4.0, "acceptance_per_step": [0.1, None], "same": 3, "name": "x"},
    (("loss.k", 2), 1): None,
}


@pytest.fixture
def sweep(tmp_path):
    members = []
    for index, ((field, seed), results) in enumerate(RESULTS.items()):
        (overrides,) = sweeps.over_seeds(dict([field]), seeds=[seed])
        member = types.SimpleNamespace(index=index, overrides=overrides, folder=f"{index}-x")
        members.append(member)
        folder = tmp_path / member.folder
        folder.mkdir()
        rows = [{"step": s, "kind": "eval", "next_token_loss": 5.0 - s + seed} for s in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
    return members, tmp_path


def test_mean_and_spread_over_seeds(sweep):
    one, two = comparison.settings(*sweep)
    assert (one.name, one.finished, two.name, two.finished) == ("k=1", 2, "k=2", 1)
    assert one.numbers()["val_loss"] == comparison.Spread(1.5, pytest.approx(0.5**0.5), 2)
    assert one.numbers()["acceptance_per_step_2"].mean == pytest.approx(0.3)
    assert str(one.numbers()["val_loss"]) == "1.5 ± 0.71" and str(two.numbers()["val_loss"]) == "4"
    assert "name" not in one.numbers() and "acceptance_per_step_2" not in two.numbers()


def test_files_of_a_comparison(sweep):
    members, folder = sweep
    comparison.write(members, folder)
    table = (folder / "sweep.md").read_text()
    assert "| k=1 | 2 | 1.5 ± 0.71 |" in table and "| k=2 | 1 of 2 | 4 | 0.1 |  |" in table
    assert "same" not in table and "1 of 4 members failed:\n\n- 3-x" in table
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"]
    assert rows[1]["acceptance_per_step_1"] == "0.7" and rows[1]["seed"] == rows[1]["data.shuffle_seed"] == "1"
    drawn = {path.stem for path in (folder / "plots").iterdir()}
    assert {"sweep_loss", "sweep_acceptance", "sweep_val_loss"} <= drawn and "sweep_same" not in drawn


def test_a_setting_without_overrides_is_the_base():
    assert comparison.setting_name({}) == "base"
    assert comparison.setting_name({"a.b": (1, 2), "c": 0.1}) == "b=1,2, c=0.1"
