"""The ablation that CONTRIBUTING.md shows, run as it stands there; a member repeated from its config.json to the last digit."""

import json
import re
from pathlib import Path

import pytest

import launch
from experiments import ablation_report
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.train import comparison, run_config, sweeps
from gemma4_jax.train.metrics import read_metrics

ROOT = Path(launch.__file__).parent
TINY = [
    "model_overrides.num_hidden_layers=2", "model_overrides.sliding_window_pattern=2", "model_overrides.hidden_size=16",
    "model_overrides.intermediate_size=16", "model_overrides.head_dim=8", "model_overrides.global_head_dim=8",
    "model_overrides.vocab_size=320", "data.vocab_size=320", "model_overrides.drafter.num_hidden_layers=1",
    "model_overrides.drafter.hidden_size=16", "loss.mtp_steps=2", "data.batch_size=8", "data.seq_len=40",
    "data.heldout_fraction=0.2", "optimizer.warmup_steps=1", "train.steps=3", "train.eval_every=2", "train.final_eval_batches=2",
    "samples.prompts=2", "samples.prompt_tokens=8", "samples.new_tokens=8", "samples.draft_tokens=2",
]  # fmt: skip
TIMES = ("seconds", "per_second", "speedup", "input_wait", "_dtype")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text("\n".join(f"x{j % 7} = f({j * i % 5}, {j})" for j in range(40)))
    return f"data.source=text:{folder}/*.txt"


def launched(config, workdir, corpus, *more):
    overrides = [f"--config.{field}" for field in (*TINY, corpus)]
    return launch.main(["--config", str(config), "--workdir", str(workdir), *overrides, *more])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, corpus):
    """(config file, folder of the sweep, its first member run)."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    assert len(block.splitlines()) < 15
    config = tmp_path_factory.mktemp("mine") / "decay.py"
    config.write_text(block)
    workdir = config.parent / "runs"
    assert launched(config, workdir, corpus, "--sweep", "decay", "--sweep_index", "0") == 0
    return config, workdir


def deterministic(results):
    return {name: value for name, value in results.items() if not any(word in name for word in TIMES)}


def test_a_stranger_adds_an_ablation(sweep, corpus, capsys):
    config, workdir = sweep
    assert launched(config, workdir, corpus, "--sweep", "decay", "--dry_run") == 0
    assert capsys.readouterr().out.count("loss.mtp_decay: 0.8 -> ") == 6  # of 9: in three it is 0.8 already
    loaded, module, _ = run_config.load_config(str(config), ROOT)
    comparison.write(sweeps.members(module, "decay", loaded), workdir)
    table = (workdir / "sweep.md").read_text()
    assert "| mtp_decay=0.6 | 1 of 3 |" in table and "8 of 9 members failed" in table
    assert (workdir / "plots" / "sweep_acceptance.png").is_file()


def test_a_member_is_repeated_to_the_last_digit(sweep, tmp_path):
    _, workdir = sweep
    (folder,) = (path.parent for path in workdir.glob("*/results.json"))
    assert launch.main(["--config", str(folder / "config.json"), "--workdir", str(tmp_path / "again")]) == 0
    first, again = (json.loads((path / "results.json").read_text()) for path in (folder, tmp_path / "again"))
    assert deterministic(first) == deterministic(again) and len(deterministic(first)) > 12
    losses = [[row["next_token_loss"] for row in read_metrics(path)] for path in (folder, tmp_path / "again")]
    assert losses[0] == losses[1] and len(losses[0]) > 2
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    page = (folder / "report.html").read_text()
    assert page.count('class="tokens"') == 2 and 'alt="acceptance"' in page


def test_the_page_of_the_first_result(tmp_path):
    """Tables and plots come between the marks, the words around them stay."""
    config, module, _ = run_config.load_config(ablation_report.CONFIG, ROOT)
    for member in sweeps.members(module, ablation_report.SWEEP, config)[:4]:
        folder = tmp_path / "runs" / member.folder
        folder.mkdir(parents=True)
        results = {"val_loss": 2.0 + member.index, "acceptance_per_step": [0.5, 0.4], "speedup": 0.9}
        (folder / "results.json").write_text(json.dumps(results))
    page = tmp_path / "mtp.md"
    page.write_text(
        "# Words\n<!-- table training -->\nold\n<!-- end -->\nMore words\n<!-- table speedup -->\n<!-- end -->\n"
    )
    ablation_report.update_page(page, ablation_report.read_settings(tmp_path / "runs"))
    text = page.read_text()
    assert "# Words" in text and "More words" in text and "old" not in text
    assert "| base | 1 of 3 | 2 |" in text and "| mtp_distill=True | 1 of 3 | 4 |" in text and "mtp_steps" not in text
    assert "figures/mtp/training_acceptance.png" in text
    assert "![speed-up](figures/mtp/speedup.png)" in text
    assert (tmp_path / "figures" / "mtp" / "speedup.png").is_file()
    ablation_report.update_page(page, ablation_report.read_settings(tmp_path / "runs"))
    assert page.read_text() == text  # a second time: the same page
    with pytest.raises(DataError, match="no finished member"):
        ablation_report.read_settings(tmp_path)
    page.write_text("<!-- table x -->\n<!-- end -->")
    with pytest.raises(ConfigError, match="unknown table 'x'"):
        ablation_report.update_page(page, ablation_report.read_settings(tmp_path / "runs"))


def test_a_json_that_is_no_config(tmp_path):
    for text, message in (("{", "is not JSON"), ("[1]", "has no field 'experiment'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            run_config.load_config(str(tmp_path / "config.json"), ROOT)
