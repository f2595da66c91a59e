"""The verifiers of short answers, each on what it accepts, what it grades and what it refuses."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from shapely.geometry import box as rectangle

from verifiers import RewardOptions, RewardSpec, check_gold, score, validate_spec
from verifiers.answers import only_number, time_span
from verifiers.kinds.temporal import span_iou
from verifiers.registry import AnswerError


def graded(verifier: str, gold: str, response: str, parm: dict | None = None) -> tuple[str, float]:
    spec = RewardSpec(ground_truth=gold, verifier=verifier, verifier_parm=parm)
    assert check_gold(spec) is None
    verdict = score(response, spec)
    return verdict.status, verdict.accuracy


@pytest.mark.parametrize(
    ("response", "status", "accuracy"),
    [
        ("<answer>hello  world</answer>", "ok", 1.0),
        (r"<answer>\boxed{Hello World}</answer>", "ok", 1.0),
        ("<answer>hello wurld</answer>", "ok", 1 - 1 / 11),
        ("<answer>goodbye moon</answer>", "ok", 0.0),
        ("<answer></answer>", "bad_answer", 0.0),
    ],
)
def test_ocr_grades_by_edit_distance(response: str, status: str, accuracy: float) -> None:
    assert graded("ocr", "Hello World", response) == (status, pytest.approx(accuracy))


def test_ocr_takes_the_best_of_several_golds_and_minds_case_when_told() -> None:
    assert graded("ocr", '["stop", "halt"]', "halt") == ("ok", 1.0)
    assert graded("ocr", "Stop", "stop", {"is_case_sensitive": True}) == ("ok", 0.75)
    assert graded("ocr", "abcd", "axyz", {"metric": "similarity"}) == ("ok", 0.25)


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_ocr_similarity_is_rapidfuzzs(found: str, gold: str) -> None:
    if gold.strip().startswith("[") or not gold.strip() or any(mark in found for mark in "<\\"):
        return
    spec = RewardSpec(
        ground_truth=gold, verifier="ocr", verifier_parm={"metric": "similarity", "is_case_sensitive": True}
    )
    a, b = (unicodedata.normalize("NFC", " ".join(text.split())) for text in (found, gold))
    assert score(f"<answer>{found}</answer>", spec).accuracy == (
        pytest.approx(Levenshtein.normalized_similarity(a, b)) if a else 0.0
    )


@pytest.mark.parametrize(
    ("response", "status", "accuracy"),
    [
        ("<answer>B</answer>", "ok", 1.0),
        ("<answer>(b)</answer>", "ok", 1.0),
        ("<answer>**B.** A dog on a lawn</answer>", "ok", 1.0),
        (r"<answer>\boxed{B}</answer>", "ok", 1.0),
        ("The answer is B", "ok", 1.0),
        ("<answer>C</answer>", "ok", 0.0),
        ("<answer>B or C</answer>", "bad_answer", 0.0),
        ("<answer>A or B</answer>", "bad_answer", 0.0),
        ("<answer>A B C D</answer>", "bad_answer", 0.0),
        ("<answer>Not A, so B</answer>", "bad_answer", 0.0),
        ("<answer>a dog</answer>", "bad_answer", 0.0),
    ],
)
def test_multiple_choice_wants_one_letter(response: str, status: str, accuracy: float) -> None:
    assert graded("multiple_choice", "B", response) == (status, accuracy)


@pytest.mark.parametrize(
    ("mode", "response", "status", "accuracy"),
    [
        ("exact", "<answer>4</answer>", "ok", 1.0),
        ("exact", "<answer>There are four sheep</answer>", "ok", 1.0),
        ("exact", "<answer>4 sheep, yes: four</answer>", "ok", 1.0),
        ("exact", "<answer>5</answer>", "ok", 0.0),
        ("relative", "<answer>5</answer>", "ok", 0.75),
        ("relative", "<answer>50</answer>", "ok", 0.0),
        ("relative", "<answer>3 or 4</answer>", "bad_answer", 0.0),
        ("exact", "<answer>many</answer>", "bad_answer", 0.0),
    ],
)
def test_counting_wants_one_number(mode: str, response: str, status: str, accuracy: float) -> None:
    assert graded("counting", "4", response, {"mode": mode}) == (status, accuracy)


@pytest.mark.parametrize(
    ("text", "number"), [("1,234", 1234), ("-3", -3), ("about 2.5 m", 2.5), ("1e3", 1000), ("seven", 7)]
)
def test_numbers_are_read_as_written(text: str, number: float) -> None:
    assert only_number(text) == number


@pytest.mark.parametrize("text", ["", "1 2", "x1", "1e999", "４", "1.2.3"])
def test_what_is_not_one_number_is_refused(text: str) -> None:
    with pytest.raises(AnswerError):
        only_number(text)


@pytest.mark.parametrize(
    ("response", "status", "accuracy"),
    [
        ("<answer>[5, 5]</answer>", "ok", 1.0),
        ("<answer>(5, 5)</answer>", "ok", 1.0),
        ('<answer>{"point_2d": [5, 5], "label": "x"}</answer>', "ok", 1.0),
        ("<answer>[[5, 5]]</answer>", "ok", 1.0),
        ("<answer>[11, 5]</answer>", "ok", 0.0),
        ("<answer>[[5, 5], [50, 50]]</answer>", "bad_answer", 0.0),
        ("<answer>the middle</answer>", "bad_answer", 0.0),
    ],
)
def test_a_point_must_fall_into_the_box(response: str, status: str, accuracy: float) -> None:
    assert graded("point", '{"bbox_2d": [0, 0, 10, 10]}', response) == (status, accuracy)


def test_a_point_may_fall_into_any_of_several_boxes_and_may_be_judged_by_distance() -> None:
    assert graded("point", "[[0, 0, 10, 10], [90, 90, 99, 99]]", "[95, 95]") == ("ok", 1.0)
    assert graded("point", "[5, 5]", "[8, 9]", {"mode": "distance", "max_distance": 10}) == ("ok", 0.5)
    frame = {"frame": "norm_1000", "original_size": [200, 100]}
    assert graded("point", "[0, 0, 100, 50]", "[400, 400]", frame) == ("ok", 1.0)
    assert "max_distance" in (
        validate_spec(RewardSpec(ground_truth="[5, 5]", verifier="point", verifier_parm={"mode": "distance"})) or ""
    )


@pytest.mark.parametrize(
    ("response", "status", "accuracy"),
    [
        ("<answer>[[0, 0], [10, 0], [10, 10], [0, 10]]</answer>", "ok", 1.0),
        ('<answer>{"polygon": [[0, 0], [5, 0], [5, 10], [0, 10]]}</answer>', "ok", 0.5),
        ("<answer>[[20, 20], [30, 20], [30, 30]]</answer>", "ok", 0.0),
        ("<answer>[[0, 0], [1, 1]]</answer>", "bad_answer", 0.0),
        ("<answer>[[0, 0], [1, 1], [2, 2]]</answer>", "bad_answer", 0.0),
    ],
)
def test_polygons_are_judged_by_shared_area(response: str, status: str, accuracy: float) -> None:
    assert graded("polygon", "[[0, 0], [10, 0], [10, 10], [0, 10]]", response) == (status, accuracy)


@given(st.tuples(*[st.integers(0, 20)] * 2), st.tuples(*[st.integers(1, 20)] * 2))
def test_polygon_iou_of_rectangles_is_shapelys(corner: tuple[int, int], size: tuple[int, int]) -> None:
    found = rectangle(*corner, corner[0] + size[0], corner[1] + size[1])
    gold = rectangle(5, 5, 15, 15)
    spec = RewardSpec(ground_truth=str([list(point) for point in gold.exterior.coords]), verifier="polygon")
    expected = found.intersection(gold).area / found.union(gold).area
    assert score(str([list(point) for point in found.exterior.coords]), spec).accuracy == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "status", "accuracy"),
    [
        ("<answer>[10, 20]</answer>", "ok", 1.0),
        ("<answer>from 0:10 to 0:20</answer>", "ok", 1.0),
        ("<answer>15 - 25 s</answer>", "ok", 1 / 3),
        ("<answer>30-40</answer>", "ok", 0.0),
        ("<answer>20 to 10</answer>", "bad_answer", 0.0),
        ("<answer>at 15</answer>", "bad_answer", 0.0),
    ],
)
def test_time_spans_are_judged_by_their_overlap(response: str, status: str, accuracy: float) -> None:
    assert graded("temporal", "[10, 20]", response) == (status, pytest.approx(accuracy))


def test_times_may_be_clock_times() -> None:
    assert time_span("1:02:03 - 01:02:04.5") == (3723.0, 3724.5)
    assert time_span("2:05 to 130") == (125.0, 130.0)
    assert graded("temporal", "[10, 20]", "[10, 15]", {"threshold": 0.5}) == ("ok", 1.0)


@given(*[st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda span: tuple(map(float, sorted(span))))] * 2)
def test_span_iou_counts_shared_seconds(a: tuple[float, float], b: tuple[float, float]) -> None:
    seconds_a, seconds_b = set(range(int(a[0]), int(a[1]))), set(range(int(b[0]), int(b[1])))
    union = (
        len(seconds_a | seconds_b)
        if seconds_a & seconds_b or not (seconds_a or seconds_b)
        else len(seconds_a) + len(seconds_b)
    )
    expected = len(seconds_a & seconds_b) / union if union else float(a == b)
    assert span_iou(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "status", "accuracy"),
    [
        ('<answer>{"name": "Ada", "age": 36}</answer>', "ok", 1.0),
        ("<answer>```json\n{'name': 'Ada', 'age': 36}\n```</answer>", "ok", 1.0),
        ('<answer>{"name": "Ada", "age": 37}</answer>', "ok", 0.5),
        ('<answer>{"name": "Ada"}</answer>', "ok", 0.5),
        ('<answer>{"name": "Ada", "age": 36, "x": 1}</answer>', "ok", 2 / 3),
        ('<answer>["Ada", 36]</answer>', "bad_answer", 0.0),
        ("<answer>Ada, 36</answer>", "bad_answer", 0.0),
    ],
)
def test_json_is_judged_field_by_field(response: str, status: str, accuracy: float) -> None:
    assert graded("json_fields", '{"name": "Ada", "age": 36}', response) == (status, pytest.approx(accuracy))


def test_json_fields_have_kinds_and_weights() -> None:
    parm = {
        "fields": {"age": {"kind": "number", "tolerance": 0.1, "weight": 3}, "name": {"kind": "text"}},
        "allow_extra": True,
    }
    gold = '{"name": "Adas", "age": 36}'
    assert graded("json_fields", gold, '{"name": "Ada", "age": "38", "x": 1}', parm) == (
        "ok",
        pytest.approx((3 + 0.75) / 4),
    )


def test_a_python_function_runs_only_if_the_configuration_lists_it() -> None:
    allowed = RewardOptions(python=("tests.verifiers.user_functions:share_of_words",))
    spec = RewardSpec(
        ground_truth="a b",
        verifier="python",
        verifier_parm={"function": "tests.verifiers.user_functions:share_of_words"},
    )
    assert "rewards.python" in (validate_spec(spec) or "")
    assert score("a", spec).status == "fault"
    assert validate_spec(spec, options=allowed) is None
    verdict = score("a", spec, options=allowed)
    assert (verdict.accuracy, verdict.components) == (0.5, {"num_words": 2.0})
    other = RewardSpec(ground_truth="a", verifier="python", verifier_parm={"function": "os:system"})
    assert score("true", other, options=allowed).status == "fault"


@pytest.mark.parametrize(
    ("verifier", "gold"),
    [
        ("multiple_choice", "Z"),
        ("counting", "many"),
        ("point", "there"),
        ("polygon", "[[0, 0]]"),
        ("temporal", "noon"),
        ("json_fields", "[]"),
        ("json_fields", "{}"),
        ("ocr", "[]"),
    ],
)
def test_a_gold_of_the_wrong_kind_is_a_fault(verifier: str, gold: str) -> None:
    spec = RewardSpec(ground_truth=gold, verifier=verifier)
    assert score("1", spec).status == "fault"
    assert check_gold(spec) is not None
