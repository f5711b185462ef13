"""Documents tokenised once: ids and offsets in files of the work folder, memory-mapped when read.

A store is a folder named by a hash of the documents and of everything that decides their ids. It is written under
another name and renamed when complete, so a folder of the right name is whole, whichever process made it or died in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma4_jax.data.examples import Encoder, Example
from gemma4_jax.data.sources import Source
from gemma4_jax.errors import DataError

FORMAT_VERSION = 1
_BATCH_BYTES = 1 << 22  # text that is tokenised at once
_BATCH_DOCUMENTS = 4096
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Token ids of all documents of a source, one after the other.

    Attributes:
      path: the folder.
      tokens: (N,) uint16 or uint32, memory-mapped.
      offsets: int64 (D+1,): document d is ``tokens[offsets[d]:offsets[d + 1]]``.
      learnt: uint8 (N,), 1 where a token is learnt, memory-mapped; None if all but each first one are.
      summary: documents, tokens, bytes (of text), empty_documents, source.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    learnt: np.ndarray | None
    summary: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """A store that is on disk."""
        summary = json.loads((path / "summary.json").read_text())
        tokens = np.memmap(path / "tokens.bin", summary["dtype"], mode="r")
        learnt = np.memmap(path / "learnt.bin", np.uint8, mode="r") if summary["masks"] else None
        return cls(path, tokens, np.load(path / "offsets.npy"), learnt, summary)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore.open, (self.path,)  # a worker process maps the files itself

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenise(source: Source, encoder: Encoder, vocab_size: int, folder: Path) -> TokenStore:
    """The token store of a source, made if it is not there yet.

    Args:
      source: documents.
      encoder: makes examples of them.
      vocab_size: decides the width of a stored id.
      folder: where stores lie; made if need be.

    Raises:
      DataError: a bad document (named by its place), or documents without any text.
    """
    key = hashlib.sha256(f"{FORMAT_VERSION} {source.fingerprint()} {encoder.fingerprint()}".encode()).hexdigest()[:16]
    path = folder / f"tokens-{key}"
    if not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with_new_folder(path, lambda new: _write_store(source, encoder, vocab_size, new))
    return TokenStore.open(path)


def with_new_folder(path: Path, write: Any) -> None:
    """Calls ``write(folder)`` on a scratch folder beside ``path`` and then gives it that name.

    If another process finishes first, its folder stays. Scratch folders of dead processes of this machine are removed.
    """
    _remove_orphans(path.parent)
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        write(scratch)
        try:
            os.replace(scratch, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_orphans(folder: Path) -> None:
    for scratch in folder.glob(f".*.{socket.gethostname()}.*"):
        process = scratch.name.rpartition(".")[2]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(scratch, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_store(source: Source, encoder: Encoder, vocab_size: int, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    size = empty = 0
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "learnt.bin", "wb") as learnt:
        for example in _examples(source, encoder):
            tokens.write(np.asarray(example.ids, dtype).tobytes())
            if encoder.masks:
                learnt.write(np.asarray(example.learnt, np.uint8).tobytes())
            lengths.append(len(example.ids))
            size += example.bytes
            empty += not example.bytes
        for file in (tokens, learnt):
            file.flush()
            os.fsync(file.fileno())
    if not size:
        raise DataError(f"{source.name}: empty corpus: {len(lengths)} documents with 0 bytes of text")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    summary = {
        "source": source.name, "documents": len(lengths), "tokens": sum(lengths), "bytes": size,
        "empty_documents": empty, "dtype": dtype.name, "masks": encoder.masks,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _log.info("tokenised %s: %d documents, %d bytes, %d tokens", source.name, len(lengths), size, sum(lengths))


def _examples(source: Source, encoder: Encoder) -> Iterator[Example]:
    documents: list[dict[str, Any]] = []
    places: list[str] = []
    size = 0
    for index in range(len(source)):
        document = source[index]
        documents.append(document)
        places.append(source.place(index))
        size += sum(len(value) for value in document.values() if isinstance(value, str))
        if size >= _BATCH_BYTES or len(documents) >= _BATCH_DOCUMENTS:
            yield from encoder(documents, places)
            documents, places, size = [], [], 0
    if documents:
        yield from encoder(documents, places)
