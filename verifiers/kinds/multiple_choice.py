"""One letter out of several options. An answer that names more than one option is no answer."""

import re

import msgspec

from verifiers.answers import final_text
from verifiers.registry import AnswerError, Context, GoldError, Outcome, verifier

_WRAPPING = " \t\r\n.,:;()[]{}*\"'$"
# A letter on its own: not part of a word or number, and not the article of a phrase ("A dog"), though "A or B" names both.
_ALONE = re.compile(r"(?<![\w'\\])([A-Z])(?![\w'])(?!(?<=[AI])\s+(?!or\b|and\b|nor\b)[a-z])")
_CLAIMED = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*:?\s*\(?\*{0,2}([A-Za-z])(?![\w'])", re.IGNORECASE)
_LABELLED = re.compile(r"^\(?\*{0,2}([A-Za-z])\*{0,2}[).:]\s")


class MultipleChoiceParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`choices`: the letters on offer."""

    choices: str = "ABCDEFGH"


def chosen_letter(text: str, choices: str) -> str:
    """The one option an answer names; AnswerError for none or several."""
    bare = text.strip(_WRAPPING)
    if len(bare) == 1 and bare.upper() in choices:
        return bare.upper()
    claimed = {letter.upper() for letter in (*_CLAIMED.findall(text), *_LABELLED.findall(text))} & set(choices)
    named = claimed | ({*_ALONE.findall(text)} & set(choices))
    if len(named) != 1:
        raise AnswerError("no option named" if not named else f"{len(named)} options named: {', '.join(sorted(named))}")
    return str(named.pop())


@verifier("multiple_choice")
class MultipleChoice:
    """Accuracy 1 for the gold's letter."""

    is_bounded = True

    def score(self, response: str, gold: str, params: MultipleChoiceParams, context: Context) -> Outcome:
        expected = gold.strip(_WRAPPING).upper()
        if len(expected) != 1 or expected not in params.choices:
            raise GoldError(f"the gold answer {gold[:80]!r} is none of the letters {params.choices}")
        found = chosen_letter(final_text(response), params.choices)
        return Outcome(float(found == expected), reason="" if found == expected else f"chose {found}")
