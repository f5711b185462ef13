"""The tables and plots of docs/mtp_ablation.md, from the folder of the sweep ``first_result`` (configs/ablation.py).

    python -m experiments.ablation_report runs/ablation docs/mtp_ablation.md

Text between ``<!-- table NAME -->`` and ``<!-- end -->`` in the page is replaced; everything else in it is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import DataError
from gemma4_jax.train import comparison, plots, run_config, sweeps
from gemma4_jax.train.checkpoints import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CONFIG, SWEEP = "configs/ablation.py:mini", "first_result"
# Each table: the fields whose settings it shows, beside the base.
TABLES = {
    "draft_steps": ("loss.mtp_steps",),
    "weight": ("loss.mtp_weight",),
    "training": ("loss.mtp_distill", "loss.mtp_stop_gradient", "loss.mtp_teacher_forcing", "loss.mtp_pairing"),
    "drafter": ("model_overrides.drafter.num_hidden_layers",),
}
COLUMNS = {
    "val_loss": "next-token loss",
    "val_bits_per_byte": "bits per byte",
    "acceptance_per_step_1": "step 1",
    "acceptance_per_step_2": "step 2",
    "acceptance_per_step_3": "step 3",
    "mean_accepted": "tokens a round, teacher-forced",
    "tokens_per_round_sampled": "tokens a round, sampled",
    "tokens_per_round_greedy": "tokens a round, greedy",
    "speedup": "speed-up",
    "tokens_per_second": "training tokens/s",
}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_settings(folder: Path) -> list[comparison.Setting]:
    """The sweep's settings with what is finished in ``folder``. Raises DataError when nothing is."""
    config, module, _ = run_config.load_config(CONFIG, ROOT)
    found = comparison.settings(sweeps.members(module, SWEEP, config), folder)
    if not any(setting.finished for setting in found):
        raise DataError(f"{folder} holds no finished member of the sweep {SWEEP}")
    return found


def of_table(found: list[comparison.Setting], name: str) -> list[comparison.Setting]:
    """The finished settings of a table, the base first. Raises ConfigError for an unknown table."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    fields = set(TABLES[name])
    return [setting for setting in found if setting.finished and set(setting.overrides) <= fields]


def table(found: list[comparison.Setting], name: str) -> str:
    """Markdown: mean ± sample standard deviation over seeds."""
    text = comparison.table(of_table(found, name), list(COLUMNS))
    head, rest = text.split("\n", 1)
    return "| " + " | ".join(["setting", "seeds", *COLUMNS.values()]) + " |\n" + rest if head else text


def update_page(page: Path, found: list[comparison.Setting]) -> None:
    """Write the tables into the page, and the plots of each beside it: ``figures/PAGE/TABLE_….png``.

    The block ``speedup`` is the plot of that name alone, over all settings.
    """
    figures = page.parent / "figures" / page.stem

    def images(name: str, *files: str) -> str:
        return "".join(
            f"![{name.replace('_', ' ')}]({figures.relative_to(page.parent)}/{file})\n"
            for file in files
            if (figures / file).is_file()
        )

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name == "speedup":
            _plot_speedup(figures / "speedup.png", found)
            return f"{match[1]}\n{images('speed-up', 'speedup.png')}\n{match[3]}"
        comparison.write_plots(of_table(found, name), figures, prefix=f"{name}_")
        return f"{match[1]}\n{table(found, name)}\n{images(name, f'{name}_loss.png', f'{name}_acceptance.png')}\n{match[3]}"

    write_atomically(page, BLOCK.sub(block, page.read_text(encoding="utf-8")))


def _plot_speedup(path: Path, found: list[comparison.Setting]) -> None:
    finished = [setting for setting in found if setting.finished]
    speed = [setting.numbers().get("speedup") for setting in finished]
    plots.bars(
        path, [setting.name for setting in finished], [s and s.mean for s in speed],
        "speed of speculative against plain decoding", [s and s.deviation for s in speed],
    )  # fmt: skip


if __name__ == "__main__":
    update_page(Path(sys.argv[2]), read_settings(Path(sys.argv[1])))
