"""TFDS datasets as sources: random access through array_record, without tensorflow."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_jax.data.options import DataOptions
from gemma4_jax.errors import DataError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

HELDOUT_SPLITS = ("validation", "test")  # in order of preference
_FILE_FORMAT = "array_record"


class TfdsSource:
    """One split of a dataset that is already built; bytes in examples become strings."""

    def __init__(self, name: str, builder: tfds.core.DatasetBuilder, split: str):
        """Args: ``name`` for messages; ``builder`` of a prepared dataset; the dataset's own ``split``."""
        self.name = name
        self.split = split
        self._info = builder.info
        self._examples = builder.as_data_source(split=split)
        self._records = _sequences_of_dicts(builder.info.features)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = _plain(self._examples[index], self.place(index))
        for name in self._records:  # TFDS gives a list of dicts as a dict of lists
            columns = example[name]
            example[name] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return example

    def place(self, index: int) -> str:
        """Name, split and number of the example."""
        return f"{self.name}: {self.split} example {index}"

    def fingerprint(self) -> str:
        """Hash of the split's files, byte by byte: a dataset built again under the same name counts as another."""
        total = hashlib.sha256(self.split.encode())
        for path in sorted(self._info.splits[self.split].filepaths):
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def open_tfds(spec: str, name: str, split: str, options: DataOptions) -> tuple[TfdsSource, bool]:
    """A dataset's documents for training or evaluation.

    Args:
      spec: the whole source, for messages.
      name: ``NAME[/CONFIG][:VERSION]`` of a dataset built under ``options.data_dir``.
      split: "train" or "heldout".
      options: for ``data_dir`` and ``heldout_source``.

    Returns:
      The source, and whether it already is the part asked for: a dataset without a validation or test split gives its
      train split, to be divided.

    Raises:
      DataError: no such dataset there, not built, or not in array_record format.
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    try:
        builder = tfds.builder(name, data_dir=options.data_dir or None, try_gcs=False)
    except ValueError as error:  # DatasetNotFoundError is one; an unknown config of a known dataset is a plain one
        place = options.data_dir or "TFDS's default folder"
        raise DataError(f"{spec}: no TFDS dataset {name!r} under {place}") from error
    splits = builder.info.splits
    if not splits:
        raise DataError(f"{spec}: {name!r} is known but not built under {builder.data_dir}; build it there first")
    if builder.info.file_format.value != _FILE_FORMAT:
        raise DataError(
            f"{spec}: built as {builder.info.file_format.value}, but random access needs {_FILE_FORMAT}; "
            f"build it again with file_format={_FILE_FORMAT}"
        )
    own = "train" if split == "train" else next((s for s in HELDOUT_SPLITS if s in splits), "train")
    if own not in splits:
        raise DataError(f"{spec}: no split {own!r}; splits: {', '.join(splits)}")
    divided = own == "train" and not any(s in splits for s in HELDOUT_SPLITS)
    return TfdsSource(spec, builder, own), not divided


def _sequences_of_dicts(features: tfds.features.FeaturesDict) -> list[str]:
    import tensorflow_datasets as tfds

    return [
        name
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict)
    ]


def _plain(value: Any, place: str) -> Any:
    """An example with bytes as strings and sequences of them as lists."""
    if isinstance(value, dict):
        return {name: _plain(item, place) for name, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 at byte {error.start}") from error
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_plain(item, place) for item in value]
    return value
