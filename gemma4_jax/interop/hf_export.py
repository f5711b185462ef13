"""Weights to a Hugging Face folder: shards with an index, configurations, tokenizer, a model card to fill in; the folder
appears only when complete.

Names come from the table that import reads (``interop.names``), so import, export, import gives the same bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import CheckpointError, ConfigError
from gemma4_jax.interop import hf_config, names
from gemma4_jax.interop.hf_import import INDEX, SINGLE
from gemma4_jax.interop.model_card import CARD, model_card
from gemma4_jax.interop.safetensors_io import write_file

DRAFTER_FOLDER = "drafter"
SHARD_BYTES = 5_000_000_000


def save_folder(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Any],
    *,
    files: Mapping[str, str] | None = None,
    dtype: str | None = None,
    spelling: str = "per_layer_config",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write a folder that ``transformers`` loads; a drafter goes into its subfolder ``drafter``.

    Args:
      path: absent, or an empty folder.
      config: of target and drafter; media parts as it has them.
      weights: by our flat names, ``model/…`` and ``drafter/…``.
      files: plain text files to add (tokenizer, chat template, processor configuration), by name.
      dtype: of the stored weights; None: as they are.
      spelling: of global layers' sizes, see ``hf_config.published_config``.
      shard_bytes: most bytes of tensors in a file.

    Returns:
      Numbers for a report: tensors, bytes, files.

    Raises:
      CheckpointError: the folder is not empty, or the disk refuses; nothing is left behind.
      ConfigError: a setting that the published form cannot express.
    """
    dtypes = {dtype} if dtype else {np.dtype(leaf.dtype).name for name, leaf in weights.items() if _is_float(leaf)}
    if len(dtypes) != 1:
        raise ConfigError(f"weights have dtypes {', '.join(sorted(dtypes))}; give dtype= to store them in one")
    stored = dtypes.pop()
    texts = {CARD: model_card(config, stored, name=Path(path).name), **(files or {})}
    texts["config.json"] = _json(hf_config.published_config(config, spelling) | {"dtype": stored})
    texts["generation_config.json"] = _json(hf_config.published_generation_config(config))
    drafter_texts = {}
    if config.drafter:
        values = hf_config.published_drafter_config(config, spelling) | {"dtype": stored}
        drafter_texts = {
            CARD: model_card(config, stored, name=f"{Path(path).name}: drafter", form="drafter"),
            "config.json": _json(values),
            "generation_config.json": texts["generation_config.json"],
        }
    with new_folder(path) as folder:
        parts = [(folder, names.target_rows(config, names.LAYOUTS["gemma4_unified"]), texts)]
        if config.drafter:
            parts.append((folder / DRAFTER_FOLDER, names.drafter_rows(config), drafter_texts))
        report = {"tensors": 0, "bytes": 0, "files": 0}
        for place, rows, part_texts in parts:
            place.mkdir(exist_ok=True)
            written = _write_weights(place, rows, weights, stored, shard_bytes)
            _write_texts(place, part_texts)
            report = {key: report[key] + written[key] for key in report}
    return report


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises:
      CheckpointError: ``path`` holds something, or the disk refuses.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is not empty; nothing is overwritten")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _clear_leftovers(path)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Remove the temporary folders of processes that were killed while they wrote ``path``."""
    for folder in path.parent.glob(f".{path.name}.*.tmp"):
        process = folder.name.split(".")[-2]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_weights(folder, rows: Sequence[names.Row], weights, dtype: str, shard_bytes: int) -> dict[str, int]:
    """Cut the rows into files of at most ``shard_bytes`` and write them one tensor at a time."""
    by_name = {row.published: row for row in rows}
    shapes = {row.published: _shape(row, weights[row.ours], dtype) for row in rows}
    shards: list[list[str]] = [[]]
    size = 0
    for name, (kind, shape) in shapes.items():
        nbytes = math.prod(shape) * kind.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    total = sum(math.prod(shape) * kind.itemsize for kind, shape in shapes.values())
    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, members in zip(files, shards, strict=True):
        part = {name: shapes[name] for name in members}
        write_file(folder / file, part, lambda name: _tensor(by_name[name], weights, shapes[name][0]))
    if len(files) > 1:
        weight_map = {name: file for file, members in zip(files, shards, strict=True) for name in members}
        _write_texts(folder, {INDEX: _json({"metadata": {"total_size": total}, "weight_map": weight_map})})
    return {"tensors": len(shapes), "bytes": total, "files": len(files)}


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shape(row: names.Row, leaf, dtype: str) -> tuple[np.dtype, tuple[int, ...]]:
    kind = np.dtype(dtype) if _is_float(leaf) else np.dtype(np.int64)
    return kind, tuple(leaf.shape[len(row.index) :])


def _tensor(row: names.Row, weights, dtype: np.dtype) -> np.ndarray:
    leaf = weights[row.ours]
    return np.asarray(leaf[row.index]).astype(dtype, copy=False)


def _is_float(leaf) -> bool:
    return not np.issubdtype(leaf.dtype, np.integer)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
