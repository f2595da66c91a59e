"""COCO's average precision, against pycocotools."""

import numpy as np
import pytest

from bench.verifier_cases import coco_sample, pycocotools_average_precision
from verifiers.kernels.average_precision import coco_average_precision


def test_map_equals_pycocotools_on_random_samples_with_ties_missing_and_extra_boxes() -> None:
    rng = np.random.default_rng(7)
    for number in range(800):
        sample = coco_sample(rng)
        assert coco_average_precision(*sample) == pytest.approx(pycocotools_average_precision(*sample), abs=1e-9), (
            number
        )


def test_only_the_first_hundred_detections_of_a_class_count() -> None:
    gold = np.array([[0.0, 0.0, 10.0, 10.0]])
    predicted = np.repeat([[50.0, 50.0, 60.0, 60.0]], 100, axis=0)
    predicted = np.concatenate([predicted, gold])
    labels = np.zeros(101, dtype=np.int64)
    expected = pycocotools_average_precision(predicted, labels, gold, labels[:1])
    assert expected[0] == 0.0
    assert coco_average_precision(predicted, labels, gold, labels[:1]) == expected


def test_a_perfect_answer_scores_exactly_one() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [0, 0, 10, 10]])
    assert coco_average_precision(boxes, ["a", "b", "b"], boxes, ["a", "b", "b"]) == (1.0, 1.0, 1.0)


def test_a_giant_box_is_a_false_alarm_like_any_other() -> None:
    gold = [[0, 0, 10, 10]]
    assert coco_average_precision([[0, 0, 1e308, 1e308], *gold], ["a", "a"], gold, ["a"])[0] == pytest.approx(0.5)


def test_labels_of_any_kind_are_compared_as_they_are() -> None:
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    by_name = coco_average_precision(boxes, ["cat", "dog"], boxes, ["dog", "cat"])
    assert by_name == coco_average_precision(boxes, np.array([0, 1]), boxes, np.array([1, 0])) == (0.0, 0.0, 0.0)


def test_without_gold_boxes_only_no_prediction_is_right() -> None:
    assert coco_average_precision([], [], [], []) == (1.0, 1.0, 1.0)
    assert coco_average_precision([[0, 0, 1, 1]], ["a"], [], []) == (0.0, 0.0, 0.0)


def test_boxes_and_labels_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 labels"):
        coco_average_precision([[0, 0, 1, 1]], ["a", "b"], [[0, 0, 1, 1]], ["a"])
