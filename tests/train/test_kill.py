"""SIGKILL at moments drawn by lot, while files are written too: the run that goes on is the run that was never killed.

``tests/helpers/kill_run.py`` says what is killed when; by hand it takes any number of kills:
``PYTHONPATH=.:tests/helpers python tests/helpers/kill_run.py FOLDER 25 0 times 0 1 2``.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import kill_run
import mini_train
import numpy as np
import pytest

import gemma4_jax
from gemma4_jax.train import checkpoints, metrics, trees

HELPERS = Path(mini_train.__file__).parent
ROOT = Path(gemma4_jax.__file__).parents[1]
TIMES = ("tokens_per_second", "input_wait_share")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """The folder, and how each life ended: two kills without a data worker, two with one."""
    folder = tmp_path_factory.mktemp("kill")
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(HELPERS / "kill_run.py"), str(folder), "2", "7", "events", "0", "1"]
    done = subprocess.run(command, env=environment, check=True, timeout=400, stdout=subprocess.PIPE, text=True)
    return folder, json.loads(done.stdout)


def final_state(workdir):
    folder = workdir / "checkpoints" / checkpoints.step_name(kill_run.STEPS)
    checkpoints.read_manifest(folder)
    items = {item: trees.unflatten(checkpoints.describe(folder, item)) for item in ("params", "train", "average")}
    arrays = {
        name: np.asarray(leaf).tobytes() for name, leaf in trees.flatten(checkpoints.restore(folder, items)).items()
    }
    return arrays, json.loads((folder / "data" / "process_0-of-1.json").read_text())


def recorded(workdir):
    """By place in the data, the rows that were taken there, in each life that came there."""
    batches = {}
    for line in (workdir / kill_run.LOG).read_text().splitlines():
        place, *rows = line.split()
        batches.setdefault(int(place), set()).add(tuple(rows))
    return batches


def test_killed_runs_end_like_the_whole_one(lives):
    folder, ends = lives
    killed = {end["run"] for end in ends} - {"whole"}
    for workers in (0, 1):
        codes = [end["code"] for end in ends if end["run"].startswith(f"killed-{workers}-")]
        assert codes.count(-signal.SIGKILL) == 2 and codes[-1] == 0
    for name in sorted(killed):
        assert_same_run(folder / name, folder / "whole")


def assert_same_run(killed, whole):
    """State, data position and metrics at the end; nothing half-written left."""
    expected, place = final_state(whole)
    found, found_place = final_state(killed)
    assert found_place == place and found.keys() == expected.keys()
    assert [name for name, data in expected.items() if found[name] != data] == []
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read_metrics(w)] for w in (whole, killed)
    ]
    assert rows[0] == rows[1]
    assert checkpoints.list_steps(killed / "checkpoints") == [kill_run.STEPS - 1, kill_run.STEPS]
    assert not [path for path in killed.rglob("*") if "tmp" in path.name and path.is_dir()]


def test_each_row_once_an_epoch(lives):
    """Whoever took a batch, and however often: the same rows at the same place, and no row twice in an epoch."""
    folder, ends = lives
    batches = recorded(folder / "whole")
    for name in {end["run"] for end in ends}:
        assert recorded(folder / name) == batches
    assert all(len(taken) == 1 for taken in batches.values())
    rows = [row for place in sorted(batches) for row in next(iter(batches[place]))]
    epoch = len(set(rows))
    assert len(rows) > 2 * epoch  # whole epochs and their ends are among the steps
    assert all(len(set(rows[i : i + epoch])) == epoch for i in range(0, len(rows) - epoch + 1, epoch))
