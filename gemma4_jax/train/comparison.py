"""The comparison of a sweep's members: ``sweep.csv``, ``sweep.md``, plots. Members that differ in seeds are one setting."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_jax.train import plots
from gemma4_jax.train.checkpoints import write_atomically
from gemma4_jax.train.metrics import read_metrics

SEED_FIELDS = ("seed", "data.shuffle_seed")  # members that differ in nothing else are one setting
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of one number over the finished seeds of a setting: its mean, its sample standard deviation (None for one seed), and
    how many."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.deviation is None else f"{self.mean:.4g} ± {self.deviation:.2g}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The members of a sweep that have the same overrides but for their seeds.

    name: those overrides. overrides: likewise. folders: of all members. results: flat, of the finished ones.
    """

    name: str
    overrides: Mapping[str, Any]
    folders: tuple[Path, ...]
    results: tuple[Row, ...]

    @property
    def finished(self) -> int:
        """How many members have results."""
        return len(self.results)

    def numbers(self) -> dict[str, Spread]:
        """Mean and spread of every result that is a number in each finished member."""
        names = dict.fromkeys(name for row in self.results for name in row)
        found = {}
        for name in names:
            values = [row[name] for row in self.results if _is_number(row.get(name))]
            if values:
                found[name] = Spread.of(values)
        return found


def settings(members: Sequence[Any], workdir: Path) -> list[Setting]:
    """The settings of a sweep in order of first appearance, with the results there are in ``workdir``."""
    groups: dict[str, list[Any]] = {}
    for member in members:
        groups.setdefault(json.dumps(_without_seeds(member.overrides), default=list), []).append(member)
    return [_setting(group, workdir) for group in groups.values()]


def _setting(group: Sequence[Any], workdir: Path) -> Setting:
    overrides = _without_seeds(group[0].overrides)
    results = [read_results(workdir / member.folder) for member in group]
    return Setting(
        name=setting_name(overrides),
        overrides=overrides,
        folders=tuple(workdir / member.folder for member in group),
        results=tuple(row for row in results if row is not None),
    )


def setting_name(overrides: Mapping[str, Any]) -> str:
    """Overrides for people: last parts of the fields and their values; ``base`` without any."""
    return ", ".join(f"{field.rpartition('.')[2]}={_cell(value)}" for field, value in overrides.items()) or "base"


def _without_seeds(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in overrides.items() if field not in SEED_FIELDS}


def read_results(folder: Path) -> Row | None:
    """A run's ``results.json`` with lists spread over names that count from 1; None if it has not finished."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    flat = {}
    for name, value in json.loads(path.read_text(encoding="utf-8")).items():
        if isinstance(value, list):
            flat.update({f"{name}_{number}": entry for number, entry in enumerate(value, start=1)})
        else:
            flat[name] = value
    return flat


def write(members: Sequence[Any], workdir: Path) -> None:
    """Compare the members of a sweep.

    ``sweep.csv``: every result of every member. ``sweep.md``: mean and spread of the results that differ, a row a setting,
    and which members failed. ``plots/sweep_NAME.png``: a bar a setting for each of them; ``sweep_loss.png`` and
    ``sweep_acceptance.png``: a line a setting with its spread.

    Args:
      members: with index, overrides and folder.
      workdir: the sweep's folder.
    """
    _write_csv(members, workdir)
    found = settings(members, workdir)
    failed = [member.folder for member in members if read_results(workdir / member.folder) is None]
    write_atomically(workdir / "sweep.md", table(found) + _failures(failed, len(members)))
    names = differing(found)
    for name in names:
        spreads = [setting.numbers().get(name) for setting in found]
        plots.bars(
            workdir / "plots" / f"sweep_{name}.png",
            [setting.name for setting in found],
            [spread and spread.mean for spread in spreads],
            name,
            [spread and spread.deviation for spread in spreads],
        )
    write_plots(found, workdir / "plots")


def _write_csv(members: Sequence[Any], workdir: Path) -> None:
    rows = []
    for member in members:
        results = read_results(workdir / member.folder)
        status = "failed" if results is None else "finished"
        rows.append({"member": member.folder, "status": status, **member.overrides, **(results or {})})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(workdir / "sweep.csv", text.getvalue())


def differing(found: Sequence[Setting]) -> list[str]:
    """Names of the numbers that are not the same in all members."""
    rows = [row for setting in found for row in setting.results]
    names = dict.fromkeys(name for row in rows for name in row)
    return [
        name
        for name in names
        if any(_is_number(row.get(name)) for row in rows) and len({json.dumps(row.get(name)) for row in rows}) > 1
    ]


def table(found: Sequence[Setting], names: Sequence[str] | None = None) -> str:
    """Markdown: a row a setting, mean ± sample standard deviation over its finished seeds.

    Args:
      names: results to show; None: those that differ.
    """
    names = differing(found) if names is None else names
    lines = ["| " + " | ".join(["setting", "seeds", *names]) + " |", "|" + " --- |" * (2 + len(names))]
    for setting in found:
        numbers = setting.numbers()
        seeds, all_seeds = str(setting.finished), len(setting.folders)
        seeds += f" of {all_seeds}" if setting.finished < all_seeds else ""
        cells = [str(numbers[name]) if name in numbers else "" for name in names]
        lines.append("| " + " | ".join([setting.name.replace("|", "\\|"), seeds, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _failures(failed: Sequence[str], total: int) -> str:
    if not failed:
        return ""
    listed = "".join(f"- {folder.replace('|', chr(92) + '|')}\n" for folder in failed)
    return f"\n{len(failed)} of {total} members failed:\n\n{listed}"


def write_plots(found: Sequence[Setting], folder: Path, prefix: str = "sweep_") -> None:
    """``loss.png`` (held-out loss over steps) and ``acceptance.png`` (over draft steps), a line a setting with its spread."""
    plots.bands(
        folder / f"{prefix}loss.png",
        {setting.name: [_loss_curve(path) for path in setting.folders] for setting in found},
        "Held-out next-token loss", "step", "nats a token",
    )  # fmt: skip
    plots.bands(
        folder / f"{prefix}acceptance.png",
        {setting.name: [_acceptance_curve(row) for row in setting.results] for setting in found},
        "Drafts equal to the target's choice, true tokens before them", "draft step", "acceptance",
    )  # fmt: skip


def _loss_curve(folder: Path) -> list[tuple[float, float]]:
    rows = [row for row in read_metrics(folder) if row["kind"] == "eval" and row.get("next_token_loss") is not None]
    return [(row["step"], row["next_token_loss"]) for row in rows]


def _acceptance_curve(results: Row) -> list[tuple[float, float]]:
    prefix = "acceptance_per_step_"
    steps = [name.removeprefix(prefix) for name in results if name.startswith(prefix)]
    return [(int(step), results[prefix + step]) for step in steps if _is_number(results[prefix + step])]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(_cell, value)) if isinstance(value, (list, tuple)) else str(value)
