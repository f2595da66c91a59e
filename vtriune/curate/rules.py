"""Rules about one row: the paper's filters (arXiv 2505.18129, section 3.4), by name, each with a parameter. Pure logic.

A rule speaks of the rows that it concerns and leaves all others in; it says of a row only whether it goes.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from verifiers import RewardSpec, score
from verifiers.tags import answer_text
from vtriune.curate.difficulty import Difficulty
from vtriune.data.box_frames import corners, gold_frame, labelled
from vtriune.data.schema import Sample

_OPTION_LINE = re.compile(r"^\s*\(?([A-H])[.):]\s*\S", re.MULTILINE)
_LETTER = re.compile(r"\(?[A-H]\)?\.?")
_TRUTHS = {"true", "false", "yes", "no"}
_SYMBOLS = "=[]();"
REASONING = ("mathverify", "multiple_choice")


class Candidate(NamedTuple):
    """A row, with what rules may ask of it."""

    sample: Sample
    sizes: Sequence[tuple[int, int]]
    """Of its pictures as displayed, px."""
    prompt_tokens: int | None
    """Image tokens included; None without a model."""
    difficulty: Difficulty | None
    """None for a row that no run has answered."""

    @property
    def gold(self) -> str:
        """The gold answer without what it may be wrapped in."""
        gold = self.sample.reward.gold
        tagged = answer_text(gold)
        text = (gold if tagged is None else tagged).strip()
        boxed = re.fullmatch(r"\$?\\boxed\{(.*)\}\$?", text, re.DOTALL)
        return (boxed[1] if boxed else text).strip()

    @property
    def is_grounding(self) -> bool:
        """Detection of one thing that a phrase names: one gold box."""
        return len(corners(self.sample.reward)) == 1


class Rule(NamedTuple):
    """What is dropped."""

    about: str
    verifiers: tuple[str, ...]
    """Rows that it concerns; empty: all."""
    default: float
    """Of its parameter, which `about` calls X."""
    drops: Callable[[Candidate, float], bool]

    def drops_row(self, candidate: Candidate, parameter: float) -> bool:
        """Whether the row goes."""
        is_concerned = not self.verifiers or candidate.sample.reward.verifier in self.verifiers
        return is_concerned and self.drops(candidate, parameter)


def _is_choice(candidate: Candidate, _: float) -> bool:
    letters = {found[1] for found in _OPTION_LINE.finditer(candidate.sample.prompt[-1].content)}
    return _LETTER.fullmatch(candidate.gold) is not None or len(letters & set("ABC")) >= 2


def _is_truth(candidate: Candidate, _: float) -> bool:
    return candidate.gold.casefold().rstrip(".") in _TRUTHS


def _has_symbols(candidate: Candidate, _: float) -> bool:
    return any(symbol in candidate.gold for symbol in _SYMBOLS)


def _is_long_answer(candidate: Candidate, most: float) -> bool:
    return len(candidate.gold) > most


def _is_long_query(candidate: Candidate, most: float) -> bool:
    return candidate.prompt_tokens is not None and candidate.prompt_tokens > most


def _has_crowd(candidate: Candidate, most: float) -> bool:
    by_label = Counter(label for label, _ in labelled(candidate.sample.reward))
    return max(by_label.values(), default=0) > most


def _has_large_box(candidate: Candidate, most: float) -> bool:
    return any(share > most for share in box_shares(candidate.sample.reward, candidate.sizes))


def box_shares(reward: RewardSpec, sizes: Sequence[tuple[int, int]]) -> list[float]:
    """Share of its picture that each gold box covers."""
    parm = reward.verifier_parm or {}
    if not sizes:
        return []
    number = parm.get("image") or 0
    extents = {"norm_1": (1.0, 1.0), "norm_1000": (1000.0, 1000.0)}
    width, height = extents.get(gold_frame(parm), sizes[number if number < len(sizes) else 0])
    return [(x2 - x1) * (y2 - y1) / (width * height) for x1, y1, x2, y2 in corners(reward)]


def _has_long_phrase(candidate: Candidate, most: float) -> bool:
    return candidate.is_grounding and any(len(label.split()) > most for label, _ in labelled(candidate.sample.reward))


def _is_unreadable(candidate: Candidate, _: float) -> bool:
    spec = RewardSpec(ground_truth=candidate.gold, verifier="mathverify")
    verdict = score(f"<answer>\\boxed{{{candidate.gold}}}</answer>", spec, None)
    return verdict.status != "ok" or verdict.accuracy < 1


def _is_solved(candidate: Candidate, least: float) -> bool:
    return candidate.difficulty is not None and candidate.difficulty.solve_rate >= least


def _is_hopeless(candidate: Candidate, most: float) -> bool:
    return candidate.difficulty is not None and candidate.difficulty.reward_of_16 < most


def _is_easy(candidate: Candidate, least: float) -> bool:
    return candidate.difficulty is not None and candidate.difficulty.reward_of_16 > least


RULES: dict[str, Rule] = {
    "multiple_choice": Rule("the answer is a letter, or the question lists options", REASONING, 0, _is_choice),
    "true_false": Rule("the answer is true, false, yes or no", REASONING, 0, _is_truth),
    "answer_symbols": Rule(f"the answer holds one of {' '.join(_SYMBOLS)}", ("mathverify",), 0, _has_symbols),
    "answer_length": Rule("the answer has more than X characters", ("mathverify",), 20, _is_long_answer),
    "query_length": Rule("the prompt has more than X tokens, image tokens included", REASONING, 2048, _is_long_query),
    "boxes_per_label": Rule("more than X gold boxes of one label", ("detection",), 10, _has_crowd),
    "box_area": Rule("a gold box covers more than the share X of its picture", ("detection",), 0.5, _has_large_box),
    "phrase_words": Rule("the phrase of the one gold box has more than X words", ("detection",), 6, _has_long_phrase),
    "ocr_verifies": Rule("math-verify does not read the text that is to be read", ("ocr",), 0, _is_unreadable),
    "solved": Rule("the share X of a run's answers, or more, is right", REASONING, 1.0, _is_solved),
    "boxes_too_hard": Rule("the reward of 16 answers is below X", ("detection",), 2, _is_hopeless),
    "boxes_too_easy": Rule("the reward of 16 answers is above X", ("detection",), 10, _is_easy),
}
