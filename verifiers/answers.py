"""The one reader of "the answer" in a response, for every verifier, and what an answer's text may hold: a number, times, JSON.

What follows the last `</think>` is read, and of that the first of these that is there:
    1. the last closed pair of answer tags, else what follows the last opening tag
    2. the last box that is not empty
    3. the last line that is not empty, of at most MAX_LINE_CHARS
Inside the tags a box decides. Boxes of different content that nothing but a comma, `or`, `and` joins are alternatives, and those are
no answer; nor is a text of several numbers where one is asked for. All of it takes time linear in the response.
"""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import msgspec

from verifiers.registry import AnswerError, GoldError
from verifiers.tags import answer_text, conclusion

# Squares of coordinates up to here are exact enough for areas and distances.
MAX_COORDINATE = 1e9
MAX_LINE_CHARS = 512
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_LONE_BOX = re.compile(r"\s*\\boxed\{([^{}\\]+)\}\s*")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
# What stands between alternatives: spaces, mathematics' delimiters, and a joining word.
_JOINT = re.compile(
    r"(?:[\s$*,;{}、]|\\[,;!()\[\] ]|\\(?:q?quad|text|mathrm)|\\(?:boxed|fbox)\s*\{\s*\}|(?i:\b(?:or|and)\b)|[或和])*+"
)
_WRAPPED = re.compile(r"\s*(?:\$+([^$]+)\$+|\*\*([^*]+)\*\*|\\(?:text|textbf|mathrm|mathbf|textrm)\s*\{([^{}]*)\})\s*")
MAX_WRAPPINGS = 4
# Digits are ASCII: look-alikes of other scripts are not numbers here.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w|\.\d)", re.ASCII)
_UNSIGNED = re.compile(r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)", re.ASCII)
_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|"
    "eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty"
)
NUMBER_WORDS = {word: float(value) for value, word in enumerate(_WORDS.split("|"))}
_WORD = re.compile(rf"\b(?:{_WORDS})\b", re.IGNORECASE)
_FENCE = re.compile(r"^```[a-zA-Z]*\s*|\s*```$")
T = TypeVar("T")


def read_gold(read: Callable[[str], T], gold: str, what: str) -> T:
    """The gold answer as `read` reads it; GoldError, that it is no `what`, where that raises AnswerError."""
    try:
        return read(gold)
    except AnswerError as error:
        raise GoldError(f"the gold answer {gold[:80]!r} is no {what}: {error}") from error


class Reading(NamedTuple):
    """Where an answer stands: its text, whether a box held it, and whether tags or a box did; else it is a line of prose."""

    text: str
    is_boxed: bool
    is_marked: bool


def read_answer(response: str) -> Reading:
    """The answer of a response, by the rule above. AnswerError where there is none, or several."""
    text = conclusion(response)
    tagged = answer_text(text)
    text = text if tagged is None else tagged
    boxed = boxed_text(text)
    if boxed is not None:
        return Reading(boxed, True, True)
    text = _EMPTY_BOX.sub("", text).strip()
    if tagged is None:
        text = text[text.rfind("\n") + 1 :].strip()
        if len(text) > MAX_LINE_CHARS:
            raise AnswerError(f"no answer tags, no box, and a last line of {len(text)} characters")
    return Reading(text, False, tagged is not None)


def final_text(response: str) -> str:
    """The text of a response's answer, without the wrapping of words in mathematics. AnswerError for several."""
    return unwrapped(read_answer(response).text)


def gold_text(gold: str) -> str:
    """A gold answer as `final_text` reads it, but that all of its lines belong to it. GoldError for several."""
    tagged = answer_text(gold)
    text = gold if tagged is None else tagged
    try:
        boxed = boxed_text(text)
    except AnswerError as error:
        raise GoldError(f"the gold answer {gold[:80]!r}: {error}") from error
    return unwrapped(text if boxed is None else boxed)


def unwrapped(text: str) -> str:
    """A text that stands as a whole in `$…$`, `**…**` or `\\text{…}`, without that."""
    for _ in range(MAX_WRAPPINGS):
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped is None:
            break
        text = next(part for part in wrapped.groups() if part is not None)
    return text.strip()


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def boxed_text(text: str) -> str | None:
    """The content of the last box that is not empty; None without one. AnswerError where others are its alternatives.

    A box that is never closed counts where no other does, to its line's end.
    """
    lone = _LONE_BOX.fullmatch(text)
    if lone is not None and (content := lone[1].strip()):
        return content
    closed, left_open = _boxes(text)
    found = [box for box in closed if box.content.strip()]
    if not found:
        line = "" if left_open is None else text[left_open : left_open + MAX_LINE_CHARS].strip().split("\n", 1)[0]
        return line or None
    last = _squeezed(found[-1].content)
    for before, after in reversed(list(pairwise(found))):
        if not _JOINT.fullmatch(text, before.end, after.start):
            break
        if _squeezed(before.content) != last:
            raise AnswerError(f"several answers: {before.content.strip()[:40]!r} and {after.content.strip()[:40]!r}")
    content = found[-1].content.strip()
    for _ in range(MAX_WRAPPINGS):
        inner = _boxes(content)[0]
        if len(inner) != 1 or inner[0].start or inner[0].end != len(content):
            break
        content = inner[0].content.strip()
    return content


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _boxes(text: str) -> tuple[list[_Box], int | None]:
    """The closed boxes of a text that stand in no other, in order; and where the content of the last unclosed one begins."""
    found: list[_Box] = []
    open_marks: list[tuple[int, int] | None] = []
    first = text.find("box")
    for mark in _BRACE.finditer(text, max(0, first - 2)) if first >= 0 else ():
        if len(mark[0]) > 2:
            open_marks.append((mark.start(), mark.end()))
        elif mark[0] == "{":
            open_marks.append(None)
        elif mark[0] == "}" and open_marks:
            opened = open_marks.pop()
            if opened is not None:
                while found and found[-1].start > opened[0]:
                    found.pop()
                found.append(_Box(opened[0], mark.end(), text[opened[1] : mark.start()]))
    return found, next((opened[1] for opened in reversed(open_marks) if opened is not None), None)


def only_number(text: str) -> float:
    """The one number in a text, in digits or as a word up to twenty, once or repeated. AnswerError for none or several."""
    found = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    found |= {NUMBER_WORDS[word.lower()] for word in _WORD.findall(text)}
    if len(found) != 1 or not math.isfinite(value := next(iter(found))):
        raise AnswerError("no number in the answer" if not found else f"{len(found)} different numbers in the answer")
    return value


def time_span(text: str) -> tuple[float, float]:
    """Two times in seconds, given as seconds or as [hh:]mm:ss, in order. AnswerError where there are not exactly two."""
    found = [_seconds(*parts) for parts in _UNSIGNED.findall(text)]
    if len(found) != 2:
        raise AnswerError(f"{len(found)} times in the answer, not a start and an end")
    if not found[0] <= found[1] < math.inf:
        raise AnswerError("the answer's end lies before its start")
    return found[0], found[1]


def _seconds(first: str, second: str, last: str) -> float:
    hours, minutes = (first, second) if second else ("", first)
    return float(hours or 0) * 3600.0 + float(minutes or 0) * 60.0 + float(last)


def without_fence(text: str) -> str:
    """The text without a code fence and without spaces around it."""
    text = text.strip()
    return _FENCE.sub("", text) if text.startswith("```") else text


def json_value(text: str) -> Any:
    """The JSON value of an answer, with or without a code fence, in double or single quotes. AnswerError where it is none."""
    text = without_fence(text)
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
