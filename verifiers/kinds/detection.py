"""Detection and grounding: boxes out of the answer, all scores out of one kernel call per batch.

The row's `det_reward_ratio` weighs five scores: the two matchings (label-first, IoU-first) and map, map50, map75.
Dynamic IoU chooses the threshold of the matchings by training progress.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from verifiers.kinds.boxes import Answer, GoldBoxes, Layout, from_xyxy, gold_boxes, parse_boxes
from verifiers.kinds.coordinate_frames import FramedParams, Size, contradiction, frame_in_force
from verifiers.kinds.exact_answers import words
from verifiers.registry import Context, GoldError, Outcome, SpecError, Task, verifier
from verifiers.tags import CLOSE, OPEN, answer_text, conclusion
from verifiers.types import DETECTION_COMPONENTS, DETECTION_SCORES, FoldCase, Frame, ImageSizes, RewardOptions

if TYPE_CHECKING:
    from verifiers.kernels.detection_scores import Side

# Samples per kernel call: enough to make its overhead nothing, few enough to stay in cache.
CHUNK = 256
# The accuracy that the average over the eleven thresholds would give: every outcome of an evaluation has it.
AVERAGE = "accuracy@average"
NO_ANSWER = "no answer tags"
FOREIGN_KEYS = ("box_2d", "bbox", "box", "point_2d")
NO_BOX = "no box could be read from the answer"
# Half a unit, and what dividing by a scale may round.
HALF_UNIT = 0.5 + 1e-9


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`det_reward_ratio`: weights in [0, 1]; null means 0. `iou_completeness`: completeness' share c in a matching's score."""

    iou_max_label_first: float | None = None
    iou_max_iou_first: float | None = None
    iou_completeness: float | None = None
    map: float | None = None
    map50: float | None = None
    map75: float | None = None


DEFAULT_WEIGHTS = Weights(iou_max_label_first=1.0, iou_completeness=0.3)


class DetectionParams(FramedParams, frozen=True):
    """`det_verifier_normalized`, as in the released data: where the row names no frames, the gold's is `norm_1000` and the
    predictions' `resized_px`. `layout` and `gold_layout`: what the four numbers of a box are, in answers and in the gold."""

    det_reward_ratio: Weights = Weights()
    det_verifier_normalized: bool = False
    layout: Layout = "xyxy"
    gold_layout: Layout = "xyxy"


def weight_row(weights: Weights) -> tuple[float, ...]:
    """The six weights in the kernel's order; `DEFAULT_WEIGHTS` where none is given. SpecError where one is outside [0, 1] or those of
    the five scores sum to 0."""
    if weights == Weights():
        weights = DEFAULT_WEIGHTS
    row = tuple(float(getattr(weights, name) or 0.0) for name in (*DETECTION_SCORES, "iou_completeness"))
    if not all(0.0 <= value <= 1.0 for value in row):
        raise SpecError(f"det_reward_ratio has a weight outside [0, 1]: {msgspec.to_builtins(weights)}")
    if sum(row[:5]) == 0.0:
        raise SpecError(f"det_reward_ratio: the weights of {', '.join(DETECTION_SCORES)} sum to 0: nothing is rewarded")
    return row


class _Prepared(NamedTuple):
    """What a row's parameters say, with the options and image sizes in force."""

    weights: tuple[float, ...]
    frame: Frame
    """The predictions'."""
    scale: Size
    """From there to the gold's."""
    is_rounded: bool
    """Whether whole coordinates count as the gold's half a unit away."""


@lru_cache(maxsize=4_096)
def _prepared(params: DetectionParams, frame: Frame, rounding: str, sizes: ImageSizes) -> _Prepared:
    predicted: Frame = "resized_px" if params.det_verifier_normalized else frame
    scale = params.scale(predicted, "norm_1000" if params.det_verifier_normalized else "original_px", sizes)
    predicted = params.frame or predicted
    is_rounded = rounding == "half_unit" and predicted != "norm_1"
    return _Prepared(weight_row(params.det_reward_ratio), predicted, scale, is_rounded)


def _prepare(params: DetectionParams, context: Context) -> _Prepared:
    return _prepared(params, frame_in_force(context), context.options.rounding, context.image_sizes)


