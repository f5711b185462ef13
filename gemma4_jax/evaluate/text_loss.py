"""Bits per byte and perplexity of texts longer than what is read at once: windows that slide with context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.evaluate.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """nats: summed over all tokens but bos. tokens: how many. bytes: of the texts in UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What a compressor driven by the model would need; compares models of any vocabulary."""
        return self.nats / math.log(2.0) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; compares models of one vocabulary only."""
        return math.exp(self.nats / self.tokens)


def sliding_windows(ids: Sequence[int], bos: int, window: int, stride: int) -> list[tuple[list[int], int]]:
    """Rows that score every token of a text exactly once.

    The first row is bos and the first ``window - 1`` tokens, all scored. Each further row ends ``stride`` tokens later and scores
    those only; it too begins with bos, for which models are trained to find it there, and the rest is context.

    Args:
      ids: a text's tokens without bos.
      window: tokens in a row, bos included.
      stride: 1…``window - 1``; the smaller, the more context for each token and the more rows.

    Returns:
      (row, index of its first scored token) pairs.

    Raises:
      ConfigError: window or stride out of range.
    """
    if window < 2 or not 1 <= stride < window:
        raise ConfigError(f"window {window} and stride {stride}: 2 or more tokens, and a stride in 1…{window - 1}")
    rows, done = [], 0
    while done < len(ids):
        end = min(len(ids), window - 1 if not done else done + stride)
        start = max(0, end - (window - 1))
        rows.append(([bos, *ids[start:end]], 1 + done - start))
        done = end
    return rows


def text_loss(scorer: Scorer, tokenizer, texts: Iterable[str], *, window: int, stride: int) -> TextLoss:
    """The loss of texts, each on its own (see ``sliding_windows``).

    Raises:
      ConfigError: window or stride out of range. DataError: no text.
    """
    rows, size = [], 0
    for text in texts:
        rows += sliding_windows(tokenizer.encode(text, bos=False), tokenizer.bos_id, window, stride)
        size += len(text.encode())
    if not rows:
        raise DataError("no text to evaluate")
    scored = scorer.score([row for row, _ in rows], [first for _, first in rows])
    nats = -sum(float(part.log_probabilities.sum(dtype="float64")) for part in scored)
    return TextLoss(nats, sum(len(part.greedy) for part in scored), size)
