"""How many there are: exactly right, or by relative error."""

from typing import Literal

import msgspec

from verifiers.answers import final_text, only_number, read_gold
from verifiers.registry import Context, Outcome, verifier


class CountingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`exact`: 1 or 0. `relative`: 1 − |found − gold| / max(gold, 1), not below 0."""

    mode: Literal["exact", "relative"] = "exact"


@verifier("counting")
class Counting:
    """Accuracy of the one number in the answer."""

    is_bounded = True

    def score(self, response: str, gold: str, params: CountingParams, context: Context) -> Outcome:
        expected = read_gold(only_number, final_text(gold), "count")
        found = only_number(final_text(response))
        closeness = max(0.0, 1.0 - abs(found - expected) / max(abs(expected), 1.0))
        components = {"exact": float(found == expected), "relative": closeness}
        return Outcome(components[params.mode], components)
