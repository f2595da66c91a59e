"""Exact answers as people read them: which expression of a text is the answer, and what needs no algebra to judge.

Used by mathverify under `rewards.answer: last`; gold and answer are read alike. What is undecided here goes to math-verify, as two
boxes.
"""

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache

from verifiers.answers import NUMBER_WORDS, Reading, gold_text, read_answer, unwrapped
from verifiers.registry import AnswerError, GoldError
from verifiers.types import FoldCase

# No exact answer is as long: what is longer is not read, which bounds the work and the caches.
MAX_CHARS = 2_048
_DELIMITER = re.compile(r"\$\$?|\\[()\[\]]")
_CLOSING = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_JOINED = re.compile(r"\s*(?:,|;)?\s*(?:or|and)?\s*", re.IGNORECASE)
_DIGITS = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(rf"{_DIGITS}|[-+]?\.\d+", re.ASCII)
_IN_PROSE = re.compile(rf"(?<![\w.{{^/]){_DIGITS}(?:\s?\\?%)?(?![\w}}^/]|\.\d)", re.ASCII)
_SCIENTIFIC = re.compile(r"([-+]?\d{1,15}(?:\.\d{1,15})?)[eE]([-+]?\d{1,2})", re.ASCII)
_MIXED = re.compile(r"(-?)(\d{1,9}) (\d{1,9}/\d{1,9})", re.ASCII)
# 12:30 and 555-1234 are no ratio and no difference.
_LITERAL = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?|(?:\d{3,}-)+\d{3,}", re.ASCII)
_WORD = re.compile(r"[^\W\d_]{2,}|[^\W\d_a-zA-Z]")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_ESCAPED = re.compile(r"\\([%&$#_])")
_BARE_BRACE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+\{")
_LEADING = re.compile(r"(?:\\(?:approx|sim|thickapprox)(?![a-zA-Z])|≈|~|\\?\$(?=\s*[\d.]))\s*")
_DEGREES = re.compile(r"(.*\S)\s*(?:°|\^\s*\{?\s*\\circ\s*\}?)", re.DOTALL)
_LINE_UNIT = re.compile(r"(.*[\d})])\s*\\(?:text|textrm|mathrm)\s*\{([^{}]*)\}((?:\^\{?-?\d\}?)?)", re.DOTALL)
_PLAIN_UNIT = re.compile(
    rf"({_DIGITS})(?:\s|\\[ ,;])*([a-zA-ZµμΩ]{{1,20}}(?:/[a-zA-Z]{{1,20}})?(?:²|³|\^\{{?-?\d\}}?)?)", re.ASCII
)
# Letters that stand for a unit directly after a number, and such as do only apart from it.
_JOINED_UNIT = re.compile(r"[nmcdk]?m|ft|mi|yd|[mk]?g|lb|oz|ms|min|hr|m[lL]|kWh?|[kMG]?Hz|kJ|kPa|mph|px")
_ALONE_UNIT = re.compile(r"[mgshLlNJWVAKCF]")


def expression_of(response: str, gold: str = "") -> str:
    """The response's answer as it would stand in a box; a sentence that is the gold's stays one. AnswerError for none, or several."""
    read = read_answer(response)
    text = read.text if read.is_boxed else _unboxed(read, gold)
    if len(text) > MAX_CHARS:
        raise AnswerError(f"an answer of {len(text)} characters, and no exact one has over {MAX_CHARS}")
    if not text or not any(character.isalnum() for character in text):
        raise AnswerError("the answer is empty")
    return text


def _unboxed(read: Reading, gold: str) -> str:
    """The answer of a text without a box: its LaTeX, else the text itself, or the one number in a sentence."""
    text = read.text.strip().strip("*`").strip()
    formulas, rest = _formulas(text)
    numbers = dict.fromkeys(_IN_PROSE.findall(" ".join(rest)))
    if formulas:
        if not read.is_marked and len({*formulas, *numbers}) != 1:
            raise AnswerError(f"the last line holds {len({*formulas, *numbers})} answers")
        if formulas[-1] != formulas[-2:][0] and _JOINED.fullmatch(rest[-2]):
            raise AnswerError(f"several answers: {formulas[-2][:40]!r} and {formulas[-1][:40]!r}")
        return formulas[-1]
    if _BARE_BRACE.search(text):
        raise AnswerError("no answer tags, box, number or word")
    bare = text.rstrip(".。")
    is_sentence = len(_WORD.findall(_TEXT.sub("", bare))) > 1 and "\\" not in bare
    if not is_sentence or words(bare, "all") == words(gold, "all"):
        return bare
    if len(numbers) == 1:
        return str(next(iter(numbers)))
    if numbers and not read.is_marked:
        raise AnswerError(f"the last line holds {len(numbers)} numbers")
    return bare


def _formulas(text: str) -> tuple[list[str], list[str]]:
    """The mathematics that a text marks as such, and the N + 1 pieces of prose around it."""
    formulas: list[str] = []
    rest, opened, prose_from = [], None, 0
    for mark in _DELIMITER.finditer(text):
        if opened is not None and mark[0] == _CLOSING[opened[0]]:
            content = text[opened.end() : mark.start()].strip()
            if content:
                formulas.append(content)
                rest.append(text[prose_from : opened.start()])
                prose_from = mark.end()
            opened = None
        elif mark[0] in _CLOSING and opened is None:
            opened = mark
    return formulas, [*rest, text[prose_from:]]


@lru_cache(maxsize=16_384)
def gold_expression(gold: str) -> str:
    """A gold answer as it would stand in a box. GoldError where it holds none, or several."""
    text = gold_text(gold).strip()
    if not any(character.isalnum() for character in text):
        raise GoldError(f"the gold answer {gold[:80]!r} holds no answer")
    return text


def decide(gold: str, answer: str, fold: FoldCase) -> bool | None:
    """The verdict on two expressions where it takes no algebra, else None."""
    if gold == answer:
        return True if not _is_suspect(gold) else None
    if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer):
        return _value(gold) == _value(answer)
    gold, answer = plain(gold), plain(answer)
    gold_words, answer_words = words(gold, fold), words(answer, fold)
    if gold_words == answer_words:
        return True
    if _LITERAL.fullmatch(gold) or _LITERAL.fullmatch(answer):
        return False
    if is_words(gold) and is_words(answer) and not (unit_of(gold)[1] or unit_of(answer)[1]):
        return False
    (gold, gold_unit), (answer, answer_unit) = unit_of(gold), unit_of(answer)
    if gold_unit and answer_unit and _unit_key(gold_unit) != _unit_key(answer_unit):
        return False
    if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer):
        return _value(gold) == _value(answer)
    if fold != "all" and gold != answer and gold.casefold() == answer.casefold():
        return False
    sides = answer.split("=")
    if len(sides) > 1 and all(_NUMBER.fullmatch(side.strip()) for side in sides):
        values = {_value(side) for side in sides}
        return values == {_value(gold)} if _NUMBER.fullmatch(gold) else None
    return None


