"""Checkpoints. This is the only module that touches Orbax.

A checkpoint is a folder with Orbax items beside plain files::

    params/         all weights, a nested dict of arrays: {"model": {…}, "drafter": {…}}
    train/          optimiser state, step, random key (training checkpoints only)
    data/           the Grain iterator, one JSON file a process (training checkpoints only)
    config.json …   whatever plain files the caller adds (model configuration, tokenizer)
    manifest.json   written last: sizes of all files and the caller's metadata

A folder without a manifest, or with a file whose size differs from it, is half-written. Orbax casts dtypes without a
word and fills what it was not asked for, so names, shapes and dtypes are compared before anything is read.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gemma4_jax.errors import CheckpointError
from gemma4_jax.train import trees

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARAMS = "params"
_READ_ERRORS = (OSError, KeyError, ValueError)  # what Orbax and tensorstore raise for damaged files


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save(path: str | Path, items: Mapping[str, Any], *, files: Mapping[str, str] | None = None,
         metadata: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Write one checkpoint folder; call it on every process.

    Args:
      path: the folder; a half-written one of that name is replaced, a complete one is an error.
      items: Orbax checkpointables by name: pytrees of arrays, Grain iterators.
      files: plain text files to put beside them, by file name.
      metadata: JSON-ready, kept in the manifest.

    Raises:
      CheckpointError: the folder already holds a complete checkpoint, or the disk refused to write.
    """
    path = Path(path).absolute()
    if (path / MANIFEST).exists():
        raise CheckpointError(f"{path} already holds a checkpoint; nothing is overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ocp.save_checkpointables(path, dict(items), overwrite=True)
        if jax.process_index() == 0:
            for name, text in (files or {}).items():
                write_atomically(path / name, text)
            manifest = {"files": _sizes(path), "metadata": dict(metadata or {})}
            write_atomically(path / MANIFEST, json.dumps(manifest, indent=1))
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error}") from error


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Metadata of a complete checkpoint, after checking that every file is there in its full size.

    Raises:
      CheckpointError: no manifest (not a checkpoint, or half-written), a missing or a truncated file.
    """
    path = Path(path).absolute()
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: no readable {MANIFEST}") from error
    sizes = _sizes(path)
    for name, size in manifest["files"].items():
        if sizes.get(name) != size:
            found = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
            raise CheckpointError(f"checkpoint {path} is damaged: {name} {found}")
    return manifest["metadata"]


def newest(path: str | Path) -> Path:
    """The checkpoint folder meant by ``path``: itself, or the newest complete one of a run's folder.

    Raises:
      CheckpointError: there is none.
    """
    path = Path(path).absolute()
    if (path / MANIFEST).exists():
        return path
    for directory in (path / "checkpoints", path):
        for step in reversed(list_steps(directory)):
            folder = directory / step_name(step)
            if _usable(folder):
                return folder
    raise CheckpointError(f"{path} holds no checkpoint (no {MANIFEST}, no complete checkpoints/STEP)")


def describe(path: str | Path, item: str = PARAMS) -> dict[str, jax.ShapeDtypeStruct]:
    """Names (flat, ``a/b/c``), shapes and dtypes of an item, read without its arrays."""
    path = Path(path).absolute()
    try:
        found = ocp.metadata(path, checkpointable_name=item).metadata
    except _READ_ERRORS as error:
        raise CheckpointError(f"checkpoint {path} is damaged: cannot read {item!r} ({_first_line(error)})") from error
    if found is None:  # Orbax logs what it could not decode and returns nothing
        raise CheckpointError(f"checkpoint {path} is damaged: cannot read the names of {item!r}")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in trees.flatten(found).items()}


def load_params(path: str | Path, target: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Weights alone, as a nested dict.

    Args:
      path: a checkpoint or a run's folder (its newest complete checkpoint).
      target: nested dict of ``jax.ShapeDtypeStruct`` (with shardings) that the weights must equal in names, shapes and
        dtypes. None: whatever is stored, on the first device.

    Raises:
      CheckpointError: no checkpoint, damaged files, or a difference, naming the first leaf.
    """
    path = newest(path)
    read_manifest(path)
    if target is None:
        target = trees.unflatten(describe(path))
    return restore(path, {PARAMS: target})[PARAMS]