class _Batch:
    """What the kernel takes, under construction: one entry per sample that has boxes to compare. A side's lists are the kernel's."""

    def __init__(self, fold_case: FoldCase) -> None:
        self.indices: list[int] = []
        self.weights: list[tuple[float, ...]] = []
        self._scales: list[tuple[float, float, float]] = []
        self._predicted: Side = ([], [], [0])
        self._gold: Side = ([], [], [0])
        self._fold_case = fold_case
        self._classes: dict[str, int] = {}
        self._plain: dict[str, int] = {}

    def add(self, index: int, answer: Answer, gold: GoldBoxes, prepared: _Prepared) -> None:
        coordinates, labels, ends = self._predicted
        for box in answer.boxes:
            coordinates += box.bbox_2d
            labels.append(self._class_id(box.label))
        ends.append(len(labels))
        coordinates, labels, ends = self._gold
        coordinates += gold.coordinates
        labels += [self._class_id(label) for label in gold.labels]
        ends.append(len(labels))
        # Between whole numbers of one frame there is no half unit.
        is_snapped = prepared.is_rounded and not (gold.is_whole and prepared.scale == (1.0, 1.0))
        self._scales.append((*prepared.scale, HALF_UNIT if is_snapped else 0.0))
        self.weights.append(prepared.weights)
        self.indices.append(index)

    def _class_id(self, label: str) -> int:
        """Equal numbers for labels that are the same words."""
        known = self._classes.get(label)
        if known is None:
            plain = words(label, self._fold_case)
            known = self._classes[label] = self._plain.setdefault(plain, len(self._plain))
        return known

    def run(self, options: RewardOptions, progress: float | None) -> list[list[float]]:
        """Rows of accuracy and DETECTION_COMPONENTS, one per added sample."""
        # The kernel's module brings numba; importing it here keeps `import verifiers` fast.
        from verifiers.kernels.detection_scores import run_kernel

        if options.report == "weighted":
            is_computed = (options.correct_component in _weighted_columns(weights) for weights in self.weights)
            options = options if all(is_computed) else replace(options, report="full")
        return run_kernel(self._predicted, self._gold, self._scales, self.weights, options, progress)


@lru_cache(maxsize=256)
def _weighted_columns(weights: tuple[float, ...]) -> dict[str, int]:
    """What the kernel computes under `report: weighted`, by name: the penalty, the weighed scores, IoU at .50 of a weighed matching."""
    kept = ["size_penalty"]
    for score, weight in zip(DETECTION_SCORES, weights, strict=False):
        kept += [score, f"{score}_weighted"] if weight > 0.0 else []
    for matching, weight in zip(("label_first", "iou_first"), weights[:2], strict=True):
        kept += [f"{matching}_{measure}@50" for measure in ("iou", "precision", "recall")] if weight > 0.0 else []
    return {name: 1 + DETECTION_COMPONENTS.index(name) for name in kept}


def _components(row: list[float], weights: tuple[float, ...], options: RewardOptions) -> dict[str, float]:
    """What is reported of a row of the kernel, which holds the accuracy and then DETECTION_COMPONENTS."""
    if options.report == "full":
        return dict(zip(DETECTION_COMPONENTS, row[1:], strict=True))
    components = {name: row[column] for name, column in _weighted_columns(weights).items()}
    decisive = options.correct_component
    return {**components, decisive: row[1 + DETECTION_COMPONENTS.index(decisive)]}


def _with_average(
    results: list[Outcome | Exception], batch: _Batch, options: RewardOptions
) -> list[Outcome | Exception]:
    """An evaluation's results with AVERAGE beside. What has no boxes to compare scores the same at any threshold."""
    at_average = replace(options, evaluation_threshold="average", report="weighted")
    rows = batch.run(at_average, None) if batch.indices else []
    averages = {index: row[0] for index, row in zip(batch.indices, rows, strict=True)}
    return [
        result
        if isinstance(result, Exception)
        else replace(result, components={**result.components, AVERAGE: averages.get(index, result.accuracy)})
        for index, result in enumerate(results)
    ]


def _empty_gold(answer: Answer, are_tags_single: bool) -> Outcome:
    """A gold answer without boxes is met by a literal `[]` and nothing else."""
    right = float(answer.is_empty_list)
    components = {"size_penalty": 0.6 ** min(len(answer.boxes), 1_000)}
    if answer.boxes:
        reason = f"{len(answer.boxes)} boxes where there is nothing to find"
        return Outcome(0.0, components, float(are_tags_single), "ok", reason)
    return Outcome(right, components, right * are_tags_single, "ok" if right else "bad_answer", "" if right else NO_BOX)


