"""Moments in video: intersection over union of two time spans."""

from __future__ import annotations

import msgspec

from verifiers.answers import AnswerError, final_text, time_span
from verifiers.registry import Context, GoldError, Outcome, verifier


class TemporalParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With `threshold` the accuracy is 1 from that IoU on and 0 below; without, it is the IoU."""

    threshold: float | None = None


def span_iou(a_s: tuple[float, float], b_s: tuple[float, float]) -> float:
    """IoU of two spans (start, end) in seconds; two equal instants have IoU 1."""
    shared = min(a_s[1], b_s[1]) - max(a_s[0], b_s[0])
    union = (a_s[1] - a_s[0]) + (b_s[1] - b_s[0]) - max(shared, 0.0)
    return float(a_s == b_s) if union <= 0.0 else max(shared, 0.0) / union


@verifier("temporal")
class Temporal:
    """Accuracy of one predicted span."""

    is_bounded = True

    def score(self, response: str, gold: str, params: TemporalParams, context: Context) -> Outcome:
        try:
            expected = time_span(gold)
        except AnswerError as error:
            raise GoldError(f"the gold answer {gold[:80]!r} is no time span: {error}") from error
        try:
            overlap = span_iou(time_span(final_text(response)), expected)
        except AnswerError as error:
            return Outcome(0.0, status="bad_answer", reason=str(error))
        accuracy = overlap if params.threshold is None else float(overlap >= params.threshold)
        return Outcome(accuracy, {"iou": overlap})
