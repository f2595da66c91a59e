"""Detection and grounding: boxes out of the answer, all scores out of one kernel call per batch.

The row's `det_reward_ratio` weighs five scores: the two matchings (label-first, IoU-first) and map, map50, map75.
Dynamic IoU chooses the threshold of the matchings by training progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec

from verifiers.boxes import Answer, GoldBoxes, answer_text, gold_boxes, parse_boxes
from verifiers.frames import FrameError, scale_between
from verifiers.registry import Context, GoldError, Outcome, SpecError, Task, verifier
from verifiers.types import Frame, RewardOptions

REPORTED_PERCENT = (50, 75, 95, 99)
SCORES = ("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75")
_MEASURES = ("iou", "precision", "recall")
COLUMNS = (
    "accuracy",
    "size_penalty",
    *SCORES,
    *(f"{score}_weighted" for score in SCORES),
    *(
        f"{m}_{name}@{percent}"
        for m in ("label_first", "iou_first")
        for percent in REPORTED_PERCENT
        for name in _MEASURES
    ),
)
# Samples per kernel call: enough to make its overhead nothing, few enough to stay in cache.
CHUNK = 256
NO_ANSWER = "no answer tags"
NO_BOX = "no box could be read from the answer"


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`det_reward_ratio`: weights in [0, 1]; null means 0. `iou_completeness` is c, the share of completeness in a
    matching's score.
    """

    iou_max_label_first: float | None = None
    iou_max_iou_first: float | None = None
    iou_completeness: float | None = None
    map: float | None = None
    map50: float | None = None
    map75: float | None = None


class DetectionParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a detection row.

    `frame` is the frame of predicted boxes, `gold_frame` that of the gold's. `det_verifier_normalized` means what it means in
    the released data: a gold in `norm_1000` and predictions in `resized_px`. Otherwise the gold's is `original_px` and the
    predictions' is `rewards.frame`. Frames that differ need the sizes [width, height] they are defined by.
    """

    det_reward_ratio: Weights = Weights()
    det_verifier_normalized: bool = False
    verifier_style: str | None = None
    frame: Frame | None = None
    gold_frame: Frame | None = None
    original_size: tuple[float, float] | None = None
    resized_size: tuple[float, float] | None = None


def weight_row(weights: Weights) -> list[float]:
    """The six weights in the kernel's order; SpecError where one is outside [0, 1] or the five scores' weights sum to
    0.
    """
    row = [float(getattr(weights, name) or 0.0) for name in (*SCORES, "iou_completeness")]
    if not all(0.0 <= value <= 1.0 for value in row):
        raise SpecError(f"det_reward_ratio has a weight outside [0, 1]: {msgspec.to_builtins(weights)}")
    if sum(row[:5]) == 0.0:
        raise SpecError(f"det_reward_ratio: the weights of {', '.join(SCORES)} sum to 0, so nothing is rewarded")
    return row


@lru_cache(maxsize=4_096)
def _prepared(params: DetectionParams, frame: Frame) -> tuple[list[float], tuple[float, float] | None]:
    gold_frame = params.gold_frame or ("norm_1000" if params.det_verifier_normalized else "original_px")
    predicted_frame = params.frame or ("resized_px" if params.det_verifier_normalized else frame)
    try:
        scale = scale_between(predicted_frame, gold_frame, params.original_size, params.resized_size)
    except FrameError as error:
        raise SpecError(str(error)) from error
    return weight_row(params.det_reward_ratio), scale


class _Batch:
    """Flat arrays under construction: one entry per sample that has boxes to compare."""

    def __init__(self, fold_case: bool) -> None:
        self.indices: list[int] = []
        self.predicted: list[float] = []
        self.predicted_labels: list[int] = []
        self.predicted_ends: list[int] = [0]
        self.gold: list[float] = []
        self.gold_labels: list[int] = []
        self.gold_ends: list[int] = [0]
        self.weights: list[list[float]] = []
        self._fold_case = fold_case
        self._classes: dict[str, int] = {}
        self._plain: dict[str, int] = {}

    def add(
        self,
        index: int,
        answer: Answer,
        gold: GoldBoxes,
        weights: list[float],
        scale: tuple[float, float] | None,
    ) -> None:
        coordinates, labels = self.predicted, self.predicted_labels
        for box in answer.boxes:
            coordinates += box.bbox_2d
            labels.append(self._class_id(box.label))
        if scale is not None and answer.boxes:
            first = len(coordinates) - 4 * len(answer.boxes)
            coordinates[first:] = [value * scale[k % 2] for k, value in enumerate(coordinates[first:])]
        self.gold_labels += [self._class_id(label) for label in gold.labels]
        self.gold += gold.coordinates
        self.predicted_ends.append(len(labels))
        self.gold_ends.append(len(self.gold_labels))
        self.weights.append(weights)
        self.indices.append(index)

    def _class_id(self, label: str) -> int:
        """Equal numbers for labels that are the same but for surrounding spaces, and for case where the options fold
        it.
        """
        known = self._classes.get(label)
        if known is None:
            plain = label.strip().lower() if self._fold_case else label.strip()
            known = self._classes[label] = self._plain.setdefault(plain, len(self._plain))
        return known

    def run(self, options: RewardOptions, progress: float) -> list[list[float]]:
        """Rows of COLUMNS, one per added sample."""
        # The kernel's module brings numba; importing it here keeps `import verifiers` fast.
        from verifiers.detection_kernel import run_kernel

        return run_kernel(
            (self.predicted, self.predicted_labels, self.predicted_ends),
            (self.gold, self.gold_labels, self.gold_ends),
            self.weights,
            options,
            progress,
        )


@lru_cache(maxsize=256)
def _reported_columns(weights: tuple[float, ...]) -> tuple[tuple[int, str], ...]:
    """Columns computed under `report: weighted`: the penalty, the weighed scores, and IoU at .50 of a weighed matching."""
    kept = ["size_penalty"]
    for score, weight in zip(SCORES, weights, strict=False):
        kept += [score, f"{score}_weighted"] if weight > 0.0 else []
    for matching, weight in zip(("label_first", "iou_first"), weights[:2], strict=True):
        kept += [f"{matching}_{measure}@50" for measure in _MEASURES] if weight > 0.0 else []
    return tuple((COLUMNS.index(name), name) for name in kept)


def _components(row: list[float], weights: list[float], is_full: bool) -> dict[str, float]:
    if is_full:
        return dict(zip(COLUMNS[1:], row[1:], strict=True))
    return {name: row[column] for column, name in _reported_columns(tuple(weights))}


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
        results: list[Outcome | Exception] = []
        for first in range(0, len(tasks), CHUNK):
            results += self._score_chunk(tasks[first : first + CHUNK])
        return results

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
        is_full = options.report == "full"
        for index, row, weights in zip(batch.indices, rows, batch.weights, strict=True):
            read = results[index]
            assert isinstance(read, Outcome)
            components = _components(row, weights, is_full)
            results[index] = Outcome(row[0], components, read.format, read.status, read.reason)
        return results

    def _prepare(self, task: Task, batch: _Batch, index: int) -> Outcome:
        """The outcome as far as text alone decides it; samples with gold boxes join the batch, which supplies their
        scores.
        """
        options = task.context.options
        weights, scale = _prepared(task.params, options.frame)
        gold = gold_boxes(task.gold)
        if gold is None:
            raise GoldError(f"the gold answer is no list of boxes with labels: {task.gold[:200]!r}")
        text = answer_text(task.response)
        answer = Answer([]) if text is None else parse_boxes(text)
        num_boxes = len(answer.boxes)
        are_tags_single = task.response.count("<answer>") == 1 and task.response.count("</answer>") == 1
        if not gold.labels:
            return _empty_gold(answer, are_tags_single)
        limit = max(options.max_boxes, 2 * len(gold.labels))
        if num_boxes > limit:
            return Outcome(0.0, {}, 0.0, "bad_answer", f"{num_boxes} boxes, more than rewards.max_boxes = {limit}")
        batch.add(index, answer, gold, weights, scale)
        if not num_boxes:
            return Outcome(0.0, {}, 0.0, "bad_answer", NO_ANSWER if text is None else NO_BOX)
        return Outcome(0.0, {}, float(are_tags_single))

    def gold_response(self, gold: str, params: DetectionParams, context: Context) -> str:
        """The gold's boxes in the frame the row expects of predictions."""
        boxes = gold_boxes(gold)
        if boxes is None:
            return gold
        scale = _prepared(params, context.options.frame)[1] or (1.0, 1.0)
        corners = [
            [value / scale[k % 2] for k, value in enumerate(boxes.coordinates[4 * i : 4 * i + 4])]
            for i in range(len(boxes.labels))
        ]
        items = [{"bbox_2d": corner, "label": label} for corner, label in zip(corners, boxes.labels, strict=True)]
        return msgspec.json.encode(items).decode()

    def check(self, gold: str, params: DetectionParams, context: Context) -> str | None:
        """What is wrong with the row, apart from its gold answer."""
        _prepared(params, context.options.frame)
        return None