def restore(path: str | Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read items of a checkpoint into the given shapes, dtypes and shardings; no casting.

    Args:
      path: a complete checkpoint folder.
      targets: by item name, a nested dict of ``jax.ShapeDtypeStruct``, or a Grain iterator, which is set in place.

    Raises:
      CheckpointError: damaged files, or a tree that differs from its target, naming the leaf and both values.
    """
    path = Path(path).absolute()
    wanted = {}
    for item, target in targets.items():
        if isinstance(target, Mapping):
            flat = trees.flatten(target)
            compare(describe(path, item), flat, where=f"{path.name}/{item}")
            target = trees.unflatten({name: _with_sharding(leaf) for name, leaf in flat.items()})
        wanted[item] = target
    try:
        return ocp.load_checkpointables(path, wanted)
    except _READ_ERRORS as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {_first_line(error)}") from error


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for the first leaf that is missing, extra, or of another shape or dtype."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        raise MismatchError(f"{where} lacks {missing[0]} ({len(missing)} missing, {len(extra)} unexpected)")
    if extra:
        raise MismatchError(f"{where} has unexpected {extra[0]} ({len(extra)} unexpected, none missing)")
    for name, leaf in wanted.items():
        for what, have, want in (
            ("shape", tuple(found[name].shape), tuple(leaf.shape)),
            ("dtype", np.dtype(found[name].dtype).name, np.dtype(leaf.dtype).name),
        ):
            if have != want:
                raise MismatchError(f"{where}: {name} has {what} {have} there but {want} is needed")


class MismatchError(CheckpointError):
    """A sound checkpoint that holds something else than what was asked for."""


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"{step:08d}"


def list_steps(directory: str | Path) -> list[int]:
    """Steps that have a folder with a manifest, ascending."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / MANIFEST).exists())


class Checkpoints:
    """The numbered checkpoints of one run: ``directory/00000100`` …; the newest ``keep`` stay."""

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory = Path(directory).absolute()
        self.keep = keep

    def save(self, step: int, items: Mapping[str, Any], *, files: Mapping[str, str] | None = None,
             metadata: Mapping[str, Any] | None = None) -> Path:  # fmt: skip
        """Write the checkpoint of a step, then delete old ones. Raises CheckpointError when it cannot be written."""
        path = self.directory / step_name(step)
        save(path, items, files=files, metadata={"step": step, **(metadata or {})})
        if jax.process_index() == 0:
            for old in list_steps(self.directory)[: -self.keep]:
                self._delete(self.directory / step_name(old))
        return path

    def restore_newest(self, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Restore the newest checkpoint that can be read; damaged ones are skipped with a warning.

        Returns:
          (items, metadata), or None when the folder holds no checkpoint at all.

        Raises:
          CheckpointError: a readable checkpoint holds another tree, or every checkpoint is damaged.
        """
        steps = list_steps(self.directory)
        last_error: CheckpointError | None = None
        for step in reversed(steps):
            path = self.directory / step_name(step)
            try:
                metadata = read_manifest(path)
                return restore(path, targets), metadata
            except MismatchError:
                raise
            except CheckpointError as error:
                log.warning("skipping a checkpoint: %s", error)
                last_error = error
        if last_error is not None:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read; the oldest: {last_error}")
        return None

    def clean(self) -> None:
        """Remove what a killed process left: half-written folders and Orbax's temporary ones."""
        if jax.process_index() != 0 or not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if path.is_dir() and not (path / MANIFEST).exists():
                log.warning("removing a half-written checkpoint: %s", path)
                shutil.rmtree(path)

    def _delete(self, path: Path) -> None:
        # Without its manifest a folder no longer counts, so that a kill in the middle leaves nothing that looks whole.
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def _usable(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError as error:
        log.warning("skipping a checkpoint: %s", error)
        return False
    return True


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sizes(path: Path) -> dict[str, int]:
    """Size by relative name of every file of a checkpoint but the manifest."""
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(files) if p.name != MANIFEST}


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom: Orbax wraps it in messages about its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().strip("'\"")
    return (text.splitlines() or [type(error).__name__])[0][:200]
