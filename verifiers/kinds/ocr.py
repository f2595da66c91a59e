"""Text read from an image, judged by edit distance: ANLS (Biten et al. 2019) or plain normalised similarity."""

import unicodedata
from typing import Literal

import msgspec

from verifiers.answers import final_text, gold_text
from verifiers.registry import Context, GoldError, Outcome, verifier


class OcrParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`anls` is 0 where the normalised distance reaches `threshold`; `similarity` is 1 − distance throughout."""

    metric: Literal["anls", "similarity"] = "anls"
    threshold: float = 0.5
    is_case_sensitive: bool = False


def _normal(text: str, is_case_sensitive: bool) -> str:
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    return text if is_case_sensitive else text.lower()


def gold_texts(gold: str) -> list[str]:
    """The accepted texts: a JSON list of strings, or the gold answer itself. GoldError where all are empty."""
    try:
        texts = msgspec.json.decode(gold, type=list[str])
    except msgspec.DecodeError:
        texts = [gold_text(gold)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise GoldError("the gold answer holds no text")
    return texts


@verifier("ocr")
class Ocr:
    """Accuracy: the best of the accepted texts' scores."""

    is_bounded = True

    def score(self, response: str, gold: str, params: OcrParams, context: Context) -> Outcome:
        # rapidfuzz is needed here only.
        from rapidfuzz.distance import Levenshtein

        found = _normal(final_text(response), params.is_case_sensitive)
        distance = min(
            Levenshtein.normalized_distance(found, _normal(text, params.is_case_sensitive)) for text in gold_texts(gold)
        )
        anls = 1.0 - distance if distance < params.threshold else 0.0
        components = {"anls": anls, "similarity": 1.0 - distance, "exact": float(distance == 0.0)}
        if not found:
            return Outcome(0.0, components, status="bad_answer", reason="the answer is empty")
        return Outcome(components[params.metric], components)

    def gold_response(self, gold: str, params: OcrParams, context: Context) -> str:
        """The first accepted text."""
        return gold_texts(gold)[0]