def for_algebra(expression: str) -> str:
    """An expression as math-verify is to read it: boxed, without unit."""
    return f"\\boxed{{{unit_of(plain(expression))[0]}}}"


def _is_suspect(text: str) -> bool:
    """Whether equal texts may still be no answer: LaTeX without content, like an empty fraction."""
    return not any(character.isalnum() for character in re.sub(r"\\[a-zA-Z]+", "", text))


def _value(number: str) -> Decimal:
    return Decimal(number.strip().replace(",", ""))


@lru_cache(maxsize=4_096)
def plain(text: str) -> str:
    """An expression without dressing: compatibility forms, `\\text`, a leading ≈ or currency, number words and notations resolved."""
    text = unwrapped(unicodedata.normalize("NFKC", text).replace("−", "-").replace("’", "'"))
    text = _LEADING.sub("", text, count=1) if _LEADING.match(text) else text
    named = NUMBER_WORDS.get(text.lower().rstrip("."))
    if named is not None:
        return f"{named:g}"
    if (scientific := _SCIENTIFIC.fullmatch(text)) is not None:
        return f"{Decimal(scientific[1]).scaleb(int(scientific[2])):f}"
    if (mixed := _MIXED.fullmatch(text)) is not None:
        return f"{mixed[1]}({mixed[2]}+{mixed[3]})"
    return text


@lru_cache(maxsize=4_096)
def words(text: str, fold: FoldCase) -> str:
    """What two texts that are the same words have in common: spaces, case as `fold` says, a trailing stop and escapes left out."""
    text = " ".join(_ESCAPED.sub(r"\1", _TEXT.sub(r"\1", text)).split()).rstrip(".。")
    if fold == "none" or "\\" in text:
        return text
    return text if fold == "labels" and len(text) == 1 else text.casefold()


def is_words(text: str) -> bool:
    """Whether a text is to be read rather than computed."""
    bare = _ESCAPED.sub(r"\1", _TEXT.sub(r"\1", text))
    return not any(mark in bare for mark in "\\=^") and _WORD.search(bare) is not None


@lru_cache(maxsize=4_096)
def unit_of(text: str) -> tuple[str, str]:
    """An expression without its unit, and the unit; empty where it has none."""
    turned = _DEGREES.fullmatch(text)
    if turned is not None:
        return turned[1], "°"
    marked = _LINE_UNIT.fullmatch(text)
    if marked is not None:
        return marked[1].rstrip(" \\,;"), marked[2].strip() + marked[3]
    found = _PLAIN_UNIT.fullmatch(text)
    if found is None:
        return text, ""
    number, unit = found.groups()
    letters = unit.rstrip("²³0123456789^{}-")
    is_apart = len(number) < len(text) - len(unit)
    if is_apart and (len(letters) > 2 or _ALONE_UNIT.fullmatch(letters)):
        return number, unit
    if len(letters) > 1 and ("/" in letters or _JOINED_UNIT.fullmatch(letters)):
        return number, unit
    return text, ""


def _unit_key(unit: str) -> str:
    plural = unit.replace("²", "^2").replace("³", "^3").replace("{", "").replace("}", "").strip()
    return plural[:-1].casefold() if len(plural) > 3 and plural.endswith("s") else plural
