"""Measurements against installed peers, as ratios taken in turns within one run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from gemma4_jax.config import unknown_name
from gemma4_jax.train.plots import bars

MODES = {
    "train": "experiments.benchmarks.train",
    "decode": "experiments.benchmarks.sampling",
    "prefill": "experiments.benchmarks.sampling",
    "speculative": "experiments.benchmarks.sampling",
    "load": "experiments.benchmarks.load",
    "device": "experiments.benchmarks.device",
}


def run(config, workdir: Path) -> dict[str, Any]:
    """Measure one mode; returns flat numbers and writes ``table.md`` and, of speeds, a plot.

    Raises:
      ConfigError: ``config.benchmark.mode`` is none of ``MODES``.
    """
    mode = config.benchmark.mode
    if mode not in MODES:
        raise unknown_name("config.benchmark.mode", mode, MODES)
    module = importlib.import_module(MODES[mode])
    results = module.measure({**config.options.to_dict(), "mode": mode}, config.benchmark.threads)
    (workdir / "table.md").write_text(module.table(results) if mode == "load" else table(results))
    rates = {name: value for name, value in results.items() if name.endswith("tokens_per_second")}
    if rates:
        bars(workdir / "plots" / f"{mode}.png", list(rates), list(rates.values()), "tokens per second")
    return results


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = "".join(f"| {name} | {_number(value)} |\n" for name, value in results.items())
    return f"| quantity | value |\n|---|---|\n{rows}"


def _number(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
