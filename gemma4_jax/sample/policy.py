"""How many tokens to draft: fixed, or by what rounds cost and how many drafts are accepted here."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable

from gemma4_jax.errors import ConfigError

CANDIDATES = (0, 4, 6, 2, 1)  # in the order in which they are tried
PROBE = 4
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
    """What has been seen of one draft length. seconds: of the rounds alone."""

    seconds: float = 0.0
    rounds: float = 0.0


class DraftPolicy:
    """Chooses the draft length of the next run of rounds.

    Fixed: always the same. "auto": measures what a run costs without rounds, plain rounds and rounds of ``PROBE`` drafts, which
    show how often each step is accepted; then only those other lengths that may beat the best, judged by that and by what
    rounds between the measured ones must cost. A trial of drafts ends early where they cannot pay even if luck was against
    them. It stays with the best and now and then tries a neighbour again. Old measurements fade, so the choice follows text
    and load. A useless drafter thus costs one program and a few rounds.
    """

    fade = 0.9
    trial_rounds = 4
    early_rounds = 2  # of a first trial of drafts, after which it may end
    steady_rounds = 32
    trial_share = 0.01  # of the time, at most, goes into trying neighbours again

    def __init__(self, draft_tokens: int | str):
        self.fixed = None if draft_tokens == "auto" else int(draft_tokens)
        self.records: dict[int, _Record] = {}
        self.tried = [0.0] * self.longest  # how often step j was reached
        self.passed = [0.0] * self.longest
        self.run_seconds: float | None = (
            None  # of a run without rounds; the fewer there are, the more it weighs on each
        )
        self.run_rounds = self.steady_rounds  # of a steady run
        self.steady_seconds = 0.0  # since the last trial
        self.retries = 0

    @property
    def longest(self) -> int:
        """The longest draft that may be asked for (rings are sized by it)."""
        return max(CANDIDATES) if self.fixed is None else self.fixed

    def next(self, most: int = steady_rounds) -> tuple[int, int]:
        """(draft length, rounds) of the next run, of ``most`` rounds at most."""
        self.run_rounds = min(most, self.steady_rounds)
        if self.fixed is not None:
            return self.fixed, self.run_rounds
        if self.run_seconds is None:
            return 0, 0
        for length in CANDIDATES:
            if rounds := self._first_trial(length):
                return length, min(most, rounds)
        best = self.best()
        neighbour = self._neighbour(best)
        trial = min(most, self.trial_rounds)
        if self.steady_seconds * self.trial_share >= trial * self._cost(neighbour):
            self.steady_seconds, self.retries = 0.0, self.retries + 1
            return neighbour, trial
        return best, self.run_rounds

    def _first_trial(self, length: int) -> int:
        """Rounds still to run before this length may be judged; 0: none."""
        record = self.records.get(length)
        if length == 0:
            return 0 if record else self.trial_rounds
        if record is None:
            return self.early_rounds if length == PROBE or self._may_pay(length) else 0
        return self.early_rounds if record.rounds <= self.early_rounds and self._hopeful(length) else 0

    def _neighbour(self, length: int) -> int:
        """The measured length to try beside this one: in turns the next longer and the next shorter."""
        order = sorted(self.records)
        at = order.index(length)
        sides = [order[i] for i in (at + 1, at - 1) if 0 <= i < len(order)]
        return sides[self.retries % len(sides)]

    def record(self, length: int, rounds: int, seconds: float, row_rounds: int, accepted: list[int]) -> None:
        """What a run showed. row_rounds: rounds times running rows; accepted: how often each step was accepted."""
        if rounds == 0:
            self.run_seconds = seconds
            return
        self.steady_seconds += seconds
        old = self.records.setdefault(length, _Record())
        by_rounds = max(seconds - (self.run_seconds or 0.0), 0.1 * seconds)  # the run of none may have been disturbed
        old.seconds, old.rounds = old.seconds * self.fade + by_rounds, old.rounds * self.fade + rounds
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
        return _tokens(self.acceptance(j) for j in range(length))

    def best(self) -> int:
        """The measured length with the most tokens per second."""
        return max(self.records, key=lambda n: (self.tokens_per_round(n) / self._cost(n), -n))

    def _cost(self, length: int) -> float:
        """Seconds of a round in a steady run."""
        record = self.records[length]
        return record.seconds / record.rounds + (self.run_seconds or 0.0) / self.run_rounds

    def _hopeful(self, length: int) -> bool:
        """Whether drafts could still beat plain rounds, had each step been accepted once more than it was."""
        tokens = _tokens((self.passed[j] + 1) / (self.tried[j] + 1) for j in range(length))
        return tokens / self._cost(length) > 1 / self._cost(0)

    def _may_pay(self, length: int) -> bool:
        """Whether a length could beat the best one, its cost guessed along the line through the nearest measured two."""
        seen = sorted(self.records)
        above = next((i for i, n in enumerate(seen) if n > length), len(seen) - 1)
        low, high = seen[above - 1], seen[above]
        slope = max(0.0, (self._cost(high) - self._cost(low)) / (high - low))
        guess = self._cost(low) + slope * (length - low)
        best = self.best()
        return self.tokens_per_round(length) / guess > self.tokens_per_round(best) / self._cost(best)


def _tokens(chances: Iterable[float]) -> float:
    """Expected tokens of a round: one, and as many drafts as are accepted one after the other."""
    return sum(itertools.accumulate(chances, operator.mul), start=1.0)
