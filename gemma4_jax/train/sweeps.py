"""Sweeps: the members of a config file's ``sweep_NAME()``, running them one after another, comparing them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.train import comparison, run_config
from gemma4_jax.train.signals import Interrupted

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: its index, what it overrides, its config, and its folder's name ``<index>-<slug>``."""

    index: int
    overrides: dict[str, Any]
    config: ConfigDict
    folder: str


def members(module: types.ModuleType, name: str, config: ConfigDict) -> list[Member]:
    """All members of ``sweep_NAME()``, each on top of ``config``.

    Raises:
      ConfigError: no such sweep (lists those there are), an empty one, or an override that the config refuses.
    """
    found = {key.removeprefix("sweep_"): value for key, value in vars(module).items() if key.startswith("sweep_")}
    if name not in found:
        raise unknown_name("sweep", name, found or ["(this config has none)"])
    result = []
    for index, overrides in enumerate(found[name]()):
        member = config.copy_and_resolve_references().lock()
        for field, value in overrides.items():
            run_config.set_field(member, field, value)
        result.append(Member(index, dict(overrides), member, f"{index}-{_slug(overrides)}"))
    if not result:
        raise ConfigError(f"sweep_{name}() yields no member")
    return result


def _slug(overrides: dict[str, Any]) -> str:
    text = "-".join(f"{field.rpartition('.')[2]}={value}" for field, value in overrides.items()) or "base"
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", text)[:80]


def over_seeds(overrides: Mapping[str, Any], seeds: Iterable[int] = (0, 1, 2)) -> Iterator[dict[str, Any]]:
    """The same setting with several seeds, of weights and of the order of rows: what a ``sweep_NAME()`` yields for it.

    The comparison of a sweep gives their mean and spread as one setting.
    """
    for seed in seeds:
        yield {**overrides, **{field: seed for field in comparison.SEED_FIELDS}}


def describe(members: Sequence[Member], base: ConfigDict) -> str:
    """What each member changes in the base config, one line a field."""
    lines = []
    for member in members:
        lines.append(member.folder)
        changed = run_config.differences(run_config.resolved(base), run_config.resolved(member.config))
        lines += [f"  {field}: {before!r} -> {after!r}" for field, before, after in changed]
    return "\n".join(lines)


def run_all(members: Sequence[Member], workdir: Path, command: Sequence[str]) -> int:
    """Run the members that are not finished, each in a process of its own; then write the comparison.

    Args:
      members: of ``members``.
      workdir: the sweep's folder.
      command: the command line of this sweep; ``--sweep_index I`` is appended.

    Returns:
      0, or 1 when a member failed (the others still ran).
    """
    workdir.mkdir(parents=True, exist_ok=True)
    codes = {}
    for member in members:
        if is_finished(member, workdir):
            print(f"{member.folder}: finished before, skipped", file=sys.stderr)
            continue
        codes[member.index] = _run_process([*command, "--sweep_index", str(member.index)])
        if codes[member.index] in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise Interrupted(codes[member.index] - 128)
    comparison.write(members, workdir)
    failed = [m.folder for m in members if codes.get(m.index)]
    if failed:
        print(f"error: {len(failed)} of {len(members)} members failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_process(command: Sequence[str]) -> int:
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except (Interrupted, KeyboardInterrupt) as stop:
        # Pass it on and wait: the member writes a checkpoint first.
        process.send_signal(stop.signal if isinstance(stop, Interrupted) else signal.SIGINT)
        process.wait()
        raise


def is_finished(member: Member, workdir: Path) -> bool:
    """Whether the member's folder holds results of the same config."""
    folder = workdir / member.folder
    if not (folder / "results.json").is_file():
        return False
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return not run_config.differences(old, run_config.resolved(member.config))
