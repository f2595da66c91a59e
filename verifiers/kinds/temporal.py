"""Moments in video: intersection over union of two time spans."""

import msgspec

from verifiers.answers import final_text, read_gold, time_span
from verifiers.registry import Context, Outcome, verifier


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
        expected = read_gold(time_span, gold, "time span")
        overlap = span_iou(time_span(final_text(response)), expected)
        accuracy = overlap if params.threshold is None else float(overlap >= params.threshold)
        return Outcome(accuracy, {"iou": overlap})
