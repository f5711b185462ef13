"""Turns a text or JSONL source into a TFDS dataset in array_record format, without tensorflow.

    python -m gemma4_jax.data.tfds_build --source 'jsonl:corpus/*.jsonl' --name my_corpus --data_dir ~/tfds

Afterwards ``data.source=tfds:text_corpus/my_corpus`` with ``data.data_dir`` reads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gemma4_jax.data.options import FORMATS, DataOptions
from gemma4_jax.errors import ConfigError, DataError

DATASET = "text_corpus"


def build(source: str, name: str, data_dir: str | Path, **options: Any) -> str:
    """Builds the dataset; one that is already there is left as it is.

    Args:
      source: a spec of ``gemma4_jax.data.sources``.
      name: the config's name, one word.
      data_dir: folder of TFDS datasets.
      options: fields of ``DataOptions`` that say how the source is read: ``format``, ``field``, ``heldout_fraction``.

    Returns:
      The spec by which ``data.source`` names the dataset.

    Raises:
      ConfigError: a bad name or option.
      DataError: bad documents; nothing is left in the folder then.
    """
    import tensorflow_datasets as tfds  # slow to import

    from gemma4_jax.data.text_corpus import text_corpus_dataset_builder as definition

    if not name.isidentifier():
        raise ConfigError(f"dataset name {name!r} must be one word of letters, digits and underscores")
    config = definition.TextCorpusConfig(name=name, source=source, options=DataOptions(source=source, **options))
    builder = definition.Builder(config=config, data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(file_format="array_record", download_config=tfds.download.DownloadConfig())
    return f"tfds:{DATASET}/{name}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description="Build a TFDS dataset from a text or JSONL source.")
    parser.add_argument("--source", required=True, help="text:GLOB, jsonl:GLOB or python_stdlib")
    parser.add_argument("--name", required=True, help="name of the corpus, one word")
    parser.add_argument("--data_dir", required=True, help="folder of TFDS datasets")
    parser.add_argument("--format", default="text", choices=FORMATS)
    parser.add_argument("--field", default="", help="field of a JSONL line; default text or messages")
    parser.add_argument("--heldout_fraction", type=float, default=0.05)
    args = vars(parser.parse_args(arguments))
    try:
        spec = build(**args)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    print(f"--config.data.source={spec} --config.data.data_dir={args['data_dir']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
