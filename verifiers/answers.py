"""Reading a short final answer out of a response: the text itself, a number, several numbers, a JSON value.

Used by the verifiers of short answers. Every reader refuses an answer that hedges: a list of candidates is not an
answer.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from verifiers.tags import tagged_text

# Squares of coordinates up to here are exact enough for areas and distances.
MAX_COORDINATE = 1e9
_BOXED = re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL)
# Digits are ASCII: look-alikes of other scripts are not numbers here.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w|\.\d)", re.ASCII)
_UNSIGNED = re.compile(r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)", re.ASCII)
_FENCE = re.compile(r"^```[a-zA-Z]*\s*|\s*```$")
_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)


class AnswerError(ValueError):
    """The response holds no answer of the kind asked for, or several. The message is the verdict's reason."""


def final_text(response: str) -> str:
    """The answer's text: inside the last pair of answer tags (else the whole response), and inside its box if it is
    one.
    """
    text = tagged_text(response)
    start = text.rfind("\\boxed")
    boxed = _BOXED.match(text, start) if start >= 0 else None
    return boxed[1].strip() if boxed else text


def only_number(text: str) -> float:
    """The one number in a text, in digits or as a word up to twenty; repeating it is no second one. AnswerError for
    none or several.
    """
    found = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    found |= {float(_WORDS.index(word.lower())) for word in _WORD.findall(text)}
    if len(found) != 1 or not math.isfinite(value := next(iter(found))):
        raise AnswerError("no number in the answer" if not found else f"{len(found)} different numbers in the answer")
    return value


def time_span(text: str) -> tuple[float, float]:
    """Two times in seconds, given as seconds or as [hh:]mm:ss, in order. AnswerError where there are not exactly two."""
    found = [
        sum(
            float(part) * unit
            for part, unit in zip((hours, minutes, seconds), _units(hours, minutes), strict=True)
            if part
        )
        for hours, minutes, seconds in _UNSIGNED.findall(text)
    ]
    if len(found) != 2:
        raise AnswerError(f"{len(found)} times in the answer, not a start and an end")
    if not found[0] <= found[1] < math.inf:
        raise AnswerError("the answer's end lies before its start")
    return found[0], found[1]


def _units(hours: str, minutes: str) -> tuple[float, float, float]:
    # With one colon the first group holds the minutes.
    return (3600.0, 60.0, 1.0) if hours and minutes else (60.0, 60.0, 1.0)


def json_value(text: str) -> Any:
    """The JSON value of an answer, with or without a code fence, in double or single quotes. AnswerError where it is
    none.
    """
    text = _FENCE.sub("", text.strip()) if text.lstrip().startswith("```") else text.strip()
    for candidate in (text, text.replace("'", '"')):
        try:
            return msgspec.json.decode(candidate)
        except (msgspec.DecodeError, RecursionError):
            continue
    raise AnswerError("the answer is no JSON")


def point_list(value: Any) -> list[tuple[float, float]]:
    """[[x, y], …] as pairs within MAX_COORDINATE; AnswerError for anything else."""
    try:
        points = msgspec.convert(value, list[tuple[float, float]])
    except (msgspec.ValidationError, RecursionError) as error:
        raise AnswerError("the answer is no list of points [x, y]") from error
    if not all(abs(x) <= MAX_COORDINATE and abs(y) <= MAX_COORDINATE for x, y in points):
        raise AnswerError("a coordinate is not finite, or far outside any image")
    return points
