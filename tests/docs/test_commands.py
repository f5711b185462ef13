"""What README, CONTRIBUTING, docs and notebooks tell people to type: every command resolves, the cheap ones and the Python
code run, at tiny size, in a folder that holds what they name."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import gemma4_jax as g4
import launch
from gemma4_jax.sample import policy
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train import run_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
SMALL = {
    "num_hidden_layers": 2, "layer_types": ("sliding_attention", "full_attention"), "hidden_size": 64,
    "intermediate_size": 32, "drafter.num_hidden_layers": 1, "drafter.hidden_size": 32, "drafter.intermediate_size": 32,
}  # fmt: skip
# Commands that run, and what makes them small.
CHEAP = {
    "configs/sample.py": ["sample.max_new_tokens=4", "sample.max_length=64", "sample.draft_tokens=0"],
    "configs/convert.py:to_hf": [],
    "configs/convert.py:to_gguf": [],
    "configs/convert.py:from_hf": [],
    "configs/finetune.py:lora": [
        "data.seq_len=32", "data.batch_size=8", "loss.mtp_steps=1", "train.steps=1", "train.eval_every=0",
        "train.checkpoint_every=0", "train.final_eval_batches=1", "optimizer.warmup_steps=1", "data.source=text:*.txt",
    ],
}  # fmt: skip


def blocks(path, *languages):
    """Fenced blocks of a page in these languages."""
    found = re.findall(r"^```([\w{}-]*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands():
    """Arguments of every ``launch.py`` command, once each: those of blocks, and those written in the midst of a sentence."""
    found = {}
    for path in PAGES + NOTEBOOKS:
        text = re.sub(r"^# ", "", path.read_text(), flags=re.MULTILINE) if path.suffix == ".py" else path.read_text()
        lines = (
            []
            if path.suffix == ".py"
            else "".join(blocks(path, "", "bash", "console")).replace("\\\n", " ").splitlines()
        )
        lines += re.findall(r"`(python launch\.py --config [^`]+)`", text)
        for line in lines:
            match = re.search(r"launch\.py (--config [^|;&#]*)", " ".join(line.split()))
            if match and not re.search(r"configs/NAME|--config …", match[1]):
                # How many processes there are is the cluster's to say.
                here = re.sub(r"--config\.distributed\.\S+", "", match[1].replace("…", "")).strip(' "')
                found.setdefault(" ".join(here.split()), path.name)
    return found


COMMANDS = commands()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages take for granted: a run, a member of a sweep, published weights with their drafter, media, data."""
    place = tmp_path_factory.mktemp("pages")
    bundle = g4.init("tiny", config_overrides=SMALL)
    bundle.tokenizer = train_tokenizer(["import os", "import sys", "def main(self):"] * 5, bundle.config.vocab_size)
    g4.save(bundle, place / "runs" / "quickstart")
    g4.save(bundle, place / "FOLDER")
    g4.save(bundle, place / "path" / "to" / "gemma-4-12B-it", format="huggingface")
    (place / "path" / "to" / "gemma-4-12B-it" / "drafter").rename(place / "path" / "to" / "gemma-4-12B-it-assistant")
    config, _, _ = run_config.load_config("configs/pretrain.py:tiny", ROOT)
    (place / "MEMBER").mkdir()
    (place / "MEMBER" / "config.json").write_text(json.dumps(run_config.resolved(config)))
    Image.new("RGB", (48, 48), "gray").save(place / "cat.jpg")
    soundfile.write(place / "question.wav", np.zeros(4000, np.float32), 16_000)
    for name in "ab":
        (place / f"{name}.txt").write_text("import os\nimport sys\n" * 60)
    return place


def test_there_are_commands():
    assert len(COMMANDS) > 20
    assert {"README.md", "CONTRIBUTING.md", "sampling.md", "multimodal.py"} <= {*COMMANDS.values()}


@pytest.fixture(scope="module")
def outcomes(folder):
    """(exit code, stderr) of each command's dry run, on a machine of one device."""
    runs = []
    for command in COMMANDS:
        indexed = re.sub(r" --sweep_index \S+", "", command)  # a member runs; the sweep it belongs to is listed
        runs.append([*shlex.split(indexed), *([] if "--dry_run" in command else ["--dry_run"])])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "dry_runs.py")], input=json.dumps(runs), capture_output=True, text=True,
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(COMMANDS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: text[9:90])
def test_a_command_resolves(command, outcomes):
    code, errors = outcomes[command]
    assert code == 0, errors


@pytest.mark.parametrize("config", CHEAP)
def test_a_cheap_command_runs(config, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    command = next(text for text in COMMANDS if text.split()[1] == config)
    overrides = [f"--config.{field}" for field in CHEAP[config]]
    code = launch.main([*shlex.split(command), *overrides, "--workdir", str(tmp_path / "run")])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize("page", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.name)
def test_the_code_of_a_page_runs(page, folder, monkeypatch):
    """The blocks of a page, one after another in one namespace."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(policy, "CANDIDATES", (0, policy.PROBE))  # each draft length is compiled
    monkeypatch.setitem(g4.Chat.__init__.__kwdefaults__, "max_new_tokens", 8)
    names = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_pages_build_without_a_warning(tmp_path):
    """The API reference among them, from the docstrings."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs")]
    done = subprocess.run(
        [*command, str(tmp_path / "html")], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "html").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    reference = (tmp_path / "html" / "api.html").read_text()
    names = ("bundle.load", "bundle.init", "bundle.save", "scores.logits", "scores.draft_logits")
    assert all(f'id="gemma4_jax.{name}"' in reference for name in names)
