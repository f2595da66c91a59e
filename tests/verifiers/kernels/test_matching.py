"""The matchings, against plain Python statements of their rules and against scipy."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from bench.verifier_cases import coco_sample
from verifiers.kernels.iou import pairwise_iou
from verifiers.kernels.matching import LABEL_PREFERENCE, assign, match_iou_first, match_label_first, match_optimal

THRESHOLDS = np.array([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99])


def label_first(overlap, agrees, threshold):
    free, total, matches = set(range(len(overlap))), 0.0, 0
    for g in range(overlap.shape[1]):
        candidates = [p for p in sorted(free) if agrees[p, g]]
        if not candidates:
            continue
        best = max(candidates, key=lambda p: overlap[p, g])
        if overlap[best, g] >= threshold:
            free.remove(best)
            total, matches = total + overlap[best, g], matches + 1
    return total, matches


def iou_first(overlap, agrees, threshold):
    predictions, golds, total, matches = set(range(len(overlap))), set(range(overlap.shape[1])), 0.0, 0
    while predictions and golds:
        value, same, p, g = max((overlap[p, g], bool(agrees[p, g]), -p, -g) for p in predictions for g in golds)
        if value < threshold:
            break
        predictions.remove(-p)
        golds.remove(-g)
        total, matches = total + value * same, matches + same
    return total, matches


def samples(seed: int, num: int):
    rng = np.random.default_rng(seed)
    for _ in range(num):
        predicted, labels, gold, gold_labels = coco_sample(rng, max_boxes=12)
        yield pairwise_iou(predicted, gold), np.ascontiguousarray(labels[:, None] == gold_labels[None, :])


@pytest.mark.parametrize(("kernel", "rule"), [(match_label_first, label_first), (match_iou_first, iou_first)])
def test_a_greedy_matching_is_its_rule_at_every_threshold(kernel, rule) -> None:
    for overlap, agrees in samples(3, 400):
        total, matches = np.empty(11), np.empty(11)
        kernel(overlap, agrees, THRESHOLDS, total, matches)
        for t, threshold in enumerate(THRESHOLDS):
            expected = rule(overlap, agrees, threshold)
            assert (total[t], matches[t]) == (pytest.approx(expected[0], abs=1e-12), expected[1])


@pytest.mark.parametrize("same_label_only", [True, False])
def test_the_optimal_matching_earns_what_scipys_assignment_earns(same_label_only: bool) -> None:
    for overlap, agrees in samples(4, 300):
        total, matches = np.empty(11), np.empty(11)
        match_optimal(overlap, agrees, same_label_only, THRESHOLDS, total, matches)
        for t, threshold in enumerate(THRESHOLDS):
            counts = (overlap >= threshold) & (agrees | (not same_label_only))
            value = np.where(counts, overlap + LABEL_PREFERENCE * agrees, 0.0)
            rows, columns = linear_sum_assignment(value, maximize=True)
            earned = (overlap * agrees * counts)[rows, columns].sum()
            assert total[t] == pytest.approx(earned, abs=1e-7)


def test_assignments_of_random_values_are_as_good_as_scipys() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        rows = int(rng.integers(1, 15))
        value = rng.normal(size=(rows, rows + int(rng.integers(0, 6))))
        columns = assign(value)
        assert len(set(columns.tolist())) == rows
        expected = value[linear_sum_assignment(value, maximize=True)].sum()
        assert value[np.arange(rows), columns].sum() == pytest.approx(expected)


def test_among_equal_boxes_iou_first_pairs_those_of_equal_label() -> None:
    overlap = np.ones((2, 2))
    agrees = np.array([[False, True], [True, False]])
    total, matches = np.empty(1), np.empty(1)
    match_iou_first(overlap, agrees, np.array([0.5]), total, matches)
    assert (total[0], matches[0]) == (2.0, 2.0)
