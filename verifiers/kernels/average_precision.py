"""COCO's average precision of one sample: 101-point interpolation, IoU .50:.05:.95, one area range, at most 100 detections a class.

All predictions have score 1, so their order ranks them. Equal to pycocotools to 1e-9, with two deliberate differences: a box larger
than 10¹⁰ px² is a box like any other (pycocotools ignores it, which would make giant boxes free), and the 2e-16 that pycocotools
adds to a denominator is left out, so that a perfect answer scores exactly 1.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verifiers.kernels.compiled import compiled
from verifiers.kernels.iou import as_boxes, iou_matrix

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]

MAX_DETECTIONS = 100
# numpy's own linspace, bit for bit as pycocotools makes them: an IoU of exactly 3/5 falls on the same side in both.
AP_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_LEVELS = np.linspace(0.0, 1.0, 101)


@compiled
def recall_levels_per_hit(num_golds: int, out: Matrix) -> None:
    """out[n] = how many of the 101 recall levels are first reached at the n-th hit, 1 ≤ n ≤ num_golds; level 0 at once."""
    hits = 1
    out[1] = 1.0
    for n in range(2, num_golds + 1):
        out[n] = 0.0
    for level in range(1, 101):
        while hits / num_golds < RECALL_LEVELS[level]:
            hits += 1
        out[hits] += 1.0


@compiled
def interpolated_precision(hit_rank: Labels, num_hits: int, num_golds: int, levels: Matrix) -> float:
    """AP of one class at one threshold. hit_rank[n] is the 1-based rank of the n-th hit; the sum runs from the last hit back."""
    best = 0.0
    total = 0.0
    for n in range(num_hits, 0, -1):
        precision = n / hit_rank[n]
        best = max(best, precision)
        total += levels[n] * best
    return total / 101.0


@compiled
def sample_average_precision(overlap: Matrix, predicted: Labels, gold: Labels, out: Matrix) -> None:
    """out = (map, map50, map75) from IoU [N, G] and class ids [N], [G]. Classes are the gold's, each weighing the same; G ≥ 1.

    Per class and threshold: predictions in order, each takes the unmatched gold of highest IoU ≥ t, the last of equals.
    """
    num_golds_all = gold.shape[0]
    out[:] = 0.0
    num_classes = 0
    seen = np.zeros(num_golds_all, np.bool_)
    members = np.empty(num_golds_all, np.int64)
    ranked = np.empty(MAX_DETECTIONS, np.int64)
    taken = np.empty(num_golds_all, np.bool_)
    hit_rank = np.empty(num_golds_all + 1, np.int64)
    levels = np.empty(num_golds_all + 1)
    for first in range(num_golds_all):
        if seen[first]:
            continue
        num_classes += 1
        num_golds = 0
        for g in range(first, num_golds_all):
            if gold[g] == gold[first]:
                seen[g] = True
                members[num_golds] = g
                num_golds += 1
        num_ranked = 0
        for p in range(predicted.shape[0]):
            if predicted[p] == gold[first] and num_ranked < MAX_DETECTIONS:
                ranked[num_ranked] = p
                num_ranked += 1
        if num_ranked == 0:
            continue
        recall_levels_per_hit(num_golds, levels)
        for t in range(AP_THRESHOLDS.shape[0]):
            taken[:num_golds] = False
            num_hits = 0
            for rank in range(num_ranked):
                best = AP_THRESHOLDS[t]
                best_member = -1
                for k in range(num_golds):
                    value = overlap[ranked[rank], members[k]]
                    if not taken[k] and value >= best:
                        best = value
                        best_member = k
                if best_member >= 0:
                    taken[best_member] = True
                    num_hits += 1
                    hit_rank[num_hits] = rank + 1
            value = interpolated_precision(hit_rank, num_hits, num_golds, levels)
            out[0] += value
            if t == 0:
                out[1] += value
            if t == 5:
                out[2] += value
    out[0] /= num_classes * AP_THRESHOLDS.shape[0]
    out[1] /= num_classes
    out[2] /= num_classes


def class_ids(predicted: Sequence[object] | ArrayLike, gold: Sequence[object] | ArrayLike) -> tuple[Labels, Labels]:
    """Labels of any hashable kind as class ids, equal exactly where the labels are."""
    if isinstance(predicted, np.ndarray) and isinstance(gold, np.ndarray) and predicted.dtype == gold.dtype == np.int64:
        return np.ascontiguousarray(predicted), np.ascontiguousarray(gold)
    table: dict[object, int] = {}
    sides = (np.asarray(predicted, dtype=object).tolist(), np.asarray(gold, dtype=object).tolist())
    ids = [np.array([table.setdefault(label, len(table)) for label in side], dtype=np.int64) for side in sides]
    return ids[0], ids[1]


def coco_average_precision(
    predicted_xyxy: ArrayLike,
    predicted_labels: Sequence[object] | ArrayLike,
    gold_xyxy: ArrayLike,
    gold_labels: Sequence[object] | ArrayLike,
) -> tuple[float, float, float]:
    """(map, map50, map75) of one sample, in [0, 1]: boxes [N, 4] and [G, 4], labels of length N and G (ints or strings).

    Without gold boxes COCO's AP is undefined; here it is 1 for no prediction and 0 otherwise. ValueError where lengths differ.
    """
    predicted_boxes, gold_boxes = as_boxes(predicted_xyxy), as_boxes(gold_xyxy)
    predicted, gold = class_ids(predicted_labels, gold_labels)
    if len(predicted) != len(predicted_boxes) or len(gold) != len(gold_boxes):
        raise ValueError(
            f"{len(predicted_boxes)} predicted boxes with {len(predicted)} labels, {len(gold_boxes)} gold boxes with {len(gold)} labels"
        )
    if not len(gold):
        alone = 1.0 if not len(predicted) else 0.0
        return alone, alone, alone
    out = np.empty(3)
    sample_average_precision(iou_matrix(predicted_boxes, gold_boxes), predicted, gold, out)
    return float(out[0]), float(out[1]), float(out[2])
