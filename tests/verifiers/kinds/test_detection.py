"""Detection rewards: the vectors of their definition, independence of order, thresholds, frames, reports."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verifier_cases import coco_sample, pycocotools_average_precision
from verifiers import ImageSize, RewardOptions, RewardSpec, check_gold, is_correct, score, score_batch, validate_spec
from verifiers.types import fault

CAT = {"bbox_2d": [0, 0, 10, 10], "label": "cat"}
DOG = {"bbox_2d": [50, 50, 70, 70], "label": "dog"}
AT_HALF = RewardOptions(iou_threshold=0.5)


def spec(gold: list, parm: dict | None = None, **weights: float) -> RewardSpec:
    return RewardSpec(
        ground_truth=json.dumps(gold), verifier="detection", verifier_parm={"det_reward_ratio": weights, **(parm or {})}
    )


def response(items: list) -> str:
    return f"<think>\n</think>\n<answer>\n{json.dumps(items)}\n</answer>"


def test_one_of_two_boxes_found_scores_0_345() -> None:
    verdict = score(response([CAT]), spec([CAT, DOG], iou_max_label_first=1.0, iou_completeness=0.3))
    assert verdict.accuracy == pytest.approx(0.345)
    assert verdict.reward == pytest.approx((0.345 + 0.1) / 1.1)
    assert (verdict.status, verdict.format, verdict.components["size_penalty"]) == ("ok", 1.0, 0.6)


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
@pytest.mark.parametrize("name", ["iou_max_iou_first", "iou_max_label_first", "map", "map50", "map75"])
def test_boxes_in_another_order_than_the_golds_score_one(name: str, matching: str) -> None:
    options = RewardOptions(iou_threshold=0.5, matching=matching)
    verdict = score(response([CAT, DOG]), spec([DOG, CAT], iou_completeness=0.3, **{name: 1.0}), options=options)
    assert verdict.accuracy == verdict.reward == 1.0


def test_the_blend_weighs_each_score_after_the_size_penalty() -> None:
    weights = {
        "iou_max_label_first": 0.5,
        "iou_max_iou_first": 0.25,
        "iou_completeness": 0.3,
        "map": 1.0,
        "map75": 0.125,
    }
    parts = score(response([CAT]), spec([CAT, DOG], **weights), options=AT_HALF).components
    accuracy = score(response([CAT]), spec([CAT, DOG], **weights), options=AT_HALF).accuracy
    scored = {name: weight for name, weight in weights.items() if name != "iou_completeness"}
    expected = 0.6 * sum(weight * parts[name] for name, weight in scored.items()) / sum(scored.values())
    assert accuracy == pytest.approx(expected)
    assert all(parts[f"{name}_weighted"] == pytest.approx(0.6 * parts[name]) for name in scored)


def test_map_in_the_blend_is_pycocotools_map() -> None:
    rng = np.random.default_rng(11)
    for _ in range(100):
        predicted, labels, gold, gold_labels = coco_sample(rng, max_boxes=8)
        items = [{"bbox_2d": box.tolist(), "label": str(label)} for box, label in zip(predicted, labels, strict=True)]
        golds = [{"bbox_2d": box.tolist(), "label": str(label)} for box, label in zip(gold, gold_labels, strict=True)]
        verdict = score(response(items), spec(golds, map=1.0))
        expected = pycocotools_average_precision(predicted, labels, gold, gold_labels)[0] * 0.6 ** abs(
            len(items) - len(golds)
        )
        assert verdict.accuracy == pytest.approx(expected, abs=1e-9)


@given(st.permutations(range(4)), st.sampled_from(["greedy", "optimal"]))
def test_the_order_of_distinct_boxes_does_not_matter(order: list[int], matching: str) -> None:
    items = [{"bbox_2d": [40 * i, 0, 40 * i + 30, 30], "label": "ab"[i % 2]} for i in range(4)]
    options = RewardOptions(iou_threshold=0.5, matching=matching)
    wanted = spec(items, iou_max_iou_first=1.0, iou_max_label_first=1.0, iou_completeness=0.5, map=1.0)
    assert score(response([items[i] for i in order]), wanted, options=options).accuracy == pytest.approx(1.0)


def test_right_boxes_with_wrong_labels_earn_nothing() -> None:
    swapped = [{**CAT, "label": "dog"}, {**DOG, "label": "cat"}]
    wanted = spec([CAT, DOG], iou_max_iou_first=1.0, iou_max_label_first=1.0, iou_completeness=1.0, map=1.0)
    assert score(response(swapped), wanted, options=AT_HALF).accuracy == 0.0


def test_duplicated_boxes_are_false_alarms() -> None:
    wanted = spec([CAT, DOG], iou_max_label_first=1.0, iou_completeness=0.3)
    verdict = score(response([CAT, CAT, DOG, DOG]), wanted, options=AT_HALF)
    assert verdict.components["label_first_precision@50"] == 0.5
    assert verdict.accuracy == pytest.approx(0.36 * (0.7 + 0.3 * 0.75))


@pytest.mark.parametrize(
    ("progress", "threshold"), [(0.0, 0.85), (0.10, 0.85), (0.11, 0.95), (0.25, 0.95), (0.3, 0.99), (1.0, 0.99)]
)
def test_the_dynamic_threshold_follows_progress(progress: float, threshold: float) -> None:
    assert RewardOptions().threshold_at(progress) == threshold
    off = [{**CAT, "bbox_2d": [0, 0, 10, threshold * 10 + 0.01]}]
    short = [{**CAT, "bbox_2d": [0, 0, 10, threshold * 10 - 0.01]}]
    wanted = spec([CAT], iou_max_label_first=1.0)
    assert score(response(off), wanted, progress).accuracy > 0.0
    assert score(response(short), wanted, progress).accuracy == 0.0


def test_evaluation_has_a_threshold_of_its_own_and_reports_the_average_beside() -> None:
    wanted = spec([CAT], iou_max_label_first=1.0)
    answer = response([{**CAT, "bbox_2d": [0, 0, 10, 7.2]}])
    for options in (RewardOptions(), RewardOptions(iou_threshold=0.9, report="full")):
        verdict = score(answer, wanted, None, options=options)
        assert verdict.accuracy == pytest.approx(0.72)
        assert verdict.components["accuracy@average"] == pytest.approx(0.72 * 5 / 11)
    assert score(answer, wanted, None, options=RewardOptions(evaluation_threshold=0.75)).accuracy == 0.0
    averaged = score(answer, wanted, None, options=RewardOptions(evaluation_threshold="average"))
    assert averaged.accuracy == averaged.components["accuracy@average"] == pytest.approx(0.72 * 5 / 11)
    in_training = score(answer, wanted, 0.0)
    assert in_training.accuracy == 0.0
    assert "accuracy@average" not in in_training.components


@pytest.mark.parametrize("answer", [[], [CAT]])
def test_an_evaluation_reports_the_average_where_no_threshold_matters_too(answer: list) -> None:
    nothing_there = score(response(answer), spec([], iou_max_label_first=1.0), None)
    assert nothing_there.components["accuracy@average"] == nothing_there.accuracy
    too_many = score(response([CAT] * 20), spec([CAT], map=1.0), None, options=RewardOptions(max_boxes=3))
    assert too_many.components["accuracy@average"] == too_many.accuracy == 0.0


def test_the_empty_gold_is_met_by_the_empty_list_only() -> None:
    nothing = spec([], map=1.0)
    assert score(response([]), nothing).reward == 1.0
    assert check_gold(nothing) is None
    for text in (
        "",
        "[]",
        "<answer></answer>",
        "<answer>none</answer>",
        "<answer>[</answer>",
        response([CAT]),
        "<answer>[{}]</answer>",
    ):
        assert score(text, nothing).accuracy == 0.0, text


def test_an_answer_without_boxes_is_a_bad_answer_with_its_reason() -> None:
    wanted = spec([CAT], map=1.0)
    assert (score("a cat", wanted).status, score("a cat", wanted).reason) == ("bad_answer", "no answer tags")
    assert score("<answer>a cat</answer>", wanted).reason == "no box could be read from the answer"
    assert score("<answer>a cat</answer>", wanted).reward == 0.0


def test_the_format_needs_the_answer_tags_once_each_and_a_box() -> None:
    wanted = spec([CAT], map=1.0)
    assert score(f"<answer>{json.dumps([CAT])}</answer>", wanted).format == 1.0
    twice = score(f"<answer>x</answer><answer>{json.dumps([CAT])}</answer>", wanted)
    assert (twice.accuracy, twice.format) == (1.0, 0.0)


def test_a_gold_that_cannot_be_read_is_a_fault_never_a_zero() -> None:
    for gold in ("a cat", '[{"bbox_2d": [1, 2, 3], "label": "cat"}]', '[{"bbox_2d": [9, 9, 1, 1], "label": "cat"}]'):
        bad = RewardSpec(ground_truth=gold, verifier="detection", verifier_parm={"det_reward_ratio": {"map": 1.0}})
        verdict = score(response([CAT]), bad)
        assert verdict.status == "fault"
        assert verdict.reward != verdict.reward
        assert check_gold(bad) is not None


def test_weights_that_sum_to_zero_or_leave_the_unit_interval_are_data_errors() -> None:
    assert "sum to 0" in (validate_spec(spec([CAT], iou_completeness=1.0)) or "")
    zeros = dict.fromkeys(("iou_max_label_first", "iou_max_iou_first", "map", "map50", "map75"), 0.0)
    assert "sum to 0" in (validate_spec(spec([CAT], **zeros)) or "")
    assert "outside [0, 1]" in (validate_spec(spec([CAT], map=1.5)) or "")


def test_weights_that_are_absent_or_all_null_are_label_first_with_completeness() -> None:
    expected = score(response([CAT]), spec([CAT, DOG], iou_max_label_first=1.0, iou_completeness=0.3)).accuracy
    gold = json.dumps([CAT, DOG])
    for parm in (None, {"det_reward_ratio": None}, {"det_reward_ratio": {"map": None}}):
        silent = RewardSpec(ground_truth=gold, verifier="detection", verifier_parm=parm)
        assert score(response([CAT]), silent).accuracy == expected == pytest.approx(0.345)


def test_null_parameters_count_as_absent() -> None:
    row = spec([CAT], {"det_verifier_normalized": None, "verifier_style": "rule"}, map=1.0, map50=None)
    assert check_gold(row) is None


SIZES = {"original_size": [1000, 500], "resized_size": [500, 250]}


@pytest.mark.parametrize(
    ("parm", "box"),
    [
        ({}, [100, 100, 300, 200]),
        ({"frame": "resized_px", **SIZES}, [50, 50, 150, 100]),
        ({"frame": "norm_1000", **SIZES}, [100, 200, 300, 400]),
        ({"frame": "norm_1", **SIZES}, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_boxes_in_every_frame_mean_the_same_place(parm: dict, box: list[float]) -> None:
    gold = [{"bbox_2d": [100, 100, 300, 200], "label": "cat"}]
    wanted = spec(gold, parm, iou_max_label_first=1.0, map=1.0)
    assert score(response([{"bbox_2d": box, "label": "cat"}]), wanted).accuracy == pytest.approx(1.0)
    assert check_gold(wanted) is None


def test_normalised_rows_hold_golds_per_thousand_and_expect_resized_pixels() -> None:
    gold = [{"bbox_2d": [100, 200, 300, 400], "label": "cat"}]
    wanted = spec(gold, {"det_verifier_normalized": True, "resized_size": [500, 250]}, map=1.0)
    assert score(response([{"bbox_2d": [50, 50, 150, 100], "label": "cat"}]), wanted).accuracy == 1.0
    without = spec(gold, {"det_verifier_normalized": True}, map=1.0)
    assert "resized_size" in (validate_spec(without) or "")


def test_a_full_report_names_every_component() -> None:
    parts = score(response([CAT]), spec([CAT, DOG], map=1.0), options=AT_HALF).components
    for matching in ("label_first", "iou_first"):
        for percent in (50, 75, 95, 99):
            assert parts[f"{matching}_iou@{percent}"] == 0.5
            assert parts[f"{matching}_precision@{percent}"] == 1.0
            assert parts[f"{matching}_recall@{percent}"] == 0.5
    assert {"size_penalty", "map", "map50", "map75", "map_weighted", "iou_max_iou_first_weighted"} <= parts.keys()
    assert len(parts) == 35


def test_a_weighted_report_holds_what_is_weighed_and_scores_the_same() -> None:
    wanted = spec([CAT, DOG], iou_max_label_first=1.0, iou_completeness=0.3)
    full, brief = (
        score(response([CAT]), wanted, options=RewardOptions(report=report)) for report in ("full", "weighted")
    )
    assert brief.reward == full.reward
    assert brief.components.items() <= full.components.items()
    assert set(brief.components) == {
        *("size_penalty", "iou_max_label_first", "iou_max_label_first_weighted"),
        *("label_first_iou@50", "label_first_precision@50", "label_first_recall@50"),
    }


def test_optimal_matching_finds_what_greedy_misses() -> None:
    golds = [{"bbox_2d": [0, 0, 10, 10], "label": "a"}, {"bbox_2d": [0, 0, 10, 14], "label": "a"}]
    found = [{"bbox_2d": [0, 0, 10, 12], "label": "a"}, {"bbox_2d": [0, 0, 10, 16], "label": "a"}]
    wanted = spec(golds, iou_max_label_first=1.0)
    greedy, optimal = (
        score(response(found), wanted, options=RewardOptions(iou_threshold=0.7, matching=matching)).accuracy
        for matching in ("greedy", "optimal")
    )
    assert optimal >= greedy
    assert optimal == pytest.approx((10 / 12 + 14 / 16) / 2)


@pytest.mark.parametrize("report", ["full", "weighted"])
def test_correct_means_the_configured_component_reaches_its_threshold(report: str) -> None:
    wanted = spec([CAT, DOG], map=1.0)
    default = RewardOptions(report=report)
    half = score(response([CAT]), wanted, options=default)
    none = score(response([{**CAT, "label": "dog"}]), wanted, options=default)
    assert is_correct(half, wanted, options=default)
    assert not is_correct(none, wanted, options=default)
    assert not is_correct(half, wanted, options=RewardOptions(correct_threshold=0.6))
    by_precision = RewardOptions(report=report, correct_component="iou_first_precision@75", correct_threshold=1.0)
    assert is_correct(score(response([CAT]), wanted, options=by_precision), wanted, options=by_precision)
    assert not is_correct(fault("timeout"), wanted, options=default)


def test_a_batch_scores_each_response_as_it_would_alone() -> None:
    rng = np.random.default_rng(12)
    responses, specs = [], []
    for _ in range(600):
        predicted, labels, gold, gold_labels = coco_sample(rng, max_boxes=6)
        items = [{"bbox_2d": box.tolist(), "label": f"c{label}"} for box, label in zip(predicted, labels, strict=True)]
        golds = [{"bbox_2d": box.tolist(), "label": f"c{label}"} for box, label in zip(gold, gold_labels, strict=True)]
        responses.append(response(items))
        specs.append(spec(golds, iou_max_iou_first=1.0, iou_max_label_first=0.5, iou_completeness=0.3, map=1.0))
    together = score_batch(responses, specs, 0.5)
    assert together == [score(text, one, 0.5) for text, one in zip(responses, specs, strict=True)]


SMALL = ImageSize((400, 300), (392, 308))
LARGE = ImageSize((4000, 3000), (2016, 1512))
BOX = [123.0, 81.0, 171.0, 140.0]
IN_PIXELS = RewardOptions(frame="resized_px", iou_threshold=0.99)


def as_seen(box: list[float], size: ImageSize, digits: int | None = None) -> list[dict]:
    """The item that names `box`, of the data's picture, in pixels of what the model sees, rounded to whole ones by default."""
    scale = [seen / had for had, seen in zip(size.original, size.resized, strict=True)] * 2
    return [
        {"bbox_2d": [round(value * factor, digits) for value, factor in zip(box, scale, strict=True)], "label": "cat"}
    ]


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_a_box_in_the_pixels_that_the_model_sees_is_right_without_the_rows_sizes(size: ImageSize) -> None:
    wanted = spec([{"bbox_2d": BOX, "label": "cat"}], iou_max_label_first=1.0, map=1.0)
    assert score(response(as_seen(BOX, size)), wanted, options=IN_PIXELS, image_sizes=[size]).accuracy == 1.0
    assert check_gold(wanted, options=IN_PIXELS, image_sizes=[size]) is None
    assert "resized_size" in (validate_spec(wanted, options=IN_PIXELS) or "")
    as_data = response([{"bbox_2d": BOX, "label": "cat"}])
    assert score(as_data, wanted, options=IN_PIXELS, image_sizes=[size]).accuracy < 1.0


