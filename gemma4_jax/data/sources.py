"""Where documents come from: random-access sources of dicts, and their split into training and held-out parts.

A source is a sequence of documents (dicts with a text or messages) that also knows where each one came from (for error
messages) and has a fingerprint of its contents (for caches).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma4_jax.config import unknown_name
from gemma4_jax.data.options import DataOptions
from gemma4_jax.data.tasks import Digits, Dtmf
from gemma4_jax.data.tfds_source import open_tfds
from gemma4_jax.errors import ConfigError, DataError

SPLITS = ("train", "heldout")
_TABLES = ("encodings", "pydoc_data")  # generated: code pages and help topics, not written text
_NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")


class Source(Protocol):
    """Documents by index."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A document. Raises DataError naming its place if it cannot be read."""

    def place(self, index: int) -> str:
        """Where a document comes from, such as ``file:line``."""

    def fingerprint(self) -> str:
        """A hash of the contents and order of all documents."""


class Files:
    """One document per file."""

    def __init__(self, name: str, paths: Sequence[str], read: Callable[[str], str], field: str = "text"):
        """Args: ``name`` for messages; ``paths``; ``read`` gives the text of one; ``field`` the text's name."""
        self.name = name
        self.paths = list(paths)
        self._read = read
        self._field = field

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self._field: self._read(self.paths[index])}

    def place(self, index: int) -> str:
        """The file."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """Hash of the files' bytes in order; their names do not count."""
        total = hashlib.sha256()
        for path in self.paths:
            total.update(_file_hash(path))
        return total.hexdigest()


class JsonLines:
    """One document per line of JSON; lines of white space are no documents."""

    def __init__(self, name: str, paths: Sequence[str]):
        """Args: ``name`` for messages; ``paths`` of the files, read once here to find the lines."""
        self.name = name
        self.paths = list(paths)
        total = hashlib.sha256()
        file_index, starts, lengths, numbers = [], [], [], []
        for index, path in enumerate(self.paths):
            digest = hashlib.sha256()
            offset = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    if line.strip():
                        file_index.append(index)
                        starts.append(offset)
                        lengths.append(len(line))
                        numbers.append(number)
                    offset += len(line)
            total.update(digest.digest())
        self._file_index = np.asarray(file_index, np.int32)
        self._starts = np.asarray(starts, np.int64)
        self._lengths = np.asarray(lengths, np.int64)
        self._numbers = np.asarray(numbers, np.int64)
        self._fingerprint = total.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.paths[self._file_index[index]], "rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._lengths[index])
        try:
            document = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(index)}: not UTF-8 at byte {error.start} of the line") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{self.place(index)}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(document, dict):
            raise DataError(f"{self.place(index)}: expected a JSON object, got {type(document).__name__}")
        return document

    def place(self, index: int) -> str:
        """``file:line``."""
        return f"{self.paths[self._file_index[index]]}:{self._numbers[index]}"

    def fingerprint(self) -> str:
        """Hash of the files' bytes in order."""
        return self._fingerprint


class Subset:
    """Some documents of a source, in the order given."""

    def __init__(self, source: Source, indices: np.ndarray):
        """Args: ``source``; ``indices`` (n,) into it."""
        self.name = source.name
        self._source = source
        self._indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def place(self, index: int) -> str:
        """As the source says."""
        return self._source.place(int(self._indices[index]))

    def fingerprint(self) -> str:
        """Hash of the source's fingerprint and the indices."""
        return hashlib.sha256(self._source.fingerprint().encode() + self._indices.tobytes()).hexdigest()


class TextPart:
    """The beginning or the end of the only document of a source, cut at a line."""

    def __init__(self, source: Source, field: str, fraction: float, heldout: bool):
        """Args: ``source`` of one document; its text ``field``; the ``fraction`` at the end that is ``heldout``."""
        self.name = source.name
        self._source, self._field, self._fraction, self._heldout = source, field, fraction, heldout

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        document = self._source[0]
        text = text_of(document, self._field, self.place(0))
        cut = len(text) - max(1, int(len(text) * self._fraction))
        line_end = text.find("\n", cut) + 1
        if 0 < line_end < len(text):
            cut = line_end
        return {**document, self._field: text[max(cut, 0) :] if self._heldout else text[: max(cut, 0)]}

    def place(self, index: int) -> str:
        """The whole document's place."""
        return self._source.place(0)

    def fingerprint(self) -> str:
        """Hash of the document and the cut."""
        return hashlib.sha256(f"{self._source.fingerprint()} {self._fraction} {self._heldout}".encode()).hexdigest()


def text_of(document: dict[str, Any], field: str, place: str) -> str:
    """A document's text. Raises DataError naming ``place`` if the field is absent or no string."""
    if field not in document:
        raise DataError(f"{place}: no field {field!r}; fields: {', '.join(map(repr, document)) or 'none'}")
    if not isinstance(document[field], str):
        raise DataError(f"{place}: field {field!r} must be a string, got {type(document[field]).__name__}")
    return document[field]


