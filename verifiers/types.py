"""The reward library's vocabulary: what a sample asks of a verifier, what a verifier answers, and the options of
`rewards.*`.

Imported by every other part of the system. No numpy, no numba: it loads in milliseconds.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

Status = Literal["ok", "bad_answer", "fault"]
Frame = Literal["original_px", "resized_px", "norm_1000", "norm_1"]

# (progress, threshold): the first pair whose progress is not yet passed gives the threshold (Dynamic IoU, arXiv
# 2505.18129 §3.3).
PAPER_SCHEDULE: tuple[tuple[float, float], ...] = ((0.10, 0.85), (0.25, 0.95), (1.0, 0.99))


class RewardSpec(msgspec.Struct, frozen=True):
    """One sample's reward set-up: the row's `reward_model`.

    `ground_truth` is the gold answer; where it is empty, `answer` is. `verifier_parm` holds the verifier's parameters
    as the row has them; a null value counts as absent.
    """

    answer: str = ""
    ground_truth: str = ""
    accuracy_ratio: float = 1.0
    format_ratio: float = 0.1
    verifier: str = "mathverify"
    verifier_parm: dict[str, Any] | None = None

    @property
    def gold(self) -> str:
        return self.ground_truth or self.answer


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """A verifier's answer on one response.

    `ok` and `bad_answer` (the model's fault) carry scores in [0, 1]. `fault` (timeout, crash, bad gold, an exception in
    a verifier) says nothing about the response: its scores are NaN, so that whoever forgets to mask it cannot take it
    for a zero.
    """

    status: Status
    reward: float
    accuracy: float
    format: float
    components: dict[str, float]
    reason: str


def fault(reason: str) -> Verdict:
    """The verdict of a verifier that could not judge."""
    return Verdict("fault", math.nan, math.nan, math.nan, {}, reason)


class OptionsError(ValueError):
    """An option of `rewards.*` is outside its range; the message names it and what is allowed."""


class RewardOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything under `rewards.*` that changes a score. One set per process (`verifiers.configure`) or per call.

    iou_threshold       a number, `average` (mean over .50, .55, … .95, .99) or `dynamic` (iou_schedule, by training
    progress)
    iou_schedule        pairs (progress, threshold), progress rising to 1.0
    matching            `greedy` (the paper's) or `optimal` (maximum total IoU, same label rules)
    report              `full` computes every component; `weighted` only what the row weighs, plus IoU at .50
    format              `tags` (paper Eq. 4) or `tags_with_newlines` (the release's stricter rule)
    fold_case           compare answers and labels in lower case; without it math-verify still reads most letters so
    numeric_tolerance   relative error up to which mathverify accepts a number; 0 is math-verify's own rule
    frame               coordinate frame of predicted boxes where the row names none
    python_allow        import paths `module:function` that rows may name under the verifier `python`
    max_response_chars  a longer response is a bad answer, unparsed
    max_boxes           more predicted boxes than this (and than twice the gold's) are a bad answer
    deadline_s          seconds one response may take
    correct_component   the component that decides whether a detection answer counts as correct in the metrics,
    correct_threshold   and the value from which it does
    """

    iou_threshold: float | Literal["average", "dynamic"] = "dynamic"
    iou_schedule: tuple[tuple[float, float], ...] = PAPER_SCHEDULE
    matching: Literal["greedy", "optimal"] = "greedy"
    report: Literal["full", "weighted"] = "full"
    format: Literal["tags", "tags_with_newlines"] = "tags"
    fold_case: bool = False
    numeric_tolerance: float = 0.0
    frame: Frame = "original_px"
    python_allow: tuple[str, ...] = ()
    max_response_chars: int = 65_536
    max_boxes: int = 1_000
    deadline_s: float = 5.0
    correct_component: str = "label_first_iou@50"
    correct_threshold: float = 0.5

    def __post_init__(self) -> None:
        threshold = self.iou_threshold
        if not isinstance(threshold, str) and not 0.0 < threshold <= 1.0:
            raise OptionsError(f"rewards.iou_threshold is {threshold}; it must be in (0, 1], or 'average' or 'dynamic'")
        progress = [step for step, _ in self.iou_schedule]
        if not progress or progress != sorted(set(progress)) or progress[-1] != 1.0:
            raise OptionsError(f"rewards.iou_schedule has progress {progress}; it must rise and end at 1.0")
        if any(not 0.0 < value <= 1.0 for _, value in self.iou_schedule):
            raise OptionsError("rewards.iou_schedule holds a threshold outside (0, 1]")
        if not 0.0 <= self.numeric_tolerance < 1.0:
            raise OptionsError(f"rewards.numeric_tolerance is {self.numeric_tolerance}; it must be in [0, 1)")
        for name in ("max_response_chars", "max_boxes", "deadline_s"):
            if getattr(self, name) <= 0:
                raise OptionsError(f"rewards.{name} is {getattr(self, name)}; it must be positive")

    def for_evaluation(self) -> RewardOptions:
        """The same options with a threshold that does not move: figures of different steps then compare."""
        return msgspec.structs.replace(self, iou_threshold="average") if self.iou_threshold == "dynamic" else self

    def threshold_at(self, progress: float) -> float | None:
        """The IoU threshold at training progress in [0, 1]; None stands for the average over the eleven."""
        if self.iou_threshold == "average":
            return None
        if self.iou_threshold == "dynamic":
            return next((value for step, value in self.iou_schedule if progress <= step), self.iou_schedule[-1][1])
        return float(self.iou_threshold)