def test_the_released_normalised_rows_need_no_sizes_of_their_own() -> None:
    gold = [{"bbox_2d": [100, 200, 300, 400], "label": "cat"}]
    wanted = spec(gold, {"det_verifier_normalized": True}, map=1.0)
    found = response([{"bbox_2d": [202, 302, 605, 605], "label": "cat"}])
    assert check_gold(wanted, image_sizes=[LARGE]) is None
    assert score(found, wanted, image_sizes=[LARGE]).accuracy == 1.0
    assert score(response(gold), wanted, image_sizes=[LARGE]).accuracy == 0.0
    of_row = spec(gold, {"det_verifier_normalized": True, "resized_size": [1000, 1000]}, map=1.0)
    assert score(response(gold), of_row, image_sizes=[LARGE]).accuracy == 1.0


def test_of_several_images_the_row_says_which_where_their_sizes_differ() -> None:
    gold = [{"bbox_2d": BOX, "label": "cat"}]
    silent, second = spec(gold, map=1.0), spec(gold, {"image": 1}, map=1.0)
    found = response(as_seen(BOX, LARGE))
    assert "verifier_parm.image" in (validate_spec(silent, options=IN_PIXELS, image_sizes=[SMALL, LARGE]) or "")
    assert score(found, silent, options=IN_PIXELS, image_sizes=[LARGE, LARGE]).accuracy == 1.0
    assert score(found, second, options=IN_PIXELS, image_sizes=[SMALL, LARGE]).accuracy == 1.0
    assert "2 images" in (
        validate_spec(spec(gold, {"image": 2}, map=1.0), options=IN_PIXELS, image_sizes=[SMALL, LARGE]) or ""
    )


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
@pytest.mark.parametrize("name", ["iou_max_iou_first", "iou_max_label_first", "map"])
def test_whole_numbers_half_a_unit_off_count_as_the_golds(name: str, matching: str) -> None:
    wanted = spec([{"bbox_2d": [10.5, 10.5, 20.5, 20.5], "label": "cat"}], **{name: 1.0})

    def accuracy(box: list[float], **options: Any) -> float:
        at = RewardOptions(iou_threshold=0.99, matching=matching, **options)
        return score(response([{"bbox_2d": box, "label": "cat"}]), wanted, options=at).accuracy

    assert accuracy([10, 11, 20, 21]) == accuracy([10.0, 11, 21, 20]) == 1.0
    assert accuracy([10, 11, 20, 21], rounding="none") < 0.9
    assert accuracy([9, 11, 20, 21]) < 1.0
    assert accuracy([9.6, 11, 20, 21]) < 1.0


