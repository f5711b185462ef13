"""A run on one HTML page without a network: numbers, plots, drafted tokens coloured in the text, what media inputs look like.

Axis letters: P patches of an image, A frames of sound, S samples of a frame.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gemma4_jax.train.checkpoints import write_atomically

SAMPLES = "samples.json"
TILE = 48  # pixels on the page of one patch's side
FRAME = 40  # pixels on the page of one frame of sound
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222; background: #fff }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em } img { max-width: 100% }
table { border-collapse: collapse } td, th { padding: .1em .8em .1em 0; text-align: left; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; text-align: right }
pre.tokens { white-space: pre-wrap; background: #f6f6f6; padding: .8em; border-radius: 4px }
.drafted { background: #bfe5c0 } .own { background: #fde2b8 } .legend span { padding: 0 .5em; margin-right: 1em }
svg { background: #fafafa; margin: .3em .6em .3em 0 }
svg text { font: 9px sans-serif; fill: #d00; stroke: #fff; stroke-width: .2px }
figure { margin: 1em 0 } figcaption { color: #555 }
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt's text and its continuation as (text, drafted) pieces, one a token."""

    prompt: str
    pieces: tuple[tuple[str, bool], ...]


def sample_of(tokenizer, prompt: Sequence[int], tokens: Sequence[int], drafted: Sequence[bool]) -> Sample:
    """One row of a sampler's output."""
    stream = tokenizer.stream()
    pieces = [(stream.push(token), bool(flag)) for token, flag in zip(tokens, drafted, strict=True)]
    pieces.append((stream.flush(), False))
    return Sample(tokenizer.decode(prompt, skip_special=True), tuple(piece for piece in pieces if piece[0]))


def save_samples(workdir: Path, samples: Iterable[Sample]) -> None:
    """``samples.json``, which ``write_report`` reads."""
    write_atomically(workdir / SAMPLES, json.dumps([dataclasses.asdict(sample) for sample in samples]) + "\n")


def load_samples(workdir: Path) -> list[Sample]:
    """Inverse of ``save_samples``; none without the file."""
    path = workdir / SAMPLES
    if not path.is_file():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [Sample(each["prompt"], tuple((text, flag) for text, flag in each["pieces"])) for each in stored]


def write_report(workdir: Path, results: Mapping[str, Any], media: Sequence[tuple[str, Any]] = ()) -> Path:
    """``report.html`` from what the run's folder holds.

    Args:
      workdir: with ``config.json``, ``plots/*.png`` and ``samples.json``, as far as there are any.
      results: final numbers.
      media: captions and rows with media, as ``gemma4_jax.media.Processor.encode`` gives them.

    Returns:
      The page's path.
    """
    parts = [_results(results), *map(_plot, sorted((workdir / "plots").glob("*.png")))]
    samples = load_samples(workdir)
    if samples:
        parts.append(_samples(samples))
    if media:
        parts.append("<h2>Media, as the model reads them</h2>" + "".join(_media(*each) for each in media))
    config = workdir / "config.json"
    if config.is_file():
        text = html.escape(config.read_text(encoding="utf-8"))
        parts.append(f"<h2>Config</h2><details><summary>config.json</summary><pre>{text}</pre></details>")
    title = html.escape(workdir.resolve().name)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_atomically(workdir / "report.html", page)
    return workdir / "report.html"


def _results(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{html.escape(_value(value))}</td></tr>'
        for name, value in results.items()
    )
    return f'<h2>Results</h2><table id="results">{rows}</table>'


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def _plot(path: Path) -> str:
    name = html.escape(path.stem)
    return f'<figure class="plot"><img alt="{name}" src="{_data_url(path.read_bytes())}"></figure>'


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _samples(samples: Sequence[Sample]) -> str:
    legend = (
        '<p class="legend"><span class="drafted">drafted and kept</span><span class="own">the target\'s own</span></p>'
    )
    return "<h2>Samples</h2>" + legend + "".join(map(_sample, samples))


def _sample(sample: Sample) -> str:
    spans = "".join(
        f'<span class="{"drafted" if drafted else "own"}">{html.escape(text)}</span>' for text, drafted in sample.pieces
    )
    share = sum(flag for _, flag in sample.pieces) / max(len(sample.pieces), 1)
    return f'<pre class="tokens">{html.escape(sample.prompt)}{spans}</pre><p>{share:.0%} drafted</p>'


def _media(caption: str, row: Any) -> str:
    pictures = [_patches(patches, xy) for patches, xy in _images(row.patches, row.patch_positions)]
    sounds = [_frames(row.audio_frames)] if len(row.audio_frames) else []
    return f"<figure>{''.join(pictures + sounds)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _images(patches: np.ndarray, positions: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The images of a row: each begins with the patch at (0, 0)."""
    starts = np.flatnonzero((positions == 0).all(axis=-1))
    return [
        (patches[start:end], positions[start:end])
        for start, end in zip(starts, [*starts[1:], len(patches)], strict=True)
    ]


def _patches(patches: np.ndarray, positions: np.ndarray) -> str:
    """The image put together from its patches, each framed and marked with its position (x, y)."""
    side = round((patches.shape[1] / 3) ** 0.5)
    columns, rows = positions.max(axis=0) + 1
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    marks = []
    for patch, (x, y) in zip(patches, positions, strict=True):
        pixels = np.rint(np.clip(patch, 0, 1) * 255).astype(np.uint8).reshape(side, side, 3)
        canvas[y * side : (y + 1) * side, x * side : (x + 1) * side] = pixels
        marks.append(
            f'<rect x="{x * TILE}" y="{y * TILE}" width="{TILE}" height="{TILE}" fill="none" stroke="#d00" stroke-width=".5"/>'
            f'<text x="{x * TILE + 2}" y="{y * TILE + 9}">{x},{y}</text>'
        )
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG")
    width, height = columns * TILE, rows * TILE
    return (
        f'<svg class="patches" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<image href="{_data_url(file.getvalue())}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f"{''.join(marks)}</svg>"
    )


def _frames(frames: np.ndarray, height: int = 120) -> str:
    """The waveform, a line at the border of each frame (one soft token each)."""
    count, samples = frames.shape
    shown = frames[:, :: max(1, samples // FRAME)].reshape(-1)
    width = count * FRAME
    xs = np.arange(len(shown)) * width / len(shown)
    ys = height / 2 * (1 - np.clip(shown, -1, 1))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    borders = "".join(
        f'<line x1="{i * FRAME}" x2="{i * FRAME}" y1="0" y2="{height}" stroke="#d00" stroke-width=".5"/>'
        f'<text x="{i * FRAME + 2}" y="9">{i}</text>'
        for i in range(count)
    )
    return (
        f'<svg class="frames" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<polyline points="{points}" fill="none" stroke="#226" stroke-width=".7"/>{borders}</svg>'
    )
