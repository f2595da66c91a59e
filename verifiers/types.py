"""The reward library's vocabulary: what a sample asks of a verifier, what a verifier answers, and the options of `rewards.*`.

Imported by every other part of the system. No numpy, no numba: it loads in milliseconds.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

Status = Literal["ok", "bad_answer", "fault"]
Frame = Literal["original_px", "resized_px", "norm_1000", "norm_1"]
FoldCase = Literal["labels", "all", "none"]

# What a detection verdict may hold in `components`, in the kernel's order.
DETECTION_SCORES = ("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75")
DETECTION_COMPONENTS = (
    "size_penalty",
    *DETECTION_SCORES,
    *(f"{score}_weighted" for score in DETECTION_SCORES),
    *(
        f"{matching}_{measure}@{percent}"
        for matching in ("label_first", "iou_first")
        for percent in (50, 75, 95, 99)
        for measure in ("iou", "precision", "recall")
    ),
)

Share = Annotated[float, Meta(ge=0, le=1)]
Threshold = Annotated[float, Meta(gt=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=10**9)]

# A pool's defaults, alone and in a run: a worker's address space; the share of faults among a source's latest verdicts that stops it.
MEMORY_GIB = 2.0
MAX_FAULT_RATE = 0.5


class ImageSize(msgspec.Struct, frozen=True, array_like=True):
    """(width, height) of one image of a prompt, px; in JSON [[width, height], [width, height]]."""

    original: tuple[int, int]
    """As the data have it."""
    resized: tuple[int, int]
    """As the model sees it."""


ImageSizes = tuple[ImageSize, ...]
"""Of a prompt's images, in order."""


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

    `ok` and `bad_answer` (the model's fault) carry scores in [0, 1]. `fault` (timeout, crash, bad gold, an exception in a verifier)
    says nothing about the response: its scores are NaN, so that whoever forgets to mask it cannot take it for a zero.
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
    """Options of `rewards.*` outside their range: a line per option, which names it and says what is allowed."""


class IouStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step of Dynamic IoU: `threshold` holds while training progress is at most `until`."""

    until: Threshold
    """Training progress up to which the step holds."""
    threshold: Threshold
    """IoU from which a box counts as found."""


@cache
def _hints(options: type) -> dict[str, Any]:
    return get_type_hints(options, include_extras=True)


class RewardOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything under `rewards.*` that changes a score. One set per process (`verifiers.configure`) or per call.

    A range is part of an option's type. OptionsError for a value outside of it, however the options are made.
    """

    iou_threshold: Threshold | Literal["average", "dynamic"] = "dynamic"
    """IoU from which a box of training counts as found. average: the mean over .50, .55, … .95, .99. dynamic:
    `iou_schedule`, so that early answers earn something and late ones must be exact."""
    iou_schedule: tuple[IouStep, ...] = (IouStep(0.10, 0.85), IouStep(0.25, 0.95), IouStep(1.0, 0.99))
    """Steps of `dynamic` by training progress, `until` rising to 1.0; the default is the paper's (arXiv 2505.18129 §3.3)."""
    evaluation_threshold: Threshold | Literal["average"] = 0.5
    """The threshold wherever progress is None, which means evaluation: it does not move, so that figures of different steps
    compare. What `average` would give is reported beside, as `accuracy@average`."""
    matching: Literal["greedy", "optimal"] = "greedy"
    """How boxes find their golds: `greedy` is the paper's, `optimal` has the maximum total IoU under the same label rules."""
    report: Literal["full", "weighted"] = "full"
    """`full` reports every component, and costs no time that could be measured; `weighted` what the row weighs, IoU at .50 and
    `correct_component`: shorter lines in metrics.jsonl."""
    format: Literal["tags", "tags_with_newlines"] = "tags"
    """`tags` is the paper's Eq. 4; `tags_with_newlines` the release's stricter rule."""
    answer: Literal["last", "paper"] = "last"
    """What of a response mathverify takes for its answer. `last`: after the last `</think>` the last answer tags, else the last box,
    else the last line; gold and answer are read alike. `paper` is the release's rule: math-verify reads the whole response, and finds
    what stands in the reasoning too. Every other verifier reads by `last` in both."""
    fold_case: FoldCase = "labels"
    """Which case does not matter. `labels`: that of labels and words, but not of single letters and LaTeX commands, since Δ is not δ;
    `all`: any, the release's habit; `none`: all case matters."""
    numeric_tolerance: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Relative error up to which mathverify accepts a number; 0 is math-verify's own rule."""
    frame: Frame | Literal["auto"] = "auto"
    """Coordinate frame of predicted boxes where the row names none. `auto`: the one that the model's family answers in; `original_px`
    for the library alone. A response in another frame, order or layout than is asked for is a bad answer."""
    rounding: Literal["half_unit", "none"] = "half_unit"
    """`half_unit`: a whole coordinate within 0.5 of the gold's, in the prediction's frame, counts as the gold's, before any IoU: whole
    units could not say it better, and at .99 a small box would be out of reach. Not for fractions, nor in `norm_1`.
    `none`: as written."""
    python: tuple[Annotated[str, Meta(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """Import paths `module:function` that rows may name under the verifier `python`: data alone can make nothing run."""
    max_response_chars: Count = 65_536
    """A longer response is a bad answer, unparsed."""
    max_boxes: Count = 1_000
    """More predicted boxes than this, and than twice the gold's, are a bad answer: matching takes their number squared."""
    deadline_s: Annotated[float, Meta(gt=0, le=24 * 3600)] = 5.0
    """Seconds one response may take, on each of two attempts."""
    correct_component: str = "label_first_iou@50"
    """The component that decides whether a detection answer counts as correct, since boxes are never quite the gold's."""
    correct_threshold: Share = 0.5
    """The value of `correct_component` from which a detection answer counts as correct."""

    def __post_init__(self) -> None:
        problems = "\n".join(self.problems())
        if problems:
            raise OptionsError(problems)

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, a sentence for each option."""
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            try:
                # As plain values: what is inside a struct that exists already would not be looked at.
                msgspec.convert(msgspec.to_builtins(value), hint)
            except msgspec.ValidationError as error:
                yield f"rewards.{name} is {value!r}: {error}"
        ends = [step.until for step in self.iou_schedule]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1.0:
            yield f"rewards.iou_schedule has `until` {ends}; it must rise and end at 1"
        if self.correct_component not in DETECTION_COMPONENTS:
            yield f"rewards.correct_component is {self.correct_component!r}; it must be one of {', '.join(DETECTION_COMPONENTS)}"

    def threshold_at(self, progress: float | None) -> float | None:
        """The IoU threshold at training progress in [0, 1], or of an evaluation, whose progress is None. The answer None stands for
        the average over the eleven."""
        chosen = self.evaluation_threshold if progress is None else self.iou_threshold
        if chosen == "average":
            return None
        if chosen == "dynamic" and progress is not None:
            return next(step.threshold for step in self.iou_schedule if progress <= step.until or step.until == 1.0)
        return float(chosen)
