"""The one reader of the answer: what it takes for it, in whatever a model writes, and that nothing written can hurt it."""

import contextlib
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from verifiers import RewardOptions, RewardSpec, check_gold, score
from verifiers.answers import final_text, gold_text, read_answer
from verifiers.registry import AnswerError, GoldError
from verifiers.tags import conclusion

BOXES = '[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]'
OTHER = '[{"bbox_2d": [50, 50, 60, 60], "label": "cat"}]'
SPECS = {
    "mathverify": RewardSpec(ground_truth="42"),
    "counting": RewardSpec(ground_truth="42", verifier="counting"),
    "ocr": RewardSpec(ground_truth="42", verifier="ocr"),
    "multiple_choice": RewardSpec(ground_truth="B", verifier="multiple_choice"),
    "detection": RewardSpec(ground_truth=BOXES, verifier="detection"),
    "point": RewardSpec(ground_truth="[0, 0, 10, 10]", verifier="point"),
}
RIGHT = dict.fromkeys(SPECS, "42") | {"multiple_choice": "B", "detection": BOXES, "point": "[5, 5]"}
WRONG = dict.fromkeys(SPECS, "41") | {"multiple_choice": "C", "detection": OTHER, "point": "[90, 90]"}


@pytest.mark.parametrize(
    ("response", "gold", "accuracy"),
    [
        (r"<think>It is \boxed{42}.</think><answer>17</answer>", "42", 0),
        (r"<think>\boxed{42}</think> It is 17.", "42", 0),
        (r"<think><answer>42</answer></think>\boxed{17}", "42", 0),
        (r"<think>\boxed{41}? No.</think><answer>\boxed{42}</answer>", "42", 1),
        ("<answer>7</answer>", "7", 1),
        (r"\boxed{42} (I used \boxed{} as asked)", "42", 1),
        (r"\boxed{41} and then finally \boxed{42}", "42", 1),
        (r"\boxed{41}\boxed{42}", "42", 0),
        (r"$\boxed{41}$ or $\boxed{42}$", "42", 0),
        (r"$\boxed{41}$ or $\boxed{42}$", "41", 0),
        (r"\boxed{41}, \boxed{42}", "42", 0),
        ("\\boxed{41}\n\\[\\boxed{42}\\]", "42", 0),
        (r"\boxed{41} \text{ and } \boxed{42}", "42", 0),
        (r"\boxed{41}\boxed{}\boxed{42}", "42", 0),
        (r"\boxed{42}, \boxed{ 42 }", "42", 1),
        ("boxed{42}", "42", 0),
        (r"\fbox{42}", "42", 1),
        (r"\boxed{\boxed{42}}", "42", 1),
        (r"\boxed{42", "42", 1),
        (r"\boxed{\frac{84}{2}} { \boxed{", "42", 1),
        (r"<think>\boxed{42}</think>", "42", 1),
        ("<think>42</think>", "42", 1),
        ("<think>42", "42", 1),
        (r"<think>maybe $42$</think><answer>\boxed{}</answer>", "42", 0),
        (r"<think>maybe $42$</think><answer>\boxed{\frac{}{}}</answer>", "42", 0),
        ("<answer>41</answer> No: <answer>42</answer>", "42", 1),
        ("<answer>42", "42", 1),
        ("<answer>The answer is $42$, by 3 steps.</answer>", "42", 1),
        ("<answer>$41$ or $42$</answer>", "42", 0),
        ("<answer>It is 42.</answer>", "42", 1),
        ("<answer>41 or 42</answer>", "42", 0),
        ("1, 2, 3\nIt is 42.\n", "42", 1),
        ("I think it could be 17, or $42$", "42", 0),
        ("It is 42." + " " * 10 + "x" * 512, "42", 0),
        ("42" + "\n" * 600, "42", 1),
        ("", "42", 0),
        ("<answer>42 or 41</answer>", "42", 0),
        ("<answer>Gate of the 12</answer>", "gate of the 12", 1),
        ("<answer>1, 2</answer>", "1, 2", 1),
        ("<answer>costs $5 or so, in \\(x\\) steps: \\[42\\]</answer>", "42", 1),
        (r"\boxed{" + "1+" * 2_000 + "1}", "2001", 0),
    ],
)
def test_what_counts_as_the_answer(response: str, gold: str, accuracy: int) -> None:
    assert score(response, RewardSpec(ground_truth=gold)).accuracy == accuracy


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (r"<answer>\boxed{\text{stop}}</answer>", "stop"),
        ("<answer> $B$ </answer>", "B"),
        ("<think>a</think>\nfirst line\n\nlast line \n", "last line"),
        (r"<answer>it reads \boxed{STOP}, I say</answer>", "STOP"),
    ],
)
def test_other_verifiers_read_the_same_text(response: str, text: str) -> None:
    assert final_text(response) == text


