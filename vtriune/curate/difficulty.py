"""How hard a row turned out to be: what answers to it were worth, of a recorded run or sampled for it."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from verifiers.scoring import is_correct
from verifiers.types import RewardOptions, Verdict
from vtriune.messages import SampleHeader


class Difficulty(NamedTuple):
    """Of one row."""

    num_answers: int
    """Without faults, of which nobody knows what they were worth."""
    num_right: int
    accuracy: float
    """Sum over the answers; of boxes the IoU reward at the threshold in force."""

    @property
    def solve_rate(self) -> float:
        """Share of right answers: pass@k is 1 − (1 − this)^k for independent ones, and 100 % where all are right."""
        return self.num_right / self.num_answers

    @property
    def reward_of_16(self) -> float:
        """The paper's cumulative reward of 16 answers, from however many there are."""
        return 16 * self.accuracy / self.num_answers


class Answered(Protocol):
    """An answer and what it was worth."""

    @property
    def header(self) -> SampleHeader: ...

    @property
    def verdict(self) -> Verdict: ...


Key = tuple[str, str]
"""Source and sample id."""


def difficulties(answers: Iterable[Answered], options: RewardOptions) -> dict[Key, Difficulty]:
    """By row, of those with an id."""
    found: dict[Key, Difficulty] = {}
    for answer in answers:
        if answer.verdict.status == "fault" or not answer.header.sample_id:
            continue
        key = (answer.header.source, answer.header.sample_id)
        before = found.get(key, Difficulty(0, 0, 0.0))
        is_right = is_correct(answer.verdict, answer.header.reward, options=options)
        found[key] = Difficulty(
            before.num_answers + 1, before.num_right + is_right, before.accuracy + answer.verdict.accuracy
        )
    return found
