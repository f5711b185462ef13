"""Builder of the TFDS dataset ``text_corpus``: any source of ``gemma4_jax.data.sources``, one config per corpus.

Nothing here needs tensorflow. ``gemma4_jax.data.tfds_build`` makes the configs and runs it. TFDS finds a builder by the
name ``Builder`` in a module and package of this form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from gemma4_jax.data.options import DataOptions
from gemma4_jax.data.sources import Source, open_source, text_of
from gemma4_jax.errors import DataError

SPLITS = {"train": "train", "heldout": "validation"}


@dataclasses.dataclass(kw_only=True)
class TextCorpusConfig(tfds.core.BuilderConfig):
    """One corpus: ``source`` is the spec, ``options`` how it is read and split."""

    source: str = ""
    options: DataOptions = dataclasses.field(default_factory=DataOptions)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Documents with ``text``, or with ``messages`` of ``role`` and ``content``; splits train and validation."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First form."}  # noqa: RUF012 - TFDS declares it so
    BUILDER_CONFIGS = []  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": {"text": tfds.features.Text()},
            "chat": {
                "messages": tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
            },
        }
        return self.dataset_info_from_configs(
            description=f"Documents of {self.builder_config.source}.",
            features=tfds.features.FeaturesDict(features[self.builder_config.options.format]),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        return {
            name: self._generate_examples(open_source(config.source, split, config.options))
            for split, name in SPLITS.items()
        }

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        options = self.builder_config.options
        for index in range(len(source)):
            document, place = source[index], source.place(index)
            if options.format == "text":
                yield index, {"text": text_of(document, options.text_field, place)}
            else:
                yield index, {"messages": _messages(document, options.text_field, place)}


def _messages(document: dict[str, Any], field: str, place: str) -> list[dict[str, str]]:
    messages = document.get(field)
    if not isinstance(messages, list):
        raise DataError(f"{place}: field {field!r} must be a list of messages, got {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(n), str) for n in ("role", "content")):
            raise DataError(f"{place}: message {number} needs a role and a content that are strings")
        if set(message) != {"role", "content"}:
            raise DataError(f"{place}: message {number} has {', '.join(sorted(message))}; only role and content fit")
    return messages
