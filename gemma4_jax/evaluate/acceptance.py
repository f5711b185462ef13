"""How often a drafter's tokens are kept: with the true text before them, and in real speculative decoding.

Axis letters: B batch, T positions, J draft steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.evaluate.scorer import padded_rows
from gemma4_jax.evaluate.text_loss import sliding_windows
from gemma4_jax.losses import LossConfig, draft_agreement
from gemma4_jax.sample.sampler import Sampler, Stats


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """per_step: share of draft step j's tokens that were kept, of those whose predecessors were. tokens_per_round: emitted in
    one pass of the target (1 without drafts). sampled: probability under the target of the first drafted token, or None."""

    per_step: tuple[float, ...]
    tokens_per_round: float
    sampled: float | None = None


def teacher_forced_acceptance(
    bundle, texts: Iterable[str], *, steps: int, window: int = 512, batch_size: int = 8
) -> Acceptance:
    """Where the drafter's argmax equals the target's, at every token of texts with the true tokens before it.

    ``tokens_per_round`` is 1 plus the products of the steps' shares: what a round would emit if steps failed independently.

    Args:
      bundle: with drafter and tokenizer.
      steps: J.
      window: tokens of a row; rows do not overlap.

    Raises:
      ConfigError: no drafter. DataError: no text of at least three tokens.
    """
    _check_drafter(bundle)
    rows = [
        np.asarray(row, np.int32)
        for text in texts
        for row, _ in sliding_windows(
            bundle.tokenizer.encode(text, bos=False), bundle.tokenizer.bos_id, window, window - 1
        )
        if len(row) > 2
    ]
    if not rows:
        raise DataError("no text to draft in: every text has fewer than two tokens")
    rows.sort(key=len, reverse=True)
    graph, state = nnx.split((bundle.model, bundle.drafter))
    sums: dict[str, float] = {}
    for at in range(0, len(rows), batch_size):
        tokens, segments = padded_rows(rows[at : at + batch_size], batch_size, bundle.config.pad_token_id)
        found = jax.device_get(_agreement(graph, steps, state, tokens, segments))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
    per_step = tuple(sums[f"agree_{j}"] / max(sums[f"count_{j}"], 1.0) for j in range(1, steps + 1))
    tokens_per_round = 1.0 + float(np.cumprod(per_step).sum())
    return Acceptance(per_step, tokens_per_round, sums["probability_1"] / max(sums["count_1"], 1.0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _agreement(graph, steps, state, tokens, segments):
    model, drafter = nnx.merge(graph, state)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "loss_mask": segments > 0, "segment_ids": segments, "positions": positions}
    return draft_agreement(model, drafter, batch, LossConfig(mtp_steps=steps))


def decoding_acceptance(
    sampler: Sampler, prompts: Sequence[Sequence[int]], *, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> tuple[Acceptance, Stats]:
    """What is kept while a sampler with a fixed draft length continues prompts, one batch, never stopping.

    Raises:
      ConfigError: a sampler that does not draft, or adapts its length (steps would be measured on different texts).
    """
    steps = sampler.draft_tokens
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"draft_tokens is {steps!r}; acceptance per step needs a fixed length of at least 1")
    stats = sampler.generate(
        list(prompts), max_new_tokens=new_tokens, temperature=temperature, seed=seed, stop_ids=[]
    ).stats
    return Acceptance(kept_per_step([stats]), stats.mean_accepted), stats


def kept_per_step(stats: Sequence[Stats]) -> tuple[float, ...]:
    """Of drafts whose predecessors were kept, the share that was kept too, per draft step, over several generations of one
    fixed draft length; empty without drafts."""
    kept = [sum(column) for column in zip(*(part.accepted_per_step for part in stats), strict=True)]
    reached = [sum(part.rounds for part in stats), *kept[:-1]]
    return tuple(n / max(m, 1) for n, m in zip(kept, reached, strict=False))


def _check_drafter(bundle) -> None:
    if bundle.drafter is None:
        raise ConfigError("acceptance: this bundle has no drafter")