@verifier("detection")
class Detection:
    """The detection verifier; vectorised over a batch whose samples share options and progress."""

    is_bounded = True

    def score(self, response: str, gold: str, params: DetectionParams, context: Context) -> Outcome:
        result = self.score_batch([Task(response, gold, params, context)])[0]
        if isinstance(result, Exception):
            raise result
        return result

    def score_batch(self, tasks: Sequence[Task]) -> list[Outcome | Exception]:
        chunks = (tasks[first : first + CHUNK] for first in range(0, len(tasks), CHUNK))
        return [result for chunk in chunks for result in self._score_chunk(chunk)]

    def _score_chunk(self, tasks: Sequence[Task]) -> list[Outcome | Exception]:
        results: list[Outcome | Exception] = []
        options, progress = tasks[0].context.options, tasks[0].context.progress
        batch = _Batch(options.fold_case)
        for task in tasks:
            try:
                results.append(self._prepare(task, batch, len(results)))
            except (GoldError, SpecError) as error:
                results.append(error)
        rows = batch.run(options, progress) if batch.indices else []
        for index, row, weights in zip(batch.indices, rows, batch.weights, strict=True):
            read = results[index]
            assert isinstance(read, Outcome)
            components = _components(row, weights, options)
            results[index] = Outcome(row[0], components, read.format, read.status, read.reason)
        return results if progress is not None else _with_average(results, batch, options)

    def _prepare(self, task: Task, batch: _Batch, index: int) -> Outcome:
        """The outcome as far as text alone decides it; samples with gold boxes join the batch, which supplies their scores."""
        options, params = task.context.options, task.params
        prepared = _prepare(params, task.context)
        gold = gold_boxes(task.gold, params.gold_layout)
        text = answer_text(conclusion(task.response) if options.answer == "last" else task.response)
        answer = Answer([]) if text is None else parse_boxes(text, params.layout)
        num_boxes = len(answer.boxes)
        are_tags_single = task.response.count(OPEN) == task.response.count(CLOSE) == 1
        if not gold.labels:
            return _empty_gold(answer, are_tags_single)
        limit = max(options.max_boxes, 2 * len(gold.labels))
        if num_boxes > limit:
            return Outcome(0.0, {}, 0.0, "bad_answer", f"{num_boxes} boxes, more than rewards.max_boxes = {limit}")
        reason = contradiction(prepared.frame, answer.boxes)
        if reason:
            answer = Answer([])
        batch.add(index, answer, gold, prepared)
        if not answer.boxes:
            return Outcome(0.0, {}, 0.0, "bad_answer", reason or _no_box(text, answer, params.layout))
        return Outcome(0.0, {}, float(are_tags_single))

    def gold_response(self, gold: str, params: DetectionParams, context: Context) -> str:
        """The gold's boxes as a model should write them: in the frame and layout asked for, whole where those may be rounded."""
        boxes, prepared = gold_boxes(gold, params.gold_layout), _prepare(params, context)
        values = [value / prepared.scale[k % 2] for k, value in enumerate(boxes.coordinates)]
        if prepared.is_rounded:
            values = [float(round(value)) for value in values]
        items = []
        for i, label in enumerate(boxes.labels):
            x1, y1, x2, y2 = values[4 * i : 4 * i + 4]
            items.append({"bbox_2d": from_xyxy((x1, y1, x2, y2), params.layout), "label": label})
        return msgspec.json.encode(items).decode()

    def check(self, gold: str, params: DetectionParams, context: Context) -> str | None:
        """What is wrong with the row, apart from its gold answer."""
        _prepare(params, context)
        return None


def _no_box(text: str | None, answer: Answer, layout: Layout) -> str:
    """Why an answer has no boxes."""
    if text is None:
        return NO_ANSWER
    if answer.num_inverted:
        return f"the end of all {answer.num_inverted} boxes lies before their start: the layout asked for is {layout}"
    other = next((key for key in FOREIGN_KEYS if f'"{key}"' in text or f"'{key}'" in text), None)
    return (
        NO_BOX
        if other is None
        else f"boxes under {other!r}, whose order is another's: 'bbox_2d' is asked for, as {layout}"
    )
