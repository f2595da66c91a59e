"""Answers so plain that math-verify's verdict on them is known without running it: integers, decimals, single words.

What is returned here must be what math-verify 0.9 returns; tests compare the two on tens of thousands of generated pairs. Whatever is
not certain is None, and the caller asks the library.
"""

import re
from decimal import Decimal

# At most six decimals, math-verify's rounding: within them two numbers round to the same value exactly if they are
# equal. Fifteen digits in all are exact in a double.
_NUMBER = re.compile(r"-?\d{1,9}(?:\.\d{1,6})?", re.ASCII)
_WORD = re.compile(r"[A-Za-z]{2,24}", re.ASCII)
_BOXED = re.compile(r"\\boxed\{([^{}\\$]+)\}")
_PERCENT = re.compile(r"\s*(?:\\?%|[Pp]ercent|[Pp]ct)")
# Letters that math-verify rewrites or reads as something else than a product of symbols.
_REWRITTEN = re.compile(r"and|or|inf|sqrt|percent|pct|d[a-z]", re.IGNORECASE)


def boxed_answer(response: str) -> str | None:
    """The content of the response's only box, where math-verify's extraction provably reads that and nothing else; else None.

    Its highest-ranked patterns are a box up to the response's last brace, mathematics that encloses a box, and 'final answer is … I
    hope'. With one box, no brace after it, and no mathematics closing after it (but for a `$` directly around the box), only the box
    is left.
    """
    start = response.find("\\boxed")
    match = _BOXED.match(response, start) if start >= 0 else None
    if match is None or response.rfind("\\boxed{") != start:
        return None
    if "\\fbox" in response or "I hope" in response or "i hope" in response:
        return None
    tail = response[match.end() :]
    if tail[:1] == "$":
        if start == 0 or response[start - 1] != "$" or response[start - 2 : start - 1] in ("$", "\\"):
            return None
        tail = tail[1:]
        if _PERCENT.match(tail):
            return None
    if any(mark in tail for mark in ("$", "}", "]", "\\")):
        return None
    return match[1]


def decide(gold: str, answer: str) -> bool | None:
    """math-verify's verdict on `\\boxed{answer}` against `gold`, or None where it is not certain."""
    boxed = _BOXED.fullmatch(gold)
    expected = boxed[1] if boxed else gold
    if _NUMBER.fullmatch(expected) and _NUMBER.fullmatch(answer):
        return Decimal(expected) == Decimal(answer)
    if boxed and _WORD.fullmatch(expected) and _WORD.fullmatch(answer):
        if expected == answer:
            return True
        expected, answer = expected.lower(), answer.lower()
        # Words are products of symbols to sympy: only other letters make another answer.
        if sorted(expected) != sorted(answer) and not _REWRITTEN.search(expected) and not _REWRITTEN.search(answer):
            return False
    return None


def is_readable(gold: str) -> bool:
    """Whether math-verify certainly finds an answer in the gold: a plain number, or a box around a number or a word."""
    boxed = _BOXED.fullmatch(gold)
    return bool(_NUMBER.fullmatch(boxed[1] if boxed else gold) or (boxed and _WORD.fullmatch(boxed[1])))
