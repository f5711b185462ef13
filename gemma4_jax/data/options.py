"""The ``data`` section of a run's config: its fields, their defaults and their limits, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma4_jax.errors import ConfigError

FORMATS = ("text", "chat", "preference")
LONG_EXAMPLES = ("split", "truncate", "error")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is read, how it is turned into rows of tokens, and in which order rows come.

    Attributes:
      source: what to read: one of the kinds of ``sources.KINDS``, or a mixture ``SPEC=WEIGHT,SPEC=WEIGHT``.
      heldout_source: what to evaluate on; empty means a part of ``source`` that training never sees.
      heldout_fraction: the share of ``source`` that is held out when ``heldout_source`` is empty.
      data_dir: where TFDS datasets lie; empty means TFDS's own default.
      format: "text" (every token is learnt), "chat" (conversations; only model turns are learnt) or "preference" (pairs:
        "prompt" or a list of messages, "chosen" and "rejected"; only the two answers are learnt).
      field: the field of a JSONL line or TFDS example that holds the text or the list of messages; empty means
        "text" or "messages", by ``format``.
      tokenizer: a folder or ``tokenizer.json`` to use; empty means one trained on the training documents.
      vocab_size: entries of a trained tokenizer.
      append_eos: end every text document with the eos token, which is then learnt too.
      seq_len: tokens in a row (T).
      batch_size: rows in a batch over all processes (B).
      overlap: tokens that each further piece of a long document repeats from the piece before it, as unlearnt context.
      heldout_overlap: the same for evaluation, where more context gives a lower and truer loss; it costs rows.
      long_examples: for documents longer than ``seq_len``: "split" into pieces, "truncate", or "error".
      image_budget: most soft tokens of an image, 70, 140, 280, 560 or 1120.
      video_budget: most soft tokens of a video's frame.
      video_frames: most frames of a video.
      long_audio: sound of more than 30 s is an error ("raise") or "cut".
      blind: images and frames are black and sound is silence, of the sizes they have: a control run, which shows what can
        be guessed without looking and listening.
      shuffle_seed: orders rows anew in each epoch.
      workers: processes that assemble batches; 0 means a thread.
      prefetch: batches made ahead of time (by each worker).
    """

    source: str = "python_stdlib"
    heldout_source: str = ""
    heldout_fraction: float = 0.05
    data_dir: str = ""
    format: str = "text"
    field: str = ""
    tokenizer: str = ""
    vocab_size: int = 2048
    append_eos: bool = True
    seq_len: int = 128
    batch_size: int = 4
    overlap: int = 1
    heldout_overlap: int = 1
    long_examples: str = "split"
    image_budget: int = 280
    video_budget: int = 70
    video_frames: int = 32
    long_audio: str = "raise"
    blind: bool = False
    shuffle_seed: int = 0
    workers: int = 0
    prefetch: int = 4

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "batch_size", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len must be at least 2 (a token and its target), got {self.seq_len}")
        if self.workers < 0:
            raise ConfigError(f"data.workers must be at least 0, got {self.workers}")
        for name in ("overlap", "heldout_overlap"):
            if not 1 <= getattr(self, name) < self.seq_len:
                raise ConfigError(
                    f"data.{name} must be at least 1 and below data.seq_len {self.seq_len}, got {getattr(self, name)}"
                )
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(f"data.heldout_fraction must be between 0 and 1, got {self.heldout_fraction}")
        if not 0 <= self.shuffle_seed < 2**32:
            raise ConfigError(f"data.shuffle_seed must be between 0 and {2**32 - 1}, got {self.shuffle_seed}")
        _one_of("format", self.format, FORMATS)
        _one_of("long_examples", self.long_examples, LONG_EXAMPLES)
        if self.format == "preference" and self.long_examples != "error":
            raise ConfigError(
                f"data.format preference needs data.long_examples error, got {self.long_examples!r}: half of a pair is none"
            )

    @classmethod
    def of(cls, section: DataOptions | Mapping[str, Any]) -> DataOptions:
        """Options from a config section (any mapping, such as a ConfigDict); absent fields keep their defaults.

        Raises:
          ConfigError: a field that does not exist (lists the choices), or a value out of range.
        """
        if isinstance(section, cls):
            return section
        known = [field.name for field in dataclasses.fields(cls)]
        for name in section:
            if name not in known:
                raise ConfigError(f"unknown field data.{name}; choices: {', '.join(known)}")
        return cls(**{name: section[name] for name in section})

    @property
    def text_field(self) -> str:
        """The field that holds a document's text or messages."""
        return self.field or ("text" if self.format == "text" else "messages")


def data_defaults() -> dict[str, Any]:
    """Every field of the ``data`` section with its default value, for config files to start from."""
    return dataclasses.asdict(DataOptions())


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"data.{name} must be one of {', '.join(choices)}, got {value!r}")
