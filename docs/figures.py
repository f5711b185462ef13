"""Pictures of the architecture and of one speculative round, drawn by code.

    python docs/figures.py          # writes docs/figures/*.svg anew

Numbers in them come from the preset ``gemma4_12b``, so a changed preset changes the picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from gemma4_jax.config import FULL, ModelConfig, get_preset

FOLDER = Path(__file__).parent / "figures"
INK, PAPER = "#1f2937", "#ffffff"
LOCAL, GLOBAL, DRAFT, MEDIA, PLAIN, REFUSED = "#bfdbfe", "#c7d2fe", "#a7f3d0", "#fde68a", "#f3f4f6", "#fecaca"


def _figure(width: float, height: float):
    """Axes of width x height units without frame, a quarter of an inch a unit."""
    figure = Figure(figsize=(width / 4, height / 4), facecolor=PAPER)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def _box(
    axes, x: float, y: float, width: float, height: float, text: str, color: str, *, size: float = 9, style="normal"
):
    """A rounded box with its lower left corner at (x, y), and text in its middle."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.3", facecolor=color, edgecolor=INK, linewidth=0.8
    )
    axes.add_patch(shape)
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=size,
        color=INK,
        linespacing=1.4,
        style=style,
    )


def _arrow(axes, start: tuple[float, float], end: tuple[float, float], *, bend: float = 0.0, dashed: bool = False):
    shape = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=1.0, shrinkA=0, shrinkB=0,
        connectionstyle=f"arc3,rad={bend}", linestyle="--" if dashed else "-",
    )  # fmt: skip
    axes.add_patch(shape)


def _path(axes, points: tuple[tuple[float, float], ...], *, dashed: bool = False):
    """An arrow along straight lines through all points."""
    *way, last = points
    axes.plot(*zip(*way, strict=True), color=INK, linewidth=1.0, linestyle="--" if dashed else "-")
    _arrow(axes, way[-1], last, dashed=dashed)


def _note(axes, x: float, y: float, text: str, *, ha: str = "left", size: float = 8, color: str = INK):
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=color, linespacing=1.4)


def architecture(config: ModelConfig) -> Figure:
    """Inputs without encoders, the repeating group of the decoder, and the drafter that reads its keys and values."""
    axes = _figure(47, 27)
    vision, audio, drafter = config.vision, config.audio, config.drafter
    side = vision.model_patch_size
    inputs = (
        (f"text\ntable {config.vocab_size:,} × {config.hidden_size:,}", PLAIN),
        (f"picture, video frame\n{side}×{side} pixels → Dense → Linear", MEDIA),
        (f"sound at {audio.sampling_rate // 1000} kHz\n{audio.audio_embed_dim} samples → Linear", MEDIA),
    )
    for number, (text, color) in enumerate(inputs):
        x = 1 + 9 * number
        _box(axes, x, 1, 8.2, 3, text, color, size=7.5)
        _arrow(axes, (x + 4.1, 4), (x + 4.1, 5.4))
    _box(axes, 1, 5.5, 26.2, 1.7, "one row of vectors: soft tokens stand in their places among the text", PLAIN)
    run = next(i for i, kind in enumerate(config.layer_types) if kind == FULL)
    groups = config.num_hidden_layers // (run + 1)
    _arrow(axes, (14.1, 7.2), (14.1, 8.6))
    _box(axes, 1, 8.6, 26.2, 9.2, "", "#f9fafb")
    _note(axes, 1.6, 17.1, f"{groups} groups of {run + 1} layers = {config.num_hidden_layers} layers", size=9)
    for number in range(run):
        _box(axes, 1.8 + 3.4 * number, 10.2, 3.0, 5.6, "local", LOCAL)
        _arrow(axes, (4.8 + 3.4 * number, 13), (5.2 + 3.4 * number, 13))
    _box(axes, 1.8 + 3.4 * run, 10.2, 7.6, 5.6, "global", GLOBAL)
    _note(
        axes,
        1.8,
        9.4,
        f"window {config.sliding_window:,}, {config.num_key_value_heads} k/v heads of {config.head_dim}",
        size=7.5,
    )
    _note(
        axes, 26.4, 9.4, f"causal, {config.num_global_key_value_heads} k/v head of {config.global_head_dim}, k = v",
        ha="right", size=7.5,
    )  # fmt: skip
    _arrow(axes, (14.1, 17.8), (14.1, 19.2))
    _box(axes, 1, 19.2, 26.2, 1.7, "final norm → hidden row of every position", PLAIN)
    _arrow(axes, (14.1, 20.9), (14.1, 22.3))
    _box(axes, 1, 22.3, 26.2, 1.7, "the same table → logits, soft cap → next token", PLAIN)
    _note(axes, 14.1, 25.6, f"Decoder, {config.num_parameters() / 1e9:.2f} G parameters", ha="center", size=11)

    _note(
        axes, 36.9, 25.6, f"Drafter, {config.num_parameters(drafter=True) / 1e6:.0f} M parameters", ha="center", size=11
    )
    _box(axes, 31, 1, 11.8, 3, "newest token, embedded\nby the decoder's table", PLAIN, size=8)
    _arrow(axes, (36.9, 4), (36.9, 5.4))
    _box(
        axes, 31, 5.5, 11.8, 2.6, f"pre-projection\n2 × {config.hidden_size:,} → {drafter.hidden_size:,}", DRAFT, size=8
    )
    _arrow(axes, (36.9, 8.1), (36.9, 9.5))
    counts = [drafter.layer_types.count(kind) for kind in dict.fromkeys(drafter.layer_types)]
    kinds = " + ".join(f"{n} {name}" for n, name in zip(counts, ("local", "global"), strict=True))
    _box(
        axes, 31, 9.6, 11.8, 5.2, f"{drafter.num_hidden_layers} layers ({kinds})\nqueries only:\nno keys or values of its own",
        DRAFT, size=8,
    )  # fmt: skip
    _arrow(axes, (36.9, 14.8), (36.9, 16.2))
    _box(axes, 31, 16.3, 11.8, 2.2, "post-projection", DRAFT, size=8)
    _arrow(axes, (36.9, 18.5), (36.9, 19.9))
    _box(axes, 31, 20, 11.8, 2.6, "own table → drafted token", DRAFT, size=8)
    _arrow(axes, (27.2, 12.2), (31, 12.2), dashed=True)
    _note(axes, 28.5, 13.4, "keys,\nvalues", ha="center", size=7.5)
    _path(axes, ((27.2, 20), (30, 20), (30, 6.8), (31, 6.8)), dashed=True)
    _note(axes, 28.6, 21.6, "hidden row", ha="center", size=7.5)
    _path(axes, ((42.8, 17.4), (43.8, 17.4), (43.8, 6.8), (42.8, 6.8)))
    _note(axes, 45.4, 12.2, "next step:\nits own\nstate", ha="center", size=7.5)
    return axes.figure


