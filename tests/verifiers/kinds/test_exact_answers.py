"""Exact answers under `rewards.answer: last`: words, units, case and notations as a fair reader takes them; algebra by math-verify."""

import pytest

from verifiers import RewardOptions, RewardSpec, check_gold, score
from verifiers.kinds.exact_answers import decide


@pytest.mark.parametrize(
    ("answer", "gold", "accuracy"),
    [
        ("12 cm", "12", 1),
        ("12", "12 cm", 1),
        ("12 cm", "12 cm", 1),
        (r"12\ \mathrm{cm}^2", "12", 1),
        ("12 cm", "12 m", 0),
        (r"12 \text{ cm}", "12 m", 0),
        ("12 cm^2", r"12 \text{ cm}^{2}", 1),
        (r"7 \text{ apples}", "7", 1),
        (r"45^\circ", "45°", 1),
        ("2x", "2", 0),
        (r"\text{stop}", "stop", 1),
        ("Red.", r"\boxed{red}", 1),
        ("NO PARKING", "no parking", 1),
        ("STRASSE", "Straße", 1),
        ("silent", "listen", 0),
        ("TIXE", "EXIT", 0),
        ("world hello", "hello world", 0),
        ("Main St", "Main St.", 1),
        ("b", "B", 0),
        (r"\Delta", r"\delta", 0),
        (r"50\% off", "50% off", 1),
        ("C++", "C++", 1),
        ("-679", "555-1234", 0),
        ("555-1234", "555-1234", 1),
        ("3:15", "3:15", 1),
        ("3:45", "3:15", 0),
        ("7.0", "7", 1),
        ("1234", "1,234", 1),
        ("1000", "1e3", 1),
        ("-3", "−3", 1),
        (r"\frac{5}{4}", "1 1/4", 1),
        ("5", r"\$5", 1),
        (r"\approx 7", "7", 1),
        ("seven", "7", 1),
        ("3+4=7", "7", 1),
        ("41=42", "42", 0),
        ("x=5", "5", 1),
        ("1+2x", "2x+1", 1),
        ("(2,3)", "(2,3)", 1),
        ("(3,2)", "(2,3)", 0),
        (r"\frac{1}{2006!}", r"$\frac{1}{2004!}$", 0),
        (r"\frac{2}{2^{100}}", r"$\frac{1}{2^{99}}$", 1),
        ("3.14159265", r"$\pi$", 0),
        (r"\frac{9}{7}", r"\dfrac{9}{7}", 1),
    ],
)
def test_a_fair_reader_agrees(answer: str, gold: str, accuracy: int) -> None:
    spec = RewardSpec(ground_truth=gold)
    assert check_gold(spec) is None
    assert score(f"<think>so</think><answer>\\boxed{{{answer}}}</answer>", spec).accuracy == accuracy


@pytest.mark.parametrize(
    ("fold", "same"),
    [("labels", {"word": 1, "letter": 0}), ("all", {"word": 1, "letter": 1}), ("none", {"word": 0, "letter": 0})],
)
def test_which_case_is_folded_is_an_option_of_the_run_and_of_the_row(fold: str, same: dict) -> None:
    for kind, answer, gold in (("word", "Red", "red"), ("letter", "B", "b")):
        spec, of_row = RewardSpec(ground_truth=gold), RewardSpec(ground_truth=gold, verifier_parm={"fold_case": fold})
        assert score(rf"\boxed{{{answer}}}", spec, options=RewardOptions(fold_case=fold)).accuracy == same[kind]
        assert score(rf"\boxed{{{answer}}}", of_row).accuracy == same[kind]


def test_labels_of_boxes_are_words() -> None:
    spec = RewardSpec(ground_truth='[{"bbox_2d": [0, 0, 9, 9], "label": "Traffic light"}]', verifier="detection")
    response = '<answer>[{"bbox_2d": [0, 0, 9, 9], "label": "traffic  LIGHT."}]</answer>'
    assert score(response, spec).accuracy == 1.0
    assert score(response, spec, options=RewardOptions(fold_case="none")).accuracy == 0.0


def test_what_needs_algebra_is_left_to_it() -> None:
    assert decide(r"\frac{1}{2}", "0.5", "labels") is None
    assert decide(r"\frac{}{}", r"\frac{}{}", "labels") is None
    assert decide("42", "42.0", "labels") is True
