"""Structured answers: a JSON object whose fields are compared one by one."""

from typing import Any, Literal

import msgspec

from verifiers.answers import final_text, json_value
from verifiers.registry import AnswerError, Context, GoldError, Outcome, verifier


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one field is compared: `exact`, as a `number` up to a relative tolerance, or as `text` by edit distance."""

    kind: Literal["exact", "number", "text"] = "exact"
    weight: float = 1.0
    tolerance: float = 0.0


class JsonFieldsParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`fields`: those not compared exactly with weight 1. A field that the gold does not have costs as much as a wrong one."""

    fields: dict[str, Field] = {}
    allow_extra: bool = False


def field_score(found: Any, expected: Any, field: Field) -> float:
    """How well one field's value matches, in [0, 1]."""
    if field.kind == "number":
        try:
            return float(abs(float(found) - float(expected)) <= field.tolerance * abs(float(expected)))
        except (TypeError, ValueError, OverflowError):
            return 0.0
    if field.kind == "text":
        # rapidfuzz is needed here only.
        from rapidfuzz.distance import Levenshtein

        return float(Levenshtein.normalized_similarity(str(found).strip().lower(), str(expected).strip().lower()))
    # 1 and true are equal in Python and different in JSON.
    return float(found == expected and isinstance(found, bool) == isinstance(expected, bool))


@verifier("json_fields")
class JsonFields:
    """Accuracy: the weighted share of fields that match."""

    is_bounded = True

    def score(self, response: str, gold: str, params: JsonFieldsParams, context: Context) -> Outcome:
        expected = self._gold(gold, params)
        found = json_value(final_text(response))
        if not isinstance(found, dict):
            raise AnswerError("the answer is no JSON object")
        total, earned = 0.0, 0.0
        components = {}
        for name, value in expected.items():
            field = params.fields.get(name, Field())
            score = field_score(found[name], value, field) if name in found else 0.0
            components[f"field/{name}"] = score
            earned += field.weight * score
            total += field.weight
        num_extra = 0 if params.allow_extra else len(found.keys() - expected.keys())
        components["num_extra"] = float(num_extra)
        return Outcome(earned / (total * (1.0 + num_extra / len(expected))), components)

    def _gold(self, gold: str, params: JsonFieldsParams) -> dict[str, Any]:
        try:
            expected = msgspec.json.decode(gold, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise GoldError(f"the gold answer is no JSON object: {error}") from error
        if not sum(params.fields.get(name, Field()).weight for name in expected) > 0.0:
            raise GoldError("the gold answer has no field with a positive weight")
        return expected