def test_fractions_of_the_image_are_never_rounded() -> None:
    gold = [{"bbox_2d": [0.4, 0.4, 0.9, 0.9], "label": "cat"}]
    wanted = spec(gold, {"frame": "norm_1", "gold_frame": "norm_1"}, map50=1.0)
    assert score(response([{"bbox_2d": [0, 0, 1, 1], "label": "cat"}]), wanted).accuracy == 0.0
    assert check_gold(wanted) is None


@given(st.integers(0, 2**32 - 1))
def test_map_of_rounded_boxes_is_pycocotools_map_of_the_boxes_so_snapped(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_boxes = int(rng.integers(1, 6))
    # Far from each other: a prediction is near one gold at most, so the boxes so snapped are the same for all golds.
    corners = np.arange(num_boxes)[:, None] * 100 + rng.uniform(0, 20, (num_boxes, 2))
    gold = np.concatenate([corners, corners + rng.uniform(5, 40, (num_boxes, 2))], 1)
    predicted = np.round(gold) + rng.integers(-1, 2, gold.shape) * (rng.random(gold.shape) < 0.3)
    snapped = np.where(np.abs(predicted - gold) <= 0.5, gold, predicted)
    labels = rng.integers(0, 2, num_boxes)
    gold_items, items = (
        [{"bbox_2d": box, "label": str(label)} for box, label in zip(boxes.tolist(), labels, strict=True)]
        for boxes in (gold, predicted)
    )
    parts = score(response(items), spec(gold_items, map=1.0)).components
    expected = pycocotools_average_precision(snapped, labels, gold, labels)
    assert (parts["map"], parts["map50"], parts["map75"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("parm", "items", "told"),
    [
        ({}, [{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "label": "cat"}], "fractions"),
        ({"frame": "norm_1", **SIZES}, [CAT], "norm_1"),
        ({"layout": "xyxy"}, [{"bbox_2d": [90, 80, 10, 20], "label": "cat"}], "layout"),
        ({}, [{"box_2d": [0, 0, 10, 10], "label": "cat"}], "box_2d"),
    ],
)
def test_a_format_that_contradicts_the_rows_is_a_bad_answer_that_says_so(parm: dict, items: list, told: str) -> None:
    verdict = score(response(items), spec([CAT], parm, map=1.0))
    assert (verdict.status, verdict.accuracy) == ("bad_answer", 0.0)
    assert told in verdict.reason


def test_the_layout_is_the_rows() -> None:
    wanted = spec([CAT, DOG], {"layout": "xywh"}, iou_max_label_first=1.0, map=1.0)
    found = [{**CAT, "bbox_2d": [0, 0, 10, 10]}, {**DOG, "bbox_2d": [50, 50, 20, 20]}]
    assert score(response(found), wanted).accuracy == 1.0
    assert check_gold(wanted) is None
    assert check_gold(spec([{"bbox_2d": [60, 20, 10, 10], "label": "cat"}], {"gold_layout": "xywh"}, map=1.0)) is None