def speculative_round(steps: int = 4, kept: int = 2) -> Figure:
    """One round: the drafter proposes, one pass of the decoder checks all of it, the longest right beginning stays."""
    axes = _figure(40, 22)
    width, gap, left = 4.4, 0.8, 12.6

    def place(column: int) -> float:
        return left + column * (width + gap)

    _note(axes, 0.8, 20.2, "1  the text so far", size=10)
    _note(axes, 0.8, 15.6, f"2  draft {steps} tokens,\n    one after the other", size=10)
    _note(axes, 0.8, 9.8, "3  check all of them\n    in one pass of the decoder", size=10)
    _note(axes, 0.8, 3.4, "4  keep what is right, and the\n    decoder's own next token", size=10)
    _box(axes, place(0), 19.2, width, 2, "newest", PLAIN)
    _note(axes, place(0) - 0.4, 20.2, "… keys and values", ha="right", size=7.5)
    for j in range(1, steps + 1):
        _box(axes, place(j), 14.6, width, 2, f"draft {j}", DRAFT)
        start = (place(0) + width / 2, 19.2) if j == 1 else (place(j - 1) + width, 15.6)
        _arrow(axes, start, (place(j), 15.6), bend=0.25 if j == 1 else 0.0)
    for j in range(steps + 1):
        name = "newest" if j == 0 else f"draft {j}"
        _box(axes, place(j), 10.0, width, 2, name, PLAIN if j == 0 else DRAFT)
        _arrow(axes, (place(j) + width / 2, 10.0), (place(j) + width / 2, 8.8))
        right = j < kept
        text = (
            f"{'=' if right else '≠'} draft {j + 1}" if j <= kept and j < steps else "next" if j == kept else "unused"
        )
        _box(
            axes,
            place(j),
            6.7,
            width,
            2,
            text,
            LOCAL if j <= kept else PLAIN,
            style="normal" if j <= kept else "italic",
        )
    for j in range(steps + 1):
        if j < kept:
            text, color = f"draft {j + 1}", DRAFT
        elif j == kept:
            text, color = "decoder's", LOCAL
        else:
            text, color = "dropped", REFUSED
        _box(axes, place(j), 2.4, width, 2, text, color, style="italic" if j > kept else "normal")
        if j <= kept:
            _arrow(axes, (place(j) + width / 2, 6.7), (place(j) + width / 2, 4.5))
    _note(
        axes, place(0), 0.9,
        f"{kept + 1} tokens for one pass instead of {kept + 1} passes; the caches go back to what was kept", size=8,
    )  # fmt: skip
    return axes.figure


FIGURES = {
    "architecture.svg": lambda: architecture(get_preset("gemma4_12b")),
    "speculative.svg": speculative_round,
}


def write(folder: Path = FOLDER) -> list[Path]:
    """Draw all pictures into a folder; the same bytes each time with one version of matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text: small files that a search finds words in.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "gemma4_jax", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        for name, draw in FIGURES.items():
            draw().savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAPER)
    return [folder / name for name in FIGURES]


if __name__ == "__main__":
    sys.stdout.write("".join(f"{path}\n" for path in write()))
