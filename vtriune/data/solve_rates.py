"""Which rows a pass over the data takes, by how often their questions are solved. Pure logic; `loader` walks the passes.

A row whose solve rate is unknown or within bounds is taken in every pass; any other with the probability `floor`, so that what was
too easy or too hard once is looked at again. The coin of a row in a pass follows from the seed: no state but the rates themselves,
which change at a publish alone, and the same decision after a resume.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Bounds(NamedTuple):
    """Rows with a solve rate from `lowest` to `highest` are taken in every pass, others with the probability `floor`, above 0."""

    lowest: float
    highest: float
    floor: float


class SolveRates:
    """What is known of the rows, the last word of each: its mean accuracy, in [0, 1], over the completions of one group.

    bounds    None: every row is taken in every pass, and no rate is kept
    question  of a row: rows of one question, which an epoch shows several times, have one rate
    """

    def __init__(
        self, seed: int, bounds: Bounds | None = None, question: Callable[[int], int] = lambda row: row
    ) -> None:
        self._seed, self._bounds, self._question = seed, bounds, question
        self._rates: dict[int, float] = {}
        """By question."""

    def learn(self, rates: Mapping[int, float]) -> None:
        """Row → solve rate, of groups that ended since the publish before."""
        if self._bounds is not None:
            self._rates |= {self._question(row): rate for row, rate in rates.items()}

    def probability(self, row: int) -> float:
        """That a pass takes `row`."""
        if self._bounds is None or (rate := self._rates.get(self._question(row))) is None:
            return 1.0
        return 1.0 if self._bounds.lowest <= rate <= self._bounds.highest else self._bounds.floor

    def takes(self, row: int, number: int) -> bool:
        """Whether pass `number` takes `row`."""
        probability = self.probability(row)
        return probability == 1.0 or self._coin(row, number) < probability

    def _coin(self, row: int, number: int) -> float:
        """Uniform in [0, 1)."""
        digest = hashlib.blake2b(f"{self._seed} {number} {row}".encode(), digest_size=7).digest()
        return (int.from_bytes(digest, "big") >> 3) / 2**53

    def figures(self) -> dict[str, float]:
        """For the metrics: stored rows whose rate is known, and of these those below and above the bounds. Nothing without bounds."""
        if self._bounds is None:
            return {}
        rates = self._rates.values()
        return {
            "draw/rows_known": float(len(rates)),
            "draw/rows_too_hard": float(sum(rate < self._bounds.lowest for rate in rates)),
            "draw/rows_too_easy": float(sum(rate > self._bounds.highest for rate in rates)),
        }

    def state_dict(self) -> dict[str, Any]:
        """The rates, as JSON values."""
        return {str(question): rate for question, rate in self._rates.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Know what was known when `state` was taken."""
        self._rates = {int(question): rate for question, rate in state.items()} if self._bounds is not None else {}
