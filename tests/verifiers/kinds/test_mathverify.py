"""Exact answers: the vectors of their definition, options, and the plain answers that never reach math-verify."""

import pytest

from bench.verifier_cases import library_verdict, math_pairs
from verifiers import RewardOptions, RewardSpec, check_gold, score, validate_spec
from verifiers.kinds.mathverify import nesting_depth
from verifiers.kinds.plain_answers import boxed_answer, decide, is_readable

PAPER = RewardOptions(answer="paper")
VECTORS = [
    ("42", "42", 0),
    (r"\boxed{42}", "42", 1),
    ("The final answer is $42$", "42", 1),
    ("<answer>7</answer>", "7", 0),
    (r"\boxed{1/2}", r"\boxed{0.5}", 1),
    (r"\boxed{12 cm}", "12", 1),
    (r"\boxed{50\%}", "0.5", 1),
    (r"\boxed{hello world}", r"\boxed{hello world}", 1),
    (r"\boxed{43}", "42", 0),
    (r"\boxed{\frac{2}{4}}", "0.5", 1),
    (r"\boxed{x+1}", "$1+x$", 1),
]


@pytest.mark.parametrize(("prediction", "gold", "accuracy"), VECTORS)
def test_vectors_of_the_release(prediction: str, gold: str, accuracy: int) -> None:
    assert score(prediction, RewardSpec(ground_truth=gold), options=PAPER).accuracy == accuracy


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think><think>a</think><answer>b</answer>", 0.75),
        ("<answer>b</answer>", 0.5),
        ("", 0.0),
    ],
)
def test_the_format_counts_tags_that_occur_once(response: str, expected: float) -> None:
    assert score(response, RewardSpec(ground_truth="42")).format == expected


def test_the_stricter_format_wants_each_tag_on_a_line_of_its_own() -> None:
    strict = RewardOptions(format="tags_with_newlines")
    loose, lined = "<think>a</think>\n<answer>b</answer>", "<think>\na\n</think>\n<answer>\nb\n</answer>"
    assert score(loose, RewardSpec(ground_truth="42"), options=strict).format == 0.0
    assert score(lined, RewardSpec(ground_truth="42"), options=strict).format == 1.0


def test_the_reward_weighs_accuracy_and_format_by_the_rows_ratios() -> None:
    spec = RewardSpec(ground_truth="42", accuracy_ratio=0.5, format_ratio=1.5)
    assert score(r"<answer>\boxed{42}</answer>", spec).reward == pytest.approx((0.5 * 1 + 1.5 * 0.5) / 2)


def test_a_gold_that_cannot_be_read_is_a_fault_and_named_by_the_gold_check() -> None:
    for gold, options, told in (
        ("hello", PAPER, r"\boxed{word}"),
        (r"\boxed{41} or \boxed{42}", None, "several"),
        ("?", None, ""),
    ):
        spec = RewardSpec(ground_truth=gold)
        verdict = score(r"\boxed{hello}", spec, options=options)
        assert verdict.status == "fault"
        assert verdict.reward != verdict.reward
        assert told in (check_gold(spec, options=options) or "")
    assert check_gold(RewardSpec(ground_truth=r"\boxed{hello}"), options=PAPER) is None
    assert check_gold(RewardSpec(ground_truth="hello")) is None


def test_nothing_to_read_is_a_bad_answer_and_a_wrong_answer_is_not() -> None:
    assert score("I think 41", RewardSpec(ground_truth="42"), options=PAPER).status == "bad_answer"
    assert score("It is 41, or 42.", RewardSpec(ground_truth="42")).status == "bad_answer"
    assert score(r"\boxed{41}", RewardSpec(ground_truth="42")).status == "ok"


def test_case_is_left_to_math_verify_unless_the_options_or_the_row_fold_it() -> None:
    upper, lower = RewardSpec(ground_truth=r"$\mathbb{R}$"), r"\boxed{\mathbb{r}}"
    assert score(lower, upper).accuracy == 0.0
    assert score(lower, upper, options=RewardOptions(fold_case="all")).accuracy == 1.0
    assert score(lower, RewardSpec(ground_truth=r"$\mathbb{R}$", verifier_parm={"fold_case": "all"})).accuracy == 1.0


def test_a_numeric_tolerance_accepts_close_numbers() -> None:
    spec = RewardSpec(ground_truth="200")
    assert score(r"\boxed{209}", spec).accuracy == 0.0
    assert score(r"\boxed{209}", spec, options=RewardOptions(numeric_tolerance=0.05)).accuracy == 1.0
    assert score(r"\boxed{211}", spec, options=RewardOptions(numeric_tolerance=0.05)).accuracy == 0.0
    assert score(r"\boxed{x}", spec, options=RewardOptions(numeric_tolerance=0.05)).accuracy == 0.0
    assert "fold_case" in (validate_spec(RewardSpec(ground_truth="1", verifier_parm={"foldcase": True})) or "")


def test_plain_answers_are_judged_as_math_verify_judges_them() -> None:
    decided = 0
    for response, gold in math_pairs(700, seed=17):
        answer = boxed_answer(response)
        assert answer is not None, response
        verdict = decide(gold, answer)
        if verdict is not None:
            decided += 1
            assert verdict == library_verdict(response, gold), (response, gold)
            assert is_readable(gold)
    assert decided > 400


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{1} and \boxed{2}",
        r"\boxed{\frac{1}{2}}",
        r"$\boxed{1}$ percent",
        r"$x = \boxed{1}$",
        r"\[\boxed{1}\]",
        r"\boxed{1} so $2$",
        r"\boxed{1} }",
        r"The final answer is $3$. I hope it is correct. \boxed{1}",
        r"\fbox{2} \boxed{1}",
        r"\boxed{1",
    ],
)
def test_a_box_that_may_not_be_the_answer_is_left_to_math_verify(response: str) -> None:
    assert boxed_answer(response) is None


def test_brackets_nested_beyond_reason_are_a_bad_answer_at_once() -> None:
    deep = "\\boxed{" + "(" * 5_000 + "1" + ")" * 5_000 + "}"
    assert nesting_depth(deep) == 5_001
    assert score(deep, RewardSpec(ground_truth="42")).status == "bad_answer"
