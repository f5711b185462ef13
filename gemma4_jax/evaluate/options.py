"""Fields of an evaluation's config: what is measured, each part left out when its list is empty or its count 0."""

from __future__ import annotations

import dataclasses

from gemma4_jax.errors import ConfigError

SPLITS = ("heldout", "whole")


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Fields of ``config.text``.

    sources: kinds of text as ``NAME=SPEC`` or ``NAME=SPEC#VIEW``: a data source, and a part of its documents
    (``texts.VIEWS``). split: ``heldout`` (of a training run with the same ``config.data``) or ``whole``. characters: most of
    each kind (0: all). loss: measure bits per byte and perplexity, with rows of ``window`` tokens that move on by ``stride``.
    batch_size: rows at once.
    """

    sources: tuple[str, ...] = ("code=python_stdlib", "docstrings=python_stdlib#docstrings")
    split: str = "heldout"
    characters: int = 100_000
    loss: bool = True
    window: int = 512
    stride: int = 256
    batch_size: int = 8

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ConfigError(f"text.split is {self.split!r}; choices: {', '.join(SPLITS)}")
        _at_least("text", self, characters=0, window=2, stride=1, batch_size=1)
        if self.stride >= self.window:
            raise ConfigError(f"text.stride {self.stride} must be below text.window {self.window}")


@dataclasses.dataclass(frozen=True)
class AcceptanceOptions:
    """Fields of ``config.acceptance``.

    steps: draft steps (0: none of this). prompts of each kind of text, prompt_tokens long, continued by new_tokens
    (0 prompts: only teacher-forced), once at each of temperatures.
    """

    steps: int = 3
    prompts: int = 4
    prompt_tokens: int = 64
    new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self):
        _at_least("acceptance", self, steps=0, prompts=0, prompt_tokens=2, new_tokens=2)


@dataclasses.dataclass(frozen=True)
class NeedleOptions:
    """Fields of ``config.needle``: lengths of contexts (none: none of this), depths, trials of each; likelihood: also measure
    what the fact adds to the answer's log-likelihood, reading contexts whole."""

    lengths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    trials: int = 8
    likelihood: bool = True

    def __post_init__(self):
        _at_least("needle", self, trials=1)


@dataclasses.dataclass(frozen=True)
class MediaTaskOptions:
    """Fields of ``config.media``: tasks (data sources of conversations; none: none of this), how many questions of each
    (0: all), blind: also with the media blanked out, new_tokens of an answer, max_length of question and answer together."""

    tasks: tuple[str, ...] = ()
    count: int = 100
    blind: bool = True
    new_tokens: int = 16
    max_length: int = 2048
    batch_size: int = 32

    def __post_init__(self):
        _at_least("media", self, count=0, new_tokens=1, max_length=2, batch_size=1)


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """Fields of ``config.harness`` (extra ``eval``): tasks of lm-eval (none: none of this), include_path with task files of your
    own, limit of questions (0: all), num_fewshot (-1: as the task says), max_length (0: the model's)."""

    tasks: tuple[str, ...] = ()
    include_path: str = ""
    limit: int = 0
    num_fewshot: int = -1
    batch_size: int = 8
    max_length: int = 0

    def __post_init__(self):
        _at_least("harness", self, limit=0, num_fewshot=-1, batch_size=1, max_length=0)


def _at_least(section: str, options: object, **smallest: int) -> None:
    for name, least in smallest.items():
        if getattr(options, name) < least:
            raise ConfigError(f"{section}.{name} is {getattr(options, name)}; it must be at least {least}")
