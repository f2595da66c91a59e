"""How many there are: exactly right, or by relative error."""

from __future__ import annotations

from typing import Literal

import msgspec

from verifiers.answers import AnswerError, final_text, only_number
from verifiers.registry import Context, GoldError, Outcome, verifier


class CountingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`exact`: 1 or 0. `relative`: 1 − |found − gold| / max(gold, 1), not below 0."""

    mode: Literal["exact", "relative"] = "exact"


@verifier("counting")
class Counting:
    """Accuracy of the one number in the answer."""

    is_bounded = True

    def score(self, response: str, gold: str, params: CountingParams, context: Context) -> Outcome:
        try:
            expected = only_number(final_text(gold))
        except AnswerError as error:
            raise GoldError(f"the gold answer {gold[:80]!r} is no count: {error}") from error
        try:
            found = only_number(final_text(response))
        except AnswerError as error:
            return Outcome(0.0, status="bad_answer", reason=str(error))
        closeness = max(0.0, 1.0 - abs(found - expected) / max(abs(expected), 1.0))
        components = {"exact": float(found == expected), "relative": closeness}
        return Outcome(components[params.mode], components)
