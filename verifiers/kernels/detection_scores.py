"""All detection scores of many samples in one call, without the GIL: flat boxes in, one row of components per sample out.

Called by verifiers.kinds.detection. For N predictions, G golds and M matches at threshold t, with c = iou_completeness (V-Triune §3.3):
    mean = ΣIoU/G   recall = M/G   precision = M/N (0 for N = 0)   completeness = (precision + recall)/2
    W(t) = (1 − c)·mean + c·completeness       size penalty s = 0.6^|N − G|
    accuracy = s · Σ w_k·score_k / Σ w_k
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from verifiers.kernels.average_precision import sample_average_precision
from verifiers.kernels.compiled import compiled
from verifiers.kernels.iou import framed_iou_matrix, iou_matrix
from verifiers.kernels.matching import match_iou_first, match_label_first, match_optimal
from verifiers.types import RewardOptions

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]

STANDARD_THRESHOLDS = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.99)
REPORTED = (0.50, 0.75, 0.95, 0.99)
SIZE_PENALTY = 0.6
# Columns of a row of results.
ACCURACY, PENALTY, PURE, WEIGHTED, LABEL_FIRST, IOU_FIRST = 0, 1, 2, 7, 12, 24
NUM_COLUMNS = 36
# Columns of a row of weights: the five scores in the order of PURE, then completeness.
NUM_SCORES, COMPLETENESS = 5, 5


@compiled
def blend_thresholds(
    per_threshold: Matrix,
    report_at: Indices,
    num_predictions: int,
    num_golds: int,
    completeness_share: float,
    is_active: NDArray[np.bool_],
    report: Matrix,
) -> float:
    """Mean W(t) over the active thresholds; writes (mean, precision, recall) of the reported ones. per_threshold [2, T]: ΣIoU, M."""
    num_active = 0
    blended = 0.0
    for t in range(is_active.shape[0]):
        if not is_active[t]:
            continue
        recall = per_threshold[1, t] / num_golds
        precision = per_threshold[1, t] / num_predictions if num_predictions > 0 else 0.0
        completeness = 0.5 * (precision + recall)
        blended += (1.0 - completeness_share) * per_threshold[0, t] / num_golds + completeness_share * completeness
        num_active += 1
    for k in range(report_at.shape[0]):
        t = report_at[k]
        report[3 * k] = per_threshold[0, t] / num_golds
        report[3 * k + 1] = per_threshold[1, t] / num_predictions if num_predictions > 0 else 0.0
        report[3 * k + 2] = per_threshold[1, t] / num_golds
    return blended / num_active


@compiled
def score_samples(
    predicted_xyxy: Matrix,
    predicted_labels: Indices,
    predicted_offsets: Indices,
    gold_xyxy: Matrix,
    gold_labels: Indices,
    gold_offsets: Indices,
    scales: Matrix,
    weights: Matrix,
    thresholds: Matrix,
    is_active: NDArray[np.bool_],
    report_at: Indices,
    is_full: bool,
    is_optimal: bool,
    out: Matrix,
) -> None:
    """Score S samples, each with at least one gold box, into out [S, 36].

    Boxes [ΣN, 4], labels [ΣN], offsets [S+1]; scales [S, 3], see framed_iou_matrix;
    weights [S, 6]; thresholds and is_active [T]; report_at: indices of
    reported thresholds. Scores that no weight asks for are computed where is_full; the columns of the others stay as
    they came.
    """
    num_thresholds = thresholds.shape[0]
    per_threshold = np.empty((2, num_thresholds))
    for s in range(weights.shape[0]):
        boxes = predicted_xyxy[predicted_offsets[s] : predicted_offsets[s + 1]]
        labels = predicted_labels[predicted_offsets[s] : predicted_offsets[s + 1]]
        gold_boxes = gold_xyxy[gold_offsets[s] : gold_offsets[s + 1]]
        golds = gold_labels[gold_offsets[s] : gold_offsets[s + 1]]
        num_predictions, num_golds = boxes.shape[0], gold_boxes.shape[0]
        if scales[s, 0] == 1.0 and scales[s, 1] == 1.0 and scales[s, 2] == 0.0:
            overlap = iou_matrix(boxes, gold_boxes)
        else:
            overlap = framed_iou_matrix(boxes, gold_boxes, scales[s])
        agrees = np.empty((num_predictions, num_golds), np.bool_)
        for p in range(num_predictions):
            for g in range(num_golds):
                agrees[p, g] = labels[p] == golds[g]
        row, weight = out[s], weights[s]
        for score in range(2):
            if not (is_full or weight[score] > 0.0):
                continue
            if is_optimal:
                match_optimal(overlap, agrees, score == 0, thresholds, per_threshold[0], per_threshold[1])
            elif score == 0:
                match_label_first(overlap, agrees, thresholds, per_threshold[0], per_threshold[1])
            else:
                match_iou_first(overlap, agrees, thresholds, per_threshold[0], per_threshold[1])
            report = row[LABEL_FIRST:IOU_FIRST] if score == 0 else row[IOU_FIRST:NUM_COLUMNS]
            row[PURE + score] = blend_thresholds(
                per_threshold, report_at, num_predictions, num_golds, weight[COMPLETENESS], is_active, report
            )
        if is_full or weight[2] > 0.0 or weight[3] > 0.0 or weight[4] > 0.0:
            sample_average_precision(overlap, labels, golds, row[PURE + 2 : PURE + 5])
        penalty = SIZE_PENALTY ** abs(num_predictions - num_golds)
        row[PENALTY] = penalty
        row[ACCURACY] = 0.0
        total_weight = 0.0
        for score in range(NUM_SCORES):
            row[WEIGHTED + score] = row[PURE + score] * penalty
            row[ACCURACY] += weight[score] * row[WEIGHTED + score]
            total_weight += weight[score]
        row[ACCURACY] /= total_weight


Side = tuple[list[float], list[int], list[int]]
"""Boxes of S samples, one after another: coordinates, four a box; class ids; S+1 offsets, at which samples begin and end."""


def run_kernel(
    predicted: Side,
    gold: Side,
    scales: Sequence[tuple[float, float, float]],
    weights: Sequence[tuple[float, ...]],
    options: RewardOptions,
    progress: float | None,
) -> list[list[float]]:
    """Rows of 36 columns for S samples, each with a gold box."""
    active = options.threshold_at(progress)
    is_full = options.report == "full"
    thresholds, is_active, report_at = _threshold_plan(active, is_full)
    out = np.zeros((len(weights), NUM_COLUMNS))
    score_samples(
        *_arrays(predicted),
        *_arrays(gold),
        np.array(scales, dtype=np.float64),
        np.array(weights, dtype=np.float64),
        thresholds,
        is_active,
        report_at,
        is_full,
        options.matching == "optimal",
        out,
    )
    rows: list[list[float]] = out.tolist()
    return rows


def _arrays(side: Side) -> tuple[Matrix, Indices, Indices]:
    boxes_xyxy = np.array(side[0], dtype=np.float64).reshape(-1, 4)
    return boxes_xyxy, np.array(side[1], dtype=np.int64), np.array(side[2], dtype=np.int64)


@lru_cache(maxsize=64)
def _threshold_plan(active: float | None, is_full: bool) -> tuple[Matrix, NDArray[np.bool_], Indices]:
    """The thresholds to match at, which of them make the score, and where the reported ones stand."""
    average = STANDARD_THRESHOLDS if active is None else (active,)
    reported = REPORTED if is_full else REPORTED[:1]
    thresholds = sorted({*average, *reported})
    is_active = np.array([value in average for value in thresholds], dtype=np.bool_)
    report_at = np.array([thresholds.index(value) for value in reported], dtype=np.int64)
    return np.array(thresholds, dtype=np.float64), is_active, report_at
