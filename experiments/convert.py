"""One form of a checkpoint into another, with a report of what was read and written."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import gemma4_jax as g4
from gemma4_jax.bundle import bundle_weights
from gemma4_jax.train.checkpoints import write_atomically

_BLOCK = 1 << 22


def run(config, workdir: Path) -> dict[str, Any]:
    """Load ``config.convert.source`` and save it in ``config.convert.format``; writes ``checksums.json``.

    Returns:
      Flat numbers: tensors, parameters, bytes of the source's and the result's files, seconds.

    Raises:
      CheckpointError, ConfigError, PromptError: as ``g4.load`` and ``g4.save`` raise them; nothing half-written is left.
    """
    convert = config.convert
    output = Path(convert.output) if convert.output else workdir / "output"
    start = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        bundle = g4.load(
            convert.source,
            drafter=convert.drafter or None,
            dtype=convert.load_dtype or None,
            quantization=convert.quantization or None,
            workers=convert.workers,
            progress=bar.update,
        )
    loaded = time.perf_counter()
    g4.save(bundle, output, format=convert.format, dtype=convert.dtype or None)
    saved = time.perf_counter()
    sums = {str(file.relative_to(output)): _sha256(file) for file in _files(output)}
    write_atomically(workdir / "checksums.json", json.dumps(sums, indent=2) + "\n")
    weights = jax.tree.leaves(bundle_weights(bundle))
    sources = [Path(convert.source), *([Path(convert.drafter)] if convert.drafter else [])]
    return {
        "output": str(output),
        "format": convert.format,
        "quantization": bundle.quantization or "none",
        "tensors": len(weights),
        "parameters": sum(leaf.size for leaf in weights),
        "bytes_before": sum(file.stat().st_size for folder in sources for file in _files(folder)),
        "bytes_in_memory": sum(leaf.nbytes for leaf in weights),
        "bytes_after": sum(file.stat().st_size for file in _files(output)),
        "files": len(sums),
        "read_seconds": loaded - start,
        "write_seconds": saved - loaded,
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
