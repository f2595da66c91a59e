"""Exact answers judged by math-verify: math, puzzle, science, chart, counting and OCR samples.

The prediction is read with LaTeX extraction, boxed first; the gold answer with the library's default extraction, first
match. Plain numbers and words are decided without sympy (verifiers.plain_answers); everything else goes through
math-verify once per distinct pair.

sympy can hang or eat memory on hostile input and offers no way to stop it: scoring happens in a process that its owner
may kill (verifiers.pool). In the main thread of a process without such an owner an interval timer ends what Python can
interrupt.
"""

from __future__ import annotations

import logging
import re
from functools import cache, lru_cache
from typing import Any

import msgspec

from verifiers.deadline import DeadlineError, deadline
from verifiers.plain_answers import boxed_answer, decide, is_readable
from verifiers.registry import Context, GoldError, Outcome, Task, verifier

NOTHING_FOUND = "no LaTeX answer found"
MAX_CACHED_CHARS = 1_024
# No answer nests as deeply; math-verify's expressions take minutes, in C, on thousands of brackets.
MAX_NESTING = 64
_BRACKETS = re.compile(r"[()\[\]{}]")
WRONG = "differs from the gold answer"


class MathParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Row-level overrides of `rewards.fold_case` and `rewards.numeric_tolerance`."""

    fold_case: bool | None = None
    numeric_tolerance: float | None = None


@cache
def _library() -> Any:
    """math_verify, imported at first use (sympy takes about a second), its warning about disabled timeouts silenced."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


@lru_cache(maxsize=16_384)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """math-verify's reading of a gold answer; empty where it finds none. Cached: a group shares its gold answer."""
    return tuple(_library().parse(gold, extraction_mode="first_match", parsing_timeout=None))


def parse_prediction(response: str) -> list[Any]:
    """math-verify's reading of a response: LaTeX only, boxed first."""
    library = _library()
    targets = [library.LatexExtractionConfig(boxed_match_priority=0)]
    return list(library.parse(response, extraction_config=targets, parsing_timeout=None))


def judge_anew(gold: str, answer: str, tolerance: float) -> tuple[float, str]:
    """(accuracy, reason) of one pair through the library. GoldError where the gold answer cannot be read."""
    golds = parse_gold(gold)
    if not golds:
        raise GoldError(f"math-verify finds no answer in the gold {gold[:200]!r}; write a word as \\boxed{{word}}")
    predictions = parse_prediction(answer)
    if not predictions:
        return 0.0, NOTHING_FOUND
    if _library().verify(list(golds), predictions, timeout_seconds=None):
        return 1.0, ""
    if tolerance > 0.0 and is_close(golds[0], predictions[0], tolerance):
        return 1.0, f"within {tolerance:g} of the gold answer"
    return 0.0, WRONG


# Only answers of at most MAX_CACHED_CHARS go through it, which bounds its memory.
judge = lru_cache(maxsize=16_384)(judge_anew)


def is_close(gold: Any, prediction: Any, tolerance: float) -> bool:
    """Both are real numbers and differ by at most `tolerance` times the gold's magnitude."""
    try:
        expected, found = float(gold), float(prediction)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False
    return abs(expected - found) <= tolerance * abs(expected)


def nesting_depth(text: str) -> int:
    """The greatest number of brackets of any kind open at once."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _folded(task: Task) -> tuple[str, str]:
    params: MathParams = task.params
    fold = task.context.options.fold_case if params.fold_case is None else params.fold_case
    return (task.response.lower(), task.gold.lower()) if fold else (task.response, task.gold)


def _tolerance(task: Task) -> float:
    given: float | None = task.params.numeric_tolerance
    return task.context.options.numeric_tolerance if given is None else given


@verifier("mathverify")
class MathVerify:
    """`R_acc` = 1 if math-verify finds the prediction equal to the gold answer, else 0."""

    def score(self, response: str, gold: str, params: MathParams, context: Context) -> Outcome:
        task = Task(response, gold, params, context)
        known = self.score_at_once(task)
        if known is not None:
            return known
        if nesting_depth(response) > MAX_NESTING:
            return Outcome(0.0, status="bad_answer", reason=f"brackets nested more than {MAX_NESTING} deep")
        gold, text, tolerance = self.cache_key(task)
        limit_s = context.options.deadline_s
        # Imported before the clock starts: it can take seconds.
        _library()
        try:
            with deadline(limit_s):
                judged = (
                    judge(gold, text, tolerance) if len(text) <= MAX_CACHED_CHARS else judge_anew(gold, text, tolerance)
                )
        except DeadlineError as error:
            raise TimeoutError(f"math-verify took longer than {limit_s:g} s") from error
        accuracy, reason = judged
        return Outcome(accuracy, status="bad_answer" if reason == NOTHING_FOUND else "ok", reason=reason)

    def score_at_once(self, task: Task) -> Outcome | None:
        """The outcome of plain numbers and words, and of a response without any mathematics in it."""
        response, gold = _folded(task)
        answer = boxed_answer(response)
        if answer is not None and _tolerance(task) == 0.0:
            verdict = decide(gold, answer)
            if verdict is not None:
                return Outcome(float(verdict), reason="" if verdict else WRONG)
        if "\\" not in response and "$" not in response and "[" not in response and is_readable(gold):
            return Outcome(0.0, status="bad_answer", reason=NOTHING_FOUND)
        return None

    def cache_key(self, task: Task) -> tuple[str, str, float]:
        """Gold, answer, tolerance. A lone box decides by itself, so a group's equal answers have one key."""
        response, gold = _folded(task)
        answer = boxed_answer(response)
        return gold, response if answer is None else f"\\boxed{{{answer}}}", _tolerance(task)

    def gold_response(self, gold: str, params: MathParams, context: Context) -> str:
        """The gold answer as a model should give it."""
        return gold if "\\boxed" in gold else f"\\boxed{{{gold}}}"
