"""Weights from a Hugging Face folder: checked as a whole before the first tensor is read, then streamed.

Every tensor is mapped a few rows at a time and cast, or quantised, straight into the slice where it belongs: the host holds
the result and, at most, what is being placed. Pickled files are never opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma4_jax.errors import CheckpointError
from gemma4_jax.interop.hf_config import read_json
from gemma4_jax.interop.names import HEAD, Row, canonical
from gemma4_jax.interop.safetensors_io import StoredTensor, read_header
from gemma4_jax.packed import pack_into

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_BLOCK = 1 << 22  # numbers looked at together
_ALIGNMENT = 64  # the backend takes host memory as it is only at such addresses

Place = Callable[[str, np.ndarray], Any]


def list_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's safetensors files by name, read from the headers alone.

    Raises:
      CheckpointError: no such files, a missing or extra shard, an index that names an absent tensor or omits a
        present one, a tensor in two shards, or a malformed header.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return _canonical(read_header(folder / SINGLE)[0])
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return _canonical(read_header(shards[0])[0])
    if shards:
        raise CheckpointError(f"{folder}: {len(shards)} safetensors files but no {INDEX}")
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    hint = f" ({pickled[0]} is pickled and is never opened)" if pickled else ""
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}{hint}")


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is not an object of file names")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: {file!r} is not a plain file name")
        if not path.is_file():
            first = min(name for name, of in weight_map.items() if of == file)
            raise CheckpointError(f"{folder / INDEX}: shard {file} is missing (it should hold {first})")
        for name, tensor in read_header(path)[0].items():
            if name in tensors:
                raise CheckpointError(f"{folder}: tensor {name} is in both {tensors[name].file.name} and {file}")
            if weight_map.get(name) != file:
                where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{folder / INDEX}: tensor {name} is in {file} but the index has it {where}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / INDEX}: tensor {name} is not in {file}, where the index has it")
    return _canonical(tensors)


def _canonical(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if canonical(name) in named:
            raise CheckpointError(f"{tensor.file}: tensor {canonical(name)} appears under two names")
        named[canonical(name)] = tensor
    return named


def load_weights(
    folder: str | Path,
    rows: Iterable[Row],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    packed: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]] | None = None,
    place: Place | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The weights that a name table describes, in our shapes and dtypes.

    Args:
      folder: holds the safetensors files.
      rows: the name table (``names.target_rows`` or ``drafter_rows``).
      shapes: shape and dtype of each of our leaves, by flat name; constants without a published tensor are filled in.
      packed: leaves to quantise: by flat name, the names and shapes of their values and scale (``gemma4_jax.packed``).
      place: puts a finished leaf where it belongs (a device, a mesh); default: the first device.
      workers: threads that read.
      progress: called with the bytes of each tensor when it has been read.

    Returns:
      ``{flat name: placed leaf}``.

    Raises:
      CheckpointError: before anything is read: missing, extra or mis-shaped tensors or a wrong kind of dtype; while
        reading: a weight that is not finite, a head that is not the table, a token ordering that is no permutation.
        One line naming tensor and file.
    """
    tensors = list_tensors(folder)
    rows = list(rows)
    weights = fill_weights(
        folder, tensors, rows, shapes, packed=packed, place=place, workers=workers, progress=progress
    )
    _check_head(tensors, rows)
    return weights


def fill_weights(
    where: str | Path,
    tensors: Mapping[str, Any],
    rows: Iterable[Row],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    packed: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]] | None = None,
    pack: Callable[..., None] | None = None,
    place: Place | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """``load_weights`` from tensors by published name. where: named in errors. pack: instead of ``pack_into_leaf``."""
    place, packed, pack = place or put_on_device, packed or {}, pack or pack_into_leaf
    rows = list(rows)
    check_tensors(where, rows, shapes, tensors)
    leaves: dict[str, list[Row]] = {}
    for row in rows:
        leaves.setdefault(row.ours, []).append(row)

    def jobs() -> Iterator[tuple[dict[str, np.ndarray], Row, bool]]:
        for name, parts in leaves.items():
            stored = packed.get(name, {name: shapes[name]})
            buffers = {own: aligned_empty(leaf.shape, leaf.dtype) for own, leaf in stored.items()}
            for row in parts:
                yield buffers, row, row is parts[-1]

    def fill(job) -> tuple[dict[str, np.ndarray], bool]:
        buffers, row, last = job
        targets = [buffer[row.index] for buffer in buffers.values()]
        read = pack if row.ours in packed else _read_into
        read(*targets, tensors[row.published], row)
        if progress:
            progress(tensors[row.published].nbytes)
        return buffers, last

    weights: dict[str, Any] = {}
    with ThreadPoolExecutor(workers) as pool:
        for buffers, last in _in_order(pool, fill, jobs(), workers):
            if last:
                weights |= {name: place(name, buffers[name]) for name in buffers}
    for name, leaf in shapes.items():
        if name.endswith("/layer_scalar") and name not in weights:  # families without this number multiply by 1
            weights[name] = place(name, np.ones(leaf.shape, leaf.dtype))
    return weights


