"""The command line: exit codes, one-line errors, overrides, folders, sweeps. Experiments are replaced by small ones."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import experiments
import launch
from gemma4_jax.errors import CheckpointError, ConfigError, DataError
from gemma4_jax.train import checkpoints, profiling, run_config, sweeps
from gemma4_jax.train.signals import Interrupted

ROOT = Path(launch.__file__).parent

CONFIG = '''"""A config of the tests."""
from ml_collections import ConfigDict
from gemma4_jax.errors import ConfigError

def get_config(arg=None):
    if arg not in (None, "big"):
        raise ConfigError(f"unknown argument {arg!r}; choices: big")
    return ConfigDict({
        "experiment": "sample", "seed": 0, "name": "x", "rate": 0.5, "flag": False, "sizes": (1, 2),
        "model_overrides": {}, "part": {"depth": 2},
    })

def sweep_depth():
    yield {"part.depth": 1}
    yield {"part.depth": 2, "name": "a/b c"}
    yield {"part.depth": 13}
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def experiment(monkeypatch):
    """``experiment.run`` may be replaced; calls are recorded."""
    module = types.ModuleType("fake")
    module.calls = []

    def run(config, workdir):
        module.calls.append((config, workdir))
        return {"depth": config.part.depth}

    module.run = run
    monkeypatch.setattr(experiments, "get_experiment", lambda name: module)
    return module


def run(*argv):
    return launch.main([str(a) for a in argv])


def test_a_run_writes_config_and_results(tmp_path, config_file, experiment):
    code = run("--config", config_file, "--workdir", tmp_path / "w", "--config.part.depth=5", "--config.name", "y")
    assert code == 0
    assert json.loads((tmp_path / "w" / "results.json").read_text()) == {"depth": 5}
    written = json.loads((tmp_path / "w" / "config.json").read_text())
    assert written["part"] == {"depth": 5} and written["name"] == "y" and written["sizes"] == [1, 2]
    assert experiment.calls[0][1] == tmp_path / "w"


@pytest.mark.parametrize("written", [True, False])
def test_a_trace_that_was_not_written_is_said(tmp_path, config_file, experiment, caplog, written):
    experiment.run = lambda *_: (profiling.folder().mkdir() if written else None) or {}
    assert run("--config", config_file, "--workdir", tmp_path / "w", "--profile") == 0
    assert [r.getMessage() for r in caplog.records] == ([] if written else [
        "--profile: no trace was written; benchmarks and sample write one, and training from step 4 on"
    ])  # fmt: skip


def test_default_workdir_is_named_after_the_config(tmp_path, config_file, experiment, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--config", f"{config_file}:big") == 0
    assert (tmp_path / "runs" / "mine-big" / "results.json").exists()


BAD_COMMANDS = [
    (["--config", "configs/nothing.py"], "unknown config file 'configs/nothing.py'"),
    (["--config", "FILE:huge"], "unknown argument 'huge'; choices: big"),
    (["--config", "FILE", "--config.part.dept=1"], "unknown config field 'part.dept' (did you mean 'part.depth'?)"),
    (["--config", "FILE", "--config.prat.depth=1"], "unknown config field 'prat'"),
    (["--config", "FILE", "--config.part=1"], "config.part is a section; set one of its fields: depth"),
    (["--config", "FILE", "--config.seed.x=1"], "unknown config field 'seed'"),
    (["--config", "FILE", "--config.seed=1.5"], "config.seed must be a whole number, got '1.5'"),
    (["--config", "FILE", "--config.seed=one"], "config.seed must be a whole number, got 'one'"),
    (["--config", "FILE", "--config.seed=true"], "config.seed must be a whole number"),
    (["--config", "FILE", "--config.flag=2"], "config.flag must be true or false, got '2'"),
    (["--config", "FILE", "--config.rate=fast"], "config.rate must be a number, got 'fast'"),
    (["--config", "FILE", "--config.seed"], "--config.seed needs a value"),
    (["--config", "FILE", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["--config", "FILE", "--resume=maybe"], "invalid choice: 'maybe'"),
    (["--workdir", "x"], "the following arguments are required: --config"),
    (["--config", "FILE", "--sweep", "xyz"], "unknown sweep 'xyz'; choices: depth"),
    (["--config", "FILE", "--sweep", "depth", "--sweep_index", "3"], "--sweep_index 3 is not in 0…2"),
    (["--config", "FILE", "--sweep_index", "0"], "--sweep_index needs --sweep"),
    (["--config", "FILE", "--resume=must"], "holds no checkpoint"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_COMMANDS, ids=[message for _, message in BAD_COMMANDS])
def test_bad_commands(argv, message, tmp_path, config_file, experiment, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*(a.replace("FILE", config_file) for a in argv)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not experiment.calls and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [("3", "seed", 3), ("2", "rate", 2.0), ("1e-3", "rate", 1e-3), ("true", "flag", True), ("0", "flag", False),
     ("7", "name", "7"), ("3,4", "sizes", (3, 4)), ("(5,)", "sizes", (5,)), ("6", "sizes", (6,))],
)  # fmt: skip
def test_overrides_keep_types(config_file, text, field, value):
    config, _, _ = run_config.load_config(config_file, ROOT)
    run_config.set_field(config, field, text)
    assert config[field] == value and type(config[field]) is type(value)


def test_model_overrides_take_new_fields(config_file):
    config, _, _ = run_config.load_config(config_file, ROOT)
    for field, text in (
        ("hidden_size", "64"),
        ("drafter.num_hidden_layers", "1"),
        ("vision", "None"),
        ("dtype", "bfloat16"),
    ):
        run_config.set_field(config, f"model_overrides.{field}", text)
    assert config.model_overrides.to_dict() == {
        "hidden_size": 64, "drafter": {"num_hidden_layers": 1}, "vision": None, "dtype": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("bad field"), 2), (DataError("row 3 is\nempty"), 3), (CheckpointError("no file"), 3)],
)
def test_errors_of_experiments(tmp_path, config_file, experiment, capsys, error, code):
    """One line, the right code, and nothing half-written; the traceback only with --debug."""

    def fail(config, workdir):
        (workdir / "data").mkdir()
        raise error

    experiment.run = fail
    assert run("--config", config_file, "--workdir", tmp_path / "w") == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    assert not (tmp_path / "w").exists()
    with pytest.raises(type(error)):
        run("--config", config_file, "--workdir", tmp_path / "w", "--debug")


def test_a_failure_keeps_checkpoints(tmp_path, config_file, experiment):
    def fail(config, workdir):
        folder = workdir / "checkpoints" / checkpoints.step_name(1)
        folder.mkdir(parents=True)
        (folder / checkpoints.MANIFEST).write_text("{}")
        raise DataError("the data ended")

    experiment.run = fail
    assert run("--config", config_file, "--workdir", tmp_path / "w") == 3
    assert checkpoints.list_steps(tmp_path / "w" / "checkpoints") == [1]


def test_other_errors_keep_their_traceback(tmp_path, config_file, experiment):
    def fail(config, workdir):
        raise ZeroDivisionError

    experiment.run = fail
    with pytest.raises(ZeroDivisionError):
        run("--config", config_file, "--workdir", tmp_path / "w")


@pytest.mark.parametrize(("stop", "code"), [(Interrupted(15), 143), (KeyboardInterrupt(), 130)])
def test_exit_codes_of_signals(tmp_path, config_file, experiment, stop, code):
    def fail(config, workdir):
        raise stop

    experiment.run = fail
    assert run("--config", config_file, "--workdir", tmp_path / "w") == code


def test_a_folder_of_another_config_is_refused(tmp_path, config_file, experiment, capsys):
    where = ("--config", config_file, "--workdir", tmp_path / "w")
    assert run(*where) == 0
    assert run(*where) == 0  # the same config goes on
    assert run(*where, "--config.part.depth=9", "--config.seed=4") == 2
    error = capsys.readouterr().err
    assert "part.depth (2 there, 9 now)" in error and "seed (0 there, 4 now)" in error
    assert json.loads((tmp_path / "w" / "config.json").read_text())["part"]["depth"] == 2
    assert run(*where, "--resume=never") == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: w.write_text("x"), "is not a folder"),
        (lambda w: (w.mkdir(), (w / "notes.txt").write_text("x")), "holds no config.json"),
        (lambda w: (w.mkdir(), (w / "config.json").write_text("{")), "config.json is not JSON"),
    ],
)
def test_a_strange_folder_is_refused(tmp_path, config_file, experiment, capsys, make, message):
    make(tmp_path / "w")
    assert run("--config", config_file, "--workdir", tmp_path / "w") == 2
    assert message in capsys.readouterr().err


def test_dry_run_runs_nothing(tmp_path, config_file, experiment, capsys):
    experiment.plan = lambda config: f"plan of depth {config.part.depth}"
    assert run("--config", config_file, "--workdir", tmp_path / "w", "--dry_run") == 0
    out = capsys.readouterr().out
    assert json.loads(out[: out.rindex("plan")])["part"] == {"depth": 2} and "plan of depth 2" in out
    assert not experiment.calls and not (tmp_path / "w").exists()


def test_unknown_experiment():
    with pytest.raises(ConfigError, match="unknown config.experiment 'pretrian'.*did you mean 'pretrain'"):
        experiments.get_experiment("pretrian")


def test_sweep_dry_run_prints_differences(config_file, experiment, capsys):
    assert run("--config", config_file, "--sweep", "depth", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "0-depth=1\n  part.depth: 2 -> 1\n1-depth=2-name=a_b_c\n  name: 'x' -> 'a/b c'\n2-depth=13\n" in out


def test_one_member_of_a_sweep(tmp_path, config_file, experiment):
    where = ("--config", config_file, "--workdir", tmp_path, "--sweep", "depth", "--config.seed=3")
    assert run(*where, "--sweep_index", "2") == 0
    assert json.loads((tmp_path / "2-depth=13" / "results.json").read_text()) == {"depth": 13}
    assert json.loads((tmp_path / "2-depth=13" / "config.json").read_text())["seed"] == 3


def fake_processes(monkeypatch, tmp_path, fail_index=None):
    """Members in this process instead of new ones; returns the list of indices that ran."""
    ran = []

    def start(command):
        index = int(command[-1])
        ran.append(index)
        return 3 if index == fail_index else launch.main(list(command[2:]))

    monkeypatch.setattr(sweeps, "_run_process", start)
    return ran


def test_a_sweep_survives_a_failed_member_and_skips_finished_ones(
    tmp_path, config_file, experiment, monkeypatch, capsys
):
    ran = fake_processes(monkeypatch, tmp_path, fail_index=1)
    command = ("--config", config_file, "--workdir", tmp_path / "s", "--sweep", "depth")
    assert run(*command) == 1
    assert ran == [0, 1, 2]
    assert "1 of 3 members failed: 1-depth=2-name=a_b_c" in capsys.readouterr().err
    table = (tmp_path / "s" / "sweep.csv").read_text().splitlines()
    assert table[0].startswith("member,status,part.depth") and len(table) == 4
    report = (tmp_path / "s" / "sweep.md").read_text()
    assert (
        "| depth=2, name=a/b c | 0 of 1 |  |" in report and "1 of 3 members failed:\n\n- 1-depth=2-name=a_b_c" in report
    )
    assert (tmp_path / "s" / "plots" / "sweep_depth.png").stat().st_size > 0
    ran = fake_processes(monkeypatch, tmp_path)
    assert run(*command) == 0
    assert ran == [1]


def test_a_sweep_member_is_a_process_of_its_own(tmp_path, config_file):
    """The real thing: the member ends by itself with a config error, and the sweep says so."""
    text = Path(config_file).read_text().replace('"experiment": "sample"', '"experiment": "nothing"')
    Path(config_file).write_text(text + "\ndef sweep_one():\n    yield {'seed': 1}\n")
    command = [sys.executable, "launch.py", "--config", config_file, "--workdir", str(tmp_path / "s"), "--sweep", "one"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    member, summary = done.stderr.splitlines()
    assert "unknown config.experiment 'nothing'" in member and summary == "error: 1 of 1 members failed: 0-seed=1"


def test_differences_name_lacking_fields():
    assert run_config.differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == [("a.c", None, 2)]


def test_a_config_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="has no get_config"):
        run_config.load_config(str(tmp_path / "empty.py"), ROOT)
    (tmp_path / "plain.py").write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()")
    with pytest.raises(ConfigError, match="takes no argument, got 'x'"):
        run_config.load_config(f"{tmp_path / 'plain.py'}:x", ROOT)


def test_configs_are_locked(config_file):
    config, _, _ = run_config.load_config(config_file, ROOT)
    assert isinstance(config, ConfigDict) and config.is_locked
