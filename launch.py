"""Run an experiment from a config file: ``python launch.py --config configs/NAME.py[:ARG]``.

    --workdir DIR             results go here (default: runs/<config name>); the same config resumes there
    --config.FIELD=VALUE      set one field, as often as needed
    --sweep NAME              run every member of the config file's sweep_NAME(), or with --sweep_index I one of them
    --resume auto|never|must  continue a run of the same config if there is one / never / or fail
    --dry_run                 print the resolved config and the plan (or a sweep's differences), run nothing
    --debug                   show tracebacks of config and data errors
    --profile                 write a JAX profiler trace to DIR/profile: of a few training steps, of what sample generates,
                              or of one more turn of our sides of a benchmark

Exit codes: 0 done, 2 bad config or argument, 3 bad input data, 1 anything else (a full disk, a loss that is not finite), 143 /
130 stopped by SIGTERM / Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
from pathlib import Path

import experiments
from gemma4_jax.errors import CheckpointError, ConfigError, DataError, MediaError, PromptError
from gemma4_jax.train import distributed, profiling, run_config, sweeps
from gemma4_jax.train.checkpoints import StorageError, list_steps, write_atomically
from gemma4_jax.train.metrics import METRICS
from gemma4_jax.train.signals import Interrupted, raise_on_sigterm

ROOT = Path(__file__).resolve().parent
INPUT_ERRORS = (ConfigError, DataError, CheckpointError, MediaError, PromptError)
RESUME = ("auto", "never", "must")

log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(message)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and the ``--config.FIELD`` overrides in order. Raises ConfigError."""
    parser = _Parser(prog="launch.py", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir")
    parser.add_argument("--sweep")
    parser.add_argument("--sweep_index", type=int)
    parser.add_argument("--resume", default="auto", choices=RESUME)
    for flag in ("--dry_run", "--debug", "--profile"):
        parser.add_argument(flag, action="store_true")
    overrides, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        field, equals, value = argument.removeprefix("--config.").partition("=")
        value = value if equals else next(arguments, None)
        if value is None:
            raise ConfigError(f"--config.{field} needs a value: --config.{field}=VALUE")
        overrides.append((field, value))
    args = parser.parse_args(rest)
    if args.sweep_index is not None and not args.sweep:
        raise ConfigError("--sweep_index needs --sweep NAME")
    return args, overrides


def main(argv: list[str]) -> int:
    """Run; returns the exit code. Config and data errors become one line on stderr unless ``--debug``."""
    debug = "--debug" in argv
    try:
        with raise_on_sigterm():
            return _main(argv)
    except (StorageError, FloatingPointError) as error:
        return _report(error, 1, debug)
    except INPUT_ERRORS as error:
        return _report(error, 2 if isinstance(error, ConfigError) else 3, debug)
    except Interrupted as stop:
        return 128 + stop.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _main(argv: list[str]) -> int:
    args, overrides = parse_arguments(argv)
    config, module, name = run_config.load_config(args.config, ROOT)
    for field, value in overrides:
        run_config.set_field(config, field, value)
    workdir = Path(args.workdir or Path("runs") / name)
    if not args.sweep:
        return run_one(config, workdir, args)
    members = sweeps.members(module, args.sweep, config)
    if args.sweep_index is not None:
        if not 0 <= args.sweep_index < len(members):
            raise ConfigError(f"--sweep_index {args.sweep_index} is not in 0…{len(members) - 1} of sweep {args.sweep}")
        member = members[args.sweep_index]
        return run_one(member.config, workdir / member.folder, args)
    if args.dry_run:
        print(sweeps.describe(members, config))
        return 0
    command = [sys.executable, str(ROOT / "launch.py"), *_without(argv, "--workdir"), "--workdir", str(workdir)]
    return sweeps.run_all(members, workdir, command)


def run_one(config, workdir: Path, args: argparse.Namespace) -> int:
    """Resolve, refuse a folder of another run, run the experiment, write ``results.json``."""
    experiment = experiments.get_experiment(config.experiment)
    text = json.dumps(run_config.resolved(config), indent=2)
    if args.dry_run:
        plan = experiment.plan(config) if "plan" in vars(experiment) else ""
        print("\n".join(filter(None, [text, plan])))
        return 0
    distributed.start(distributed.section(config))
    fresh = not workdir.exists()

    def prepare():
        check_workdir(workdir, run_config.resolved(config), args.resume)
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / "config.json", text + "\n")

    distributed.on_main(prepare)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        with profiling.requested(workdir / "profile" if args.profile else None):
            results = experiment.run(config, workdir)
            if args.profile and not profiling.folder().exists():
                log.warning(
                    "--profile: no trace was written; benchmarks and sample write one, and training from step %d on",
                    profiling.FIRST_STEP + 1,
                )
    except INPUT_ERRORS:
        if fresh and distributed.is_main() and not _has_begun(workdir):
            shutil.rmtree(workdir)  # made by this very call: a refused run leaves nothing half-written
        raise
    if results is not None and distributed.is_main():
        write_atomically(workdir / "results.json", json.dumps(results, indent=2) + "\n")
    return 0


def _has_begun(workdir: Path) -> bool:
    """Whether there is something to keep: steps that were trained and logged, or a checkpoint."""
    metrics = workdir / METRICS
    return bool(list_steps(workdir / "checkpoints")) or (metrics.is_file() and metrics.stat().st_size > 0)


def check_workdir(workdir: Path, config: dict, resume: str) -> None:
    """Raise ConfigError unless ``workdir`` is free, or holds the same config and ``resume`` allows to go on.

    Sections that say where a run is placed (mesh, processes) may differ: it goes on there.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir {workdir} is not a folder")
    occupied = workdir.is_dir() and any(workdir.iterdir())
    if resume == "never" and occupied:
        raise ConfigError(f"--resume=never but {workdir} is not empty; nothing is overwritten")
    if resume == "must" and not list_steps(workdir / "checkpoints"):
        raise ConfigError(f"--resume=must but {workdir} holds no checkpoint")
    if not occupied:
        return
    try:
        old = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{workdir} is not empty and holds no config.json: not a run's folder") from None
    except ValueError:
        raise ConfigError(f"{workdir}/config.json is not JSON: not a run's folder") from None
    changed = [
        difference for difference in run_config.differences(old, config) if not run_config.is_placement(difference[0])
    ]
    if changed:
        listed = ", ".join(f"{field} ({before!r} there, {after!r} now)" for field, before, after in changed)
        raise ConfigError(f"{workdir} holds a run of another config: {listed}; choose another --workdir")


def _without(argv: list[str], flag: str) -> list[str]:
    kept, arguments = [], iter(argv)
    for argument in arguments:
        if argument == flag:
            next(arguments, None)
        elif not argument.startswith(f"{flag}="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
