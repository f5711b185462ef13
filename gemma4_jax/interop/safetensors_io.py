"""The safetensors format: headers checked before any data is trusted, one tensor mapped at a time, written as a stream.

A file is an 8-byte little-endian header length, that many bytes of JSON (``name -> {dtype, shape, data_offsets}``),
and the data. Mapping tensors one by one keeps the resident memory of a 24 GB checkpoint at the size of one tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_jax.errors import CheckpointError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, dtype, shape and first byte."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, mapped read-only; the map goes with the array."""
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        try:
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)
        except (OSError, ValueError) as error:  # the file shrank since its header was read
            raise CheckpointError(f"{self.file}: cannot read tensor {self.name}: {error}") from error

    def blocks(self, numbers: int) -> Iterator[tuple[Any, np.ndarray]]:
        """The tensor in runs of rows of about so many numbers: where each lies (an index), and its values.

        Each run is mapped on its own: pages of one map stay resident until all of it goes.
        """
        if not self.shape:
            yield (), self.read()
            return
        width = math.prod(self.shape[1:])
        step = max(1, numbers // max(1, width))
        for start in range(0, self.shape[0], step):
            shape = (min(step, self.shape[0] - start), *self.shape[1:])
            offset = self.offset + start * width * self.dtype.itemsize
            yield slice(start, start + step), dataclasses.replace(self, shape=shape, offset=offset).read()


def read_header(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, by name, and its metadata.

    Raises:
      CheckpointError: unreadable, truncated or malformed: every range must lie inside the file, fit its shape and
        dtype, and overlap no other; names must be unique.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{path}: header of {length} bytes does not fit a file of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {_first_line(error)}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    _check_overlap(path, tensors)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _unique(pairs):
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return values


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> StoredTensor:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (_whole_numbers(shape) and _whole_numbers(span) and len(span) == 2 and isinstance(dtype, str)):
        raise CheckpointError(f"{path}: tensor {name} has a malformed header entry")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}; choices: {', '.join(DTYPES)}")
    tensor = StoredTensor(path, name, DTYPES[dtype], tuple(shape), start + span[0])
    if tensor.nbytes != span[1] - span[0]:
        raise CheckpointError(
            f"{path}: tensor {name} {dtype}{list(shape)} needs {tensor.nbytes} bytes "
            f"but its range has {span[1] - span[0]}"
        )
    if start + span[1] > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {start + span[1]} but the file has {size} bytes"
        )
    return tensor


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _check_overlap(path: Path, tensors: Mapping[str, StoredTensor]):
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise CheckpointError(f"{path}: tensors {before} and {tensor.name} share bytes")
        if tensor.nbytes:
            end, before = tensor.offset + tensor.nbytes, tensor.name


def write_file(
    path: str | Path,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a file tensor by tensor: only one is in memory at a time.

    Args:
      path: appears under its name only when complete.
      shapes: dtype and shape by name.
      tensors: name -> array of that dtype and shape.
      metadata: free text; ``{"format": "pt"}`` by default, as ``transformers`` wants.

    Returns:
      Bytes written.

    Raises:
      CheckpointError: the disk refuses (read-only, full); nothing is left behind.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, (dtype, shape) in shapes.items():
        end = position + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = (_bytes_of(name, tensors(name), *shapes[name]) for name in shapes)
    write_stream(path, [len(text).to_bytes(8, "little"), text], chunks)
    return 8 + len(text) + position


def _bytes_of(name: str, array: np.ndarray, dtype, shape) -> memoryview:
    if array.dtype != np.dtype(dtype) or array.shape != tuple(shape):
        raise ValueError(f"tensor {name} is {array.dtype}{array.shape}, announced as {np.dtype(dtype)}{tuple(shape)}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_stream(path: Path, *parts: Iterable[Any]) -> None:
    """Write byte chunks under a temporary name, then rename. Raises CheckpointError (nothing is left behind)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                for chunk in part:
                    file.write(chunk)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