def _in_order(pool, function, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """``pool.map`` that starts only a few calls ahead and, after an error, no more."""
    waiting = []
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()


def check_tensors(
    folder: str | Path,
    rows: Iterable[Row],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Compare a folder's headers with the name table. Raises CheckpointError for the first difference."""
    rows = list(rows)
    wanted = {row.published: row for row in rows}
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and name != HEAD]
    if missing:
        raise CheckpointError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} missing, {len(extra)} unexpected"
            f"{': ' + extra[0] if extra else ''})"
        )
    if extra:
        raise CheckpointError(f"{tensors[extra[0]].file}: unexpected tensor {extra[0]} ({len(extra)} unexpected)")
    for name, row in wanted.items():
        leaf, tensor = shapes[row.ours], tensors[name]
        shape = leaf.shape[len(row.index) :]
        if tensor.shape != tuple(shape):
            raise CheckpointError(f"{tensor.file}: tensor {name} has shape {tensor.shape} but {tuple(shape)} is needed")
        integer = np.issubdtype(leaf.dtype, np.integer)
        if (tensor.dtype.name in _FLOATS) == integer or tensor.dtype == np.bool_:
            kind = "an integer" if integer else "a floating-point"
            raise CheckpointError(f"{tensor.file}: tensor {name} has dtype {tensor.dtype} but {kind} one is needed")
    table = tensors[rows[0].published]
    if HEAD in tensors and tensors[HEAD].shape != table.shape:
        raise CheckpointError(
            f"{tensors[HEAD].file}: {HEAD} has shape {tensors[HEAD].shape} but is tied to {table.name} {table.shape}"
        )


def _read_into(target: np.ndarray, tensor: StoredTensor, row: Row) -> None:
    if np.issubdtype(target.dtype, np.integer):
        source = tensor.read()
        if not np.array_equal(np.sort(source), np.arange(source.size)):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is not a permutation of 0…{source.size - 1}")
        target[...] = source
        return
    for where, block in _finite_blocks(tensor):
        if row.offset:
            block = block.astype(np.float32) + np.float32(1)
        with np.errstate(over="ignore"):  # looked for below
            target[where] = block
        if not _finite(target[where]):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} overflows {target.dtype}")


def pack_into_leaf(values: np.ndarray, scale: np.ndarray, tensor: StoredTensor, row: Row) -> None:
    """Quantise a tensor into packed buffers (O, …), a few rows at a time."""
    del row  # norms alone have an offset
    for where, block in _finite_blocks(tensor):
        with np.errstate(over="ignore"):  # looked for below
            pack_into(block, values[where], scale[where])
        if not _finite(scale[where]):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} overflows a scale of {scale.dtype}")


def _finite_blocks(tensor: StoredTensor) -> Iterator[tuple[Any, np.ndarray]]:
    for where, block in tensor.blocks(_BLOCK):
        if not _finite(block):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} holds NaN or infinite numbers")
        yield where, block


def _finite(block: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; by exponent bits where the type has two bytes, which is faster."""
    if block.dtype.itemsize != 2:
        return bool(np.isfinite(block).all())
    exponent = np.uint16(0x7C00 if block.dtype == np.float16 else 0x7F80)
    return not bool(((block.view(np.uint16) & exponent) == exponent).any())


def _check_head(tensors: Mapping[str, StoredTensor], rows: list[Row]) -> None:
    """A stored output head must be the table: this model ties them."""
    if HEAD not in tensors:
        return
    head, table = tensors[HEAD], tensors[rows[0].published]
    for (_, a), (_, b) in zip(head.blocks(_BLOCK), table.blocks(_BLOCK), strict=True):
        if not np.array_equal(a, b):
            raise CheckpointError(f"{head.file}: {HEAD} differs from {table.name}, to which it is tied")


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised host memory that the CPU backend can take over without a copy."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def put_on_device(name: str, leaf: np.ndarray) -> jax.Array:
    """A leaf on the first device, whatever its name; on the CPU its memory is taken over."""
    del name
    return jax.device_put(leaf, jax.devices()[0])
