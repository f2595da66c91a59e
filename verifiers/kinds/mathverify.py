"""Exact answers judged by math-verify: math, puzzle, science, chart, counting and OCR samples.

Under `rewards.answer: last` the answer is cut out of the response (`verifiers.answers`), and gold and answer are judged as two boxes;
what needs no algebra is decided by `exact_answers`. Under `paper`, the release's rule, the library reads the whole response, with LaTeX
extraction, boxed first, and the gold with its default extraction, first match; plain numbers and words are decided by `plain_answers`.
Everything else goes through math-verify once per distinct pair.

sympy can hang or eat memory on hostile input and offers no way to stop it: scoring happens in a process that its owner may kill
(verifiers.pool.pool). In the main thread of a process without such an owner an interval timer ends what Python can interrupt.
"""

import logging
import re
from functools import cache, lru_cache
from typing import Any

import msgspec

from verifiers.kinds import exact_answers
from verifiers.kinds.deadline import DeadlineError, deadline
from verifiers.kinds.plain_answers import boxed_answer, decide, is_readable
from verifiers.registry import Context, GoldError, Outcome, Task, verifier
from verifiers.types import FoldCase

NOTHING_FOUND = "no LaTeX answer found"
MAX_CACHED_CHARS = 1_024
# No answer nests as deeply; math-verify's expressions take minutes, in C, on thousands of brackets.
MAX_NESTING = 64
_BRACKETS = re.compile(r"[()\[\]{}]")
# Far below it math-verify's six decimals say nothing.
TINY = 1e-5
WRONG = "differs from the gold answer"


class MathParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Row-level overrides of `rewards.fold_case` and `rewards.numeric_tolerance`."""

    fold_case: FoldCase | None = None
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


def judge_anew(gold: str, answer: str, tolerance: float, rule: str) -> tuple[float, str]:
    """(accuracy, reason) of one pair through the library. GoldError where the gold answer cannot be read.

    `rule` is `rewards.answer`: under `last` numbers that only the library's rounding makes equal are not.
    """
    golds = parse_gold(gold)
    if not golds:
        raise GoldError(f"math-verify finds no answer in the gold {gold[:200]!r}; write a word as \\boxed{{word}}")
    predictions = parse_prediction(answer)
    if not predictions:
        return 0.0, NOTHING_FOUND
    if _library().verify(list(golds), predictions, timeout_seconds=None):
        is_equal = rule == "paper" or not is_rounded_away(golds[0], predictions[0])
        return (1.0, "") if is_equal else (0.0, WRONG)
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


def is_rounded_away(gold: Any, prediction: Any) -> bool:
    """Whether two numbers are equal for math-verify only since it rounds: both to 0, or an irrational one to its decimals."""
    try:
        if gold.is_rational is False and prediction.is_rational is None:
            return bool(prediction.is_Float)
        return bool(gold != 0 and abs(gold) < TINY and abs(prediction / gold - 1) > TINY)
    # sympy raises many things for what is no number, and that is not rounded.
    except Exception:
        return False


def nesting_depth(text: str) -> int:
    """The greatest number of brackets of any kind open at once."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _fold(task: Task) -> FoldCase:
    params: MathParams = task.params
    return params.fold_case or task.context.options.fold_case


def _pair(task: Task) -> tuple[str, str]:
    """What is compared: under `last` two expressions, under `paper` the gold and the response as they are. AnswerError, GoldError."""
    gold, response = task.gold, task.response
    if task.context.options.answer == "last":
        gold = exact_answers.gold_expression(gold)
        response = exact_answers.expression_of(response, gold)
    return (gold.lower(), response.lower()) if _fold(task) == "all" else (gold, response)


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
        gold, text, tolerance, rule = self.cache_key(task)
        limit_s = context.options.deadline_s
        # Imported before the clock starts: it can take seconds.
        _library()
        how = judge if len(text) <= MAX_CACHED_CHARS else judge_anew
        try:
            with deadline(limit_s):
                accuracy, reason = how(gold, text, tolerance, rule)
        except DeadlineError as error:
            raise TimeoutError(f"math-verify took longer than {limit_s:g} s") from error
        return Outcome(accuracy, status="bad_answer" if reason == NOTHING_FOUND else "ok", reason=reason)

    def score_at_once(self, task: Task) -> Outcome | None:
        """The outcome of what needs no algebra, and of a response without an answer in it."""
        if task.context.options.answer == "paper":
            return self._paper_at_once(task)
        verdict = exact_answers.decide(*_pair(task), _fold(task)) if _tolerance(task) == 0.0 else None
        return None if verdict is None else Outcome(float(verdict), reason="" if verdict else WRONG)

    def _paper_at_once(self, task: Task) -> Outcome | None:
        gold, response = _pair(task)
        answer = boxed_answer(response)
        if answer is not None and _tolerance(task) == 0.0:
            verdict = decide(gold, answer)
            if verdict is not None:
                return Outcome(float(verdict), reason="" if verdict else WRONG)
        if "\\" not in response and "$" not in response and "[" not in response and is_readable(gold):
            return Outcome(0.0, status="bad_answer", reason=NOTHING_FOUND)
        return None

    def cache_key(self, task: Task) -> tuple[str, str, float, str]:
        """Gold, answer, tolerance and rule, as `judge` takes them: a group's equal answers have one key."""
        gold, answer = _pair(task)
        rule = task.context.options.answer
        if rule == "last":
            return exact_answers.for_algebra(gold), exact_answers.for_algebra(answer), _tolerance(task), rule
        boxed = boxed_answer(answer)
        return gold, answer if boxed is None else f"\\boxed{{{boxed}}}", _tolerance(task), rule

    def gold_response(self, gold: str, params: MathParams, context: Context) -> str:
        """The gold answer as a model should give it."""
        if context.options.answer == "last":
            gold = exact_answers.gold_expression(gold)
        return gold if "\\boxed" in gold else f"\\boxed{{{gold}}}"