def open_source(spec: str, split: str, options: DataOptions) -> Source:
    """The training or held-out documents of one source (not of a mixture).

    The split is the same on every run and machine with the same documents: by module for ``python_stdlib``, by the
    dataset's own splits for TFDS where it has them, otherwise by document; a single text is cut near its end.

    Args:
      spec: ``KIND`` or ``KIND:ARGUMENT``; see ``KINDS``.
      split: "train" or "heldout".
      options: for ``heldout_fraction``, ``format``, ``field`` and ``data_dir``.

    Raises:
      ConfigError: unknown kind (lists the choices) or a missing or useless argument.
      DataError: nothing there, or nothing that can be held out.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise unknown_name("data source", kind, KINDS)
    if bool(argument) != (kind in ARGUMENTS):
        form = "takes no argument" if argument else f"needs an argument, {ARGUMENTS[kind]}"
        raise ConfigError(f"data source {spec!r}: {kind} {form}")
    return KINDS[kind](spec, argument, split, options)


def open_whole_source(spec: str, options: DataOptions) -> Source:
    """All documents of a source, for one that is used for evaluation only."""
    kind, _, argument = spec.partition(":")
    if kind in WHOLE and argument:
        return WHOLE[kind](spec, argument, options)
    return open_source(spec, "heldout", options)


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """Sources and weights of ``SPEC`` or ``SPEC=WEIGHT,SPEC=WEIGHT``.

    Raises:
      ConfigError: a weight that is not positive, or a source named twice.
    """
    parts = [part.strip().rpartition("=") for part in spec.split(",")]
    if not all(name and _is_number(weight) for name, _, weight in parts):
        return [(spec.strip(), 1.0)]
    mixture = [(name.strip(), float(weight)) for name, _, weight in parts]
    for name, weight in mixture:
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data source {name!r} has weight {weight}; weights must be positive")
        if [other for other, _ in mixture].count(name) > 1:
            raise ConfigError(f"data source {name!r} is named twice in the mixture {spec!r}")
    return mixture


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _open_stdlib(spec: str, argument: str, split: str, options: DataOptions) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    modules = _stdlib_modules(root)
    sizes = {module: sum(os.path.getsize(path) for path in paths) for module, paths in modules.items()}
    held_out = _held_out_modules(sizes, options.heldout_fraction)
    paths = [p for module, files in modules.items() if (module in held_out) == (split == "heldout") for p in files]
    if not paths:
        raise DataError(f"{spec}: no {split} sources of the standard library under {root}")
    return Files(spec, paths, _read_python, options.field or "text")


def _stdlib_modules(root: Path) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)
        for name in sorted(names):
            path = Path(folder, name)
            module = path.relative_to(root).parts[0].removesuffix(".py")
            if name.endswith(".py") and module in sys.stdlib_module_names and module not in _TABLES:
                modules.setdefault(module, []).append(str(path))
    return dict(sorted(modules.items()))


def _held_out_modules(sizes: dict[str, int], fraction: float) -> set[str]:
    """Modules in the order of their names' hashes, as long as they fit into the fraction of bytes."""
    budget = fraction * sum(sizes.values())
    chosen: set[str] = set()
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[module] <= budget:
            chosen.add(module)
            budget -= sizes[module]
    return chosen


def _read_python(path: str) -> str:
    with tokenize.open(path) as file:  # honours the encoding that a source file declares
        return file.read()


def _open_text(spec: str, pattern: str, split: str, options: DataOptions) -> Source:
    return _split_documents(_all_text(spec, pattern, options), split, options)


def _all_text(spec: str, pattern: str, options: DataOptions) -> Source:
    return Files(spec, _matching_files(spec, pattern), _read_text, options.field or "text")


def _read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


def _open_json_lines(spec: str, pattern: str, split: str, options: DataOptions) -> Source:
    return _split_documents(_all_json_lines(spec, pattern, options), split, options)


def _all_json_lines(spec: str, pattern: str, options: DataOptions) -> Source:
    source = JsonLines(spec, _matching_files(spec, pattern))
    if not len(source):
        raise DataError(f"{spec}: empty corpus: {len(source.paths)} files without a line")
    return source


def _matching_files(spec: str, pattern: str) -> list[str]:
    paths = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
    if not paths:
        raise DataError(f"{spec}: no file matches {pattern!r}")
    return paths


def _file_hash(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _split_documents(source: Source, split: str, options: DataOptions) -> Source:
    if options.heldout_source:  # then training may use all of it
        return source
    if len(source) == 1:
        if options.format != "text":
            raise DataError(f"{source.name}: only one document, nothing to hold out; set data.heldout_source")
        return TextPart(source, options.text_field, options.heldout_fraction, split == "heldout")
    order = np.random.default_rng(0).permutation(len(source))
    held_out = max(1, round(options.heldout_fraction * len(source)))
    held_out = min(held_out, len(source) - 1)
    return Subset(source, np.sort(order[:held_out] if split == "heldout" else order[held_out:]))


def _open_digits(spec: str, argument: str, split: str, options: DataOptions) -> Source:
    return Digits(split)


def _open_dtmf(spec: str, argument: str, split: str, options: DataOptions) -> Source:
    return Dtmf(split)


def _open_tfds(spec: str, argument: str, split: str, options: DataOptions) -> Source:
    source, is_split = open_tfds(spec, argument, split, options)
    return source if is_split else _split_documents(source, split, options)


KINDS: dict[str, Callable[[str, str, str, DataOptions], Source]] = {
    "python_stdlib": _open_stdlib,
    "text": _open_text,
    "jsonl": _open_json_lines,
    "tfds": _open_tfds,
    "digits": _open_digits,
    "dtmf": _open_dtmf,
}
WHOLE: dict[str, Callable[[str, str, DataOptions], Source]] = {"text": _all_text, "jsonl": _all_json_lines}
ARGUMENTS = {"text": "text:GLOB", "jsonl": "jsonl:GLOB", "tfds": "tfds:NAME[/CONFIG][:VERSION]"}
