"""PNG plots of a run and of a sweep, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gemma4_jax.train.metrics import read_metrics


def _axes(title: str, xlabel: str, ylabel: str):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return axes


def _save(axes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=120)


def curves(path: Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, ylabel: str) -> None:
    """Draw ``label -> (steps, values)``; lines without points are left out, and without any line no file is written."""
    lines = {label: points for label, points in lines.items() if points[0]}
    if not lines:
        return
    axes = _axes(title, "step", ylabel)
    for label, (steps, values) in lines.items():
        axes.plot(steps, values, label=label, marker="o" if len(steps) < 20 else None, markersize=3)
    axes.legend()
    _save(axes, path)


def bands(
    path: Path, groups: Mapping[str, Sequence[Sequence[tuple[float, float]]]], title: str, xlabel: str, ylabel: str
) -> None:
    """One line a group, the mean of its curves, in a band of their sample standard deviation.

    Args:
      groups: label -> curves, each a list of (x, y); only places that all curves of a group have are drawn. Groups without
        such places are left out, and without any group no file is written.
    """
    drawn = {label: _mean_and_deviation([curve for curve in curves if curve]) for label, curves in groups.items()}
    drawn = {label: points for label, points in drawn.items() if points}
    if not drawn:
        return
    axes = _axes(title, xlabel, ylabel)
    for label, points in drawn.items():
        xs, means, deviations = map(np.asarray, zip(*points, strict=True))
        (line,) = axes.plot(xs, means, label=label, marker="o" if len(xs) < 20 else None, markersize=3)
        axes.fill_between(xs, means - deviations, means + deviations, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.legend(fontsize="small" if len(drawn) < 9 else "x-small")
    _save(axes, path)


def _mean_and_deviation(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float, float]]:
    if not curves:
        return []
    maps = [dict(curve) for curve in curves]
    shared = [x for x in maps[0] if all(x in other for other in maps)]
    columns = {x: [curve[x] for curve in maps] for x in shared}
    return [(x, float(np.mean(ys)), float(np.std(ys, ddof=1)) if len(ys) > 1 else 0.0) for x, ys in columns.items()]


def bars(
    path: Path,
    labels: Sequence[str],
    values: Sequence[float | None],
    title: str,
    deviations: Sequence[float | None] | None = None,
) -> None:
    """One bar a label, with its deviation if given; a missing value is an empty bar."""
    axes = _axes(title, "", title)
    errors = None if deviations is None else [d or 0.0 for d in deviations]
    axes.bar(range(len(labels)), [0.0 if v is None else v for v in values], yerr=errors, capsize=3)
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    _save(axes, path)


def run_plots(workdir: Path) -> None:
    """``plots/loss.png`` and ``plots/acceptance.png`` of one run, from its ``metrics.jsonl``."""
    rows = read_metrics(workdir)
    train, evaluation = _split(rows)
    terms = sorted({key for row in train for key in row if key == "loss" or key.endswith("_loss")})
    lines = {f"train {term}": _series(train, term) for term in terms}
    lines["held-out next_token_loss"] = _series(evaluation, "next_token_loss")
    curves(workdir / "plots" / "loss.png", lines, "Loss", "nats a token")
    steps = sorted({key for row in evaluation for key in row if key.startswith("acceptance_")})
    curves(workdir / "plots" / "acceptance.png", {key: _series(evaluation, key) for key in steps},
           "Drafter: held-out tokens equal to the target's choice", "acceptance")  # fmt: skip


def _split(rows):
    return [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "eval"]


def _series(rows, key):
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
