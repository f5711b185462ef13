"""The loop's data: tokenizer, training and held-out batches of one run (see ``gemma4_jax.data``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gemma4_jax.config import ModelConfig
from gemma4_jax.data import BatchIterator, DataOptions, get_tokenizer, learnt_bytes, make_dataset, make_processor
from gemma4_jax.train.distributed import batch_part


class Feed:
    """Batches of this process's rows, from a run's ``data`` section.

    Args:
      data: the section.
      workdir: folder of the run, where a trained tokenizer and tokens are kept.
      model: of the run; conversations may then hold the media that it has inputs for.
      mesh: of the run; says which rows of a batch this process feeds. None: one process feeds all.

    Raises:
      ConfigError, DataError, PromptError: as the data package raises them.
    """

    def __init__(
        self, data: Mapping[str, Any], workdir: Path, model: ModelConfig | None = None, mesh: Mesh | None = None
    ):
        self.options = DataOptions.of(data)
        self.tokenizer = get_tokenizer(self.options, workdir)
        self.processor = make_processor(self.options, self.tokenizer, model)
        place = *((0, 1) if mesh is None else batch_part(mesh)), self.processor
        self.train = make_dataset(self.options, self.tokenizer, "train", workdir, *place)
        self.heldout = make_dataset(self.options, self.tokenizer, "heldout", workdir, *place)
        self._byte_lengths = self.tokenizer.byte_lengths()

    def train_iterator(self) -> BatchIterator:
        """Endless, shuffled, checkpointable."""
        return iter(self.train)

    def heldout_batches(self, limit: int) -> Iterable[Mapping[str, np.ndarray]]:
        """The first ``limit`` batches of the held-out rows (0: all), the same each time."""
        return itertools.islice(iter(self.heldout), limit or None)

    def count_bytes(self, batch: Mapping[str, np.ndarray]) -> int:
        """Bytes of text that the supervised tokens spell."""
        return learnt_bytes(batch, self._byte_lengths)

    def files(self, model_config_json: str) -> dict[str, str]:
        """Plain files of a checkpoint: the model configuration, the tokenizer, and how media are prepared."""
        files = {
            "config.json": model_config_json,
            "tokenizer.json": self.tokenizer.to_json(),
            "tokenizer_config.json": self.tokenizer.settings_json(),
        }
        if self.processor is not None:
            files["processor_config.json"] = self.processor.options.to_json()
        return files
