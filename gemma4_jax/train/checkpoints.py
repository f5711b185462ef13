"""Checkpoints. This is the only module that touches Orbax.

A checkpoint is a folder with Orbax items beside plain files::

    params/         all weights, a nested dict of arrays: {"model": {…}, "drafter": {…}}
    average/        moving average of the trained weights in f32 (only of runs that keep one)
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
import threading
from collections.abc import Callable, Mapping
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
AVERAGE = "average"
HIGHER_IS_BETTER = ("acceptance", "mean_accepted")  # beginnings of metrics; of all others the lowest value is the best
_READ_ERRORS = (OSError, KeyError, ValueError)  # what Orbax and tensorstore raise for damaged files
_WRITE_ERRORS = (OSError, ValueError)  # and for files that cannot be written


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class StorageError(CheckpointError):
    """The disk refused to take a checkpoint."""


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
    _Saving(path, items, files, metadata).result()


class _Saving:
    """A checkpoint on its way to disk. Arrays are on the host when the constructor returns; a thread writes them.

    The arguments are those of ``save``; ``after`` is called in the thread when the manifest is written.
    """

    def __init__(self, path, items, files, metadata, after: Callable[[], None] = lambda: None):
        self._path = Path(path).absolute()
        self._files, self._metadata, self._after = dict(files or {}), dict(metadata or {}), after
        self._error: BaseException | None = None
        if (self._path / MANIFEST).exists():
            raise CheckpointError(f"{self._path} already holds a checkpoint; nothing is overwritten")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._response = ocp.save_checkpointables_async(self._path, dict(items), overwrite=True)
        except _WRITE_ERRORS as error:
            raise _refused(self._path, error) from error
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint {self._path.name}")
        self._thread.start()

    def _finish(self) -> None:
        try:
            self._response.result()
            if jax.process_index() == 0:
                for name, text in self._files.items():
                    write_atomically(self._path / name, text)
                manifest = {"files": _sizes(self._path), "metadata": self._metadata}
                write_atomically(self._path / MANIFEST, json.dumps(manifest, indent=1))
                self._after()
        except _WRITE_ERRORS as error:
            self._error = error

    def result(self) -> None:
        """Waits for the end. Raises CheckpointError when the disk refused."""
        self._thread.join()
        if self._error is not None:
            raise _refused(self._path, self._error) from self._error


def _refused(path: Path, error: BaseException) -> StorageError:
    return StorageError(f"cannot write checkpoint {path}: {_first_line(error)}; older ones are untouched")


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


def load_params(path: str | Path, target: Mapping[str, Any] | None = None, *, average: bool = True) -> dict[str, Any]:
    """Weights alone, as a nested dict.

    Args:
      path: a checkpoint or a run's folder (its newest complete checkpoint).
      target: nested dict of ``jax.ShapeDtypeStruct`` (with shardings) that the weights must equal in names, shapes and
        dtypes. None: whatever is stored, on the first device.
      average: take the moving average of the trained weights, in their own dtypes, where the run kept one.

    Raises:
      CheckpointError: no checkpoint, damaged files, or a difference, naming the first leaf.
    """
    path = newest(path)
    read_manifest(path)
    if target is None:
        target = trees.unflatten(describe(path))
    found = restore(path, {PARAMS: target})[PARAMS]
    return _averaged(path, found) if average and (path / AVERAGE).is_dir() else found


def _averaged(path: Path, params: dict[str, Any]) -> dict[str, Any]:
    flat = trees.flatten(params)
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=flat[name].sharding)
        for name, leaf in describe(path, AVERAGE).items()
    }
    means = trees.flatten(restore(path, {AVERAGE: trees.unflatten(targets)})[AVERAGE])
    for name in targets:
        flat[name] = means.pop(name).astype(flat[name].dtype)
    return trees.unflatten(flat)


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
    """The numbered checkpoints of one run: ``directory/00000100`` ….

    Args:
      directory: of the run's checkpoints.
      keep: the newest so many stay.
      best: name of a number in a checkpoint's metadata under ``evaluation``; the checkpoint with the best one stays too.
    """

    def __init__(self, directory: str | Path, keep: int = 2, best: str = ""):
        self.directory = Path(directory).absolute()
        self.keep, self._best = keep, best
        self._saving: _Saving | None = None

    def save(self, step: int, items: Mapping[str, Any], *, files: Mapping[str, str] | None = None,
             metadata: Mapping[str, Any] | None = None) -> Path:  # fmt: skip
        """Begin to write the checkpoint of a step; old ones are deleted when it is whole.

        Returns when the arrays are copied, so that they may be changed or donated. At most one checkpoint is on its way:
        the one before is waited for.

        Raises:
          CheckpointError: this one or the one before cannot be written.
        """
        self.wait()
        path = self.directory / step_name(step)
        self._saving = _Saving(path, items, files, {"step": step, **(metadata or {})}, self._delete_old)
        return path

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises CheckpointError when it cannot be written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """``wait`` for the end of a run that fails anyway: a refusal is logged."""
        try:
            self.wait()
        except CheckpointError as error:
            log.error("%s", error)

    def best(self) -> int | None:
        """The step of the best checkpoint by ``best``, the newest of equal ones; None without any."""
        values = {}
        for step in list_steps(self.directory):
            text = (self.directory / step_name(step) / MANIFEST).read_text(encoding="utf-8")
            value = json.loads(text)["metadata"].get("evaluation", {}).get(self._best)
            if value is not None:
                values[step] = value if self._best.startswith(HIGHER_IS_BETTER) else -value
        return max(values, key=lambda step: (values[step], step), default=None)

    def _delete_old(self) -> None:
        steps = list_steps(self.directory)
        kept = {*steps[-self.keep :], self.best() if self._best else None}
        for old in steps:
            if old not in kept:
                self._delete(self.directory / step_name(old))

    def restore_newest(self, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Restore the newest checkpoint that can be read; damaged ones are skipped with a warning.

        Returns:
          (items, metadata), or None when the folder holds no checkpoint at all.

        Raises:
          CheckpointError: a readable checkpoint holds another tree, or every checkpoint is damaged.
        """
        self.wait()
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
        self.wait()
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