def test_gold_and_answer_are_read_alike() -> None:
    for gold in (r"\boxed{\text{stop}}", "<answer>stop</answer>", "stop"):
        assert gold_text(gold) == "stop"
        for verifier in ("ocr", "mathverify"):
            spec = RewardSpec(ground_truth=gold, verifier=verifier)
            assert check_gold(spec) is None
            assert score(r"<answer>\boxed{stop}</answer>", spec).accuracy == 1.0
    with pytest.raises(GoldError, match="several"):
        gold_text(r"\boxed{1} or \boxed{2}")


def test_what_follows_the_last_end_of_thought_is_read_and_where_nothing_does_the_text_before_it() -> None:
    assert conclusion("a</think>b</think> c") == " c"
    assert conclusion("<think>a</think>\n ") == "\na"
    assert conclusion("abc") == "abc"


noise = st.text(max_size=30) | st.sampled_from(
    [
        r"\boxed{41}",
        "<answer>",
        "</answer>",
        "<answer>41</answer>",
        "</think>",
        "<think>",
        "$41$",
        "\n",
        "41",
        "{",
        "}",
        "\\boxed{",
    ]
)


@pytest.mark.parametrize("verifier", SPECS)
@given(parts=st.lists(noise, max_size=8))
@example(parts=["<answer>"])
def test_nothing_quoted_in_the_reasoning_changes_a_score(verifier: str, parts: list[str]) -> None:
    spec, thought = SPECS[verifier], "".join(parts)
    for body, accuracy in ((RIGHT[verifier], 1.0), (WRONG[verifier], score(WRONG[verifier], spec).accuracy)):
        verdict = score(f"<think>{thought}</think><answer>{body}</answer>", spec)
        assert verdict.accuracy == accuracy < 1.0 or verdict.accuracy == 1.0 == accuracy


@pytest.mark.parametrize("verifier", SPECS)
@given(parts=st.lists(noise, max_size=12))
def test_no_response_raises(verifier: str, parts: list[str]) -> None:
    assert score("".join(parts), SPECS[verifier]).status in ("ok", "bad_answer")


@given(st.text())
def test_reading_an_answer_gives_a_text_or_says_why_not(text: str) -> None:
    for read in (read_answer, final_text):
        with contextlib.suppress(AnswerError):
            read(text)
    with contextlib.suppress(GoldError):
        gold_text(text)


SIZE = 1_000_000


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed{",
        r"\boxed{}",
        r"\boxed{1}",
        r"\boxed{1} or ",
        "{",
        "}",
        r"\boxed",
        r"\boxed ",
        "<answer>",
        "</answer>",
        "</think>",
        "<answer></answer>",
        "$",
        "$$ ",
        r"\(",
        r"\[",
        "1 ",
        "a b ",
        "\n",
        " ",
        "**",
        r"\text{",
        "1,",
        "12 ",
        "\\",
        "\\frac{",
    ],
)
@pytest.mark.parametrize("frame", ["%s", "<answer>%s</answer>", r"<answer>\boxed{%s}</answer>", "<answer>%s"])
def test_reading_takes_time_linear_in_the_response(unit: str, frame: str) -> None:
    from verifiers.kinds.exact_answers import decide, expression_of

    response = frame % (unit * (SIZE // len(unit)))
    started_s = time.process_time()
    with contextlib.suppress(AnswerError):
        decide("42", expression_of(response), "labels")
    assert time.process_time() - started_s < 4.0


def test_detection_takes_the_last_pair_under_both_rules() -> None:
    response = f"<think>I write <answer>{OTHER}</answer>.</think><answer>{OTHER}</answer> No: <answer>{BOXES}</answer>"
    for rule in ("last", "paper"):
        assert score(response, SPECS["detection"], options=RewardOptions(answer=rule)).accuracy == 1.0
