"""How many tokens to draft: fixed, or by what rounds cost and how many drafts are accepted here."""

from __future__ import annotations

import dataclasses

from gemma4_jax.errors import ConfigError

CANDIDATES = (0, 1, 2, 4, 6)
MAX_DRAFT = 32


def parse_draft_tokens(value: int | str, has_drafter: bool) -> int | str:
    """A checked ``draft_tokens``: "auto" without a drafter means 0.

    Raises:
      ConfigError: anything but "auto" or 0…``MAX_DRAFT``, or a draft without a drafter.
    """
    if value == "auto":
        return "auto" if has_drafter else 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_DRAFT:
        raise ConfigError(f'draft_tokens is {value!r}; choices: "auto" or 0 to {MAX_DRAFT}')
    if value and not has_drafter:
        raise ConfigError(f"draft_tokens is {value} but the bundle has no drafter")
    return value


@dataclasses.dataclass
class _Record:
    """What has been seen of one draft length."""

    seconds: float = 0.0
    rounds: float = 0.0

    @property
    def cost(self) -> float:
        return self.seconds / self.rounds


class DraftPolicy:
    """Chooses the draft length of the next run of rounds.

    Fixed: always the same. "auto": tries lengths from short to long in short runs, stops trying longer ones when the
    last step up did not pay even if every draft were accepted as often as the best step so far, then stays with the
    best and tries its neighbours again now and then. Old measurements fade, so the choice follows text and load.
    """

    fade = 0.9
    trial_rounds = 4
    steady_rounds = 32
    retry_every = 16  # runs

    def __init__(self, draft_tokens: int | str):
        self.fixed = None if draft_tokens == "auto" else int(draft_tokens)
        self.records: dict[int, _Record] = {}
        self.tried = [0.0] * max(CANDIDATES)  # how often step j was reached
        self.passed = [0.0] * max(CANDIDATES)
        self.runs = 0

    @property
    def longest(self) -> int:
        """The longest draft that may be asked for (rings are sized by it)."""
        return max(CANDIDATES) if self.fixed is None else self.fixed

    def next(self) -> tuple[int, int]:
        """(draft length, rounds) of the next run."""
        if self.fixed is not None:
            return self.fixed, self.steady_rounds
        for length in CANDIDATES:
            if length not in self.records:
                if length and not self._may_pay(length):
                    break
                return length, self.trial_rounds
        best = self.best()
        if self.runs % self.retry_every == 0:
            order = sorted(self.records)
            at = order.index(best)
            neighbour = (
                order[at - 1] if (self.runs // self.retry_every) % 2 and at else order[min(at + 1, len(order) - 1)]
            )
            if neighbour != best:
                return neighbour, self.trial_rounds
        return best, self.steady_rounds

    def record(self, length: int, rounds: int, seconds: float, row_rounds: int, accepted: list[int]) -> None:
        """What a run showed. row_rounds: rounds times running rows; accepted: how often each step was accepted."""
        self.runs += 1
        if rounds == 0:
            return
        old = self.records.setdefault(length, _Record())
        old.seconds, old.rounds = old.seconds * self.fade + seconds, old.rounds * self.fade + rounds
        reached = row_rounds
        for j, passed in enumerate(accepted):
            self.tried[j] = self.tried[j] * self.fade + reached
            self.passed[j] = self.passed[j] * self.fade + passed
            reached = passed

    def acceptance(self, step: int) -> float:
        """Probability that draft step ``step`` (from 0) is accepted once reached; unseen: like the last one seen."""
        for j in range(step, -1, -1):
            if self.tried[j] > 0:
                return self.passed[j] / self.tried[j]
        return 1.0

    def tokens_per_round(self, length: int) -> float:
        """Expected tokens of a round with this draft length."""
        total, reach = 1.0, 1.0
        for j in range(length):
            reach *= self.acceptance(j)
            total += reach
        return total

    def best(self) -> int:
        """The measured length with the most tokens per second."""
        return max(self.records, key=lambda n: (self.tokens_per_round(n) / self.records[n].cost, -n))

    def _may_pay(self, length: int) -> bool:
        """Whether a longer draft could beat the best one, guessing its cost from those measured."""
        seen = sorted(self.records)
        if len(seen) < 2:
            return True
        low, high = seen[-2], seen[-1]
        slope = max(0.0, (self.records[high].cost - self.records[low].cost) / (high - low))
        guess = self.records[high].cost + slope * (length - high)
        best = self.best()
        return self.tokens_per_round(length) / guess > self.tokens_per_round(best) / self.records[best].cost
