"""Each rule drops the rows that it speaks of, and no other."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.rows import row
from vtriune.curate.__main__ import PAPER, Asked, curate
from vtriune.curate.balance import BALANCES
from vtriune.curate.difficulty import Difficulty
from vtriune.curate.rules import RULES, Candidate, box_shares
from vtriune.data.schema import parse_row

SIZE = [(200, 100)]


def candidate(gold: str = "7", verifier: str = "mathverify", question: str = "What?", **more: Any) -> Candidate:
    sample, problems = parse_row(
        row(0, more.get("source", "s"), verifier=verifier, ground_truth=gold, answer="", verifier_parm=more.get("parm"),
            prompt=[{"role": "user", "content": f"<image>{question}"}], extra_info={"id": more.get("id", ""), "image_path": None})
    )  # fmt: skip
    assert sample is not None, problems
    return Candidate(sample, SIZE, more.get("tokens"), more.get("difficulty"))


def boxes(*labelled: tuple[str, tuple[float, ...]], **more: Any) -> Candidate:
    gold = json.dumps([{"bbox_2d": list(box), "label": label} for label, box in labelled])
    return candidate(gold, "detection", **more)


SMALL = (0, 0, 10, 10)
CASES: list[tuple[str, Candidate, bool]] = [
    ("multiple_choice", candidate("B"), True),
    ("multiple_choice", candidate("\\boxed{(C)}"), True),
    ("multiple_choice", candidate("7", question="Which?\n(A) 5\n(B) 7"), True),
    ("multiple_choice", candidate("7", question="Which?\nA. 5\nB. 7"), True),
    ("multiple_choice", candidate("AB"), False),
    ("multiple_choice", candidate("7", question="A. Lincoln was born when?"), False),
    ("multiple_choice", candidate("B", "ocr"), False),
    ("true_false", candidate("True."), True),
    ("true_false", candidate("no"), True),
    ("true_false", candidate("north"), False),
    ("answer_symbols", candidate("x=3"), True),
    ("answer_symbols", candidate("(1, 2)"), True),
    ("answer_symbols", candidate("\\boxed{\\frac{1}{2}}"), False),
    ("answer_length", candidate("1" * 21), True),
    ("answer_length", candidate("\\boxed{" + "1" * 20 + "}"), False),
    ("query_length", candidate(tokens=2049), True),
    ("query_length", candidate(tokens=2048), False),
    ("query_length", candidate(), False),
    ("boxes_per_label", boxes(*[("cat", SMALL)] * 11), True),
    ("boxes_per_label", boxes(*[("cat", SMALL)] * 10, *[("dog", SMALL)] * 10), False),
    ("box_area", boxes(("cat", (0, 0, 150, 100))), True),
    ("box_area", boxes(("cat", (0, 0, 100, 100)), ("dog", SMALL)), False),
    ("box_area", boxes(("cat", (0, 0, 900, 900)), parm={"gold_frame": "norm_1000"}), True),
    ("box_area", boxes(("cat", (0, 0, 700, 700)), parm={"gold_frame": "norm_1000"}), False),
    ("phrase_words", boxes(("the man to the left of the dog", SMALL)), True),
    ("phrase_words", boxes(("the man on the left", SMALL)), False),
    ("phrase_words", boxes(("the man to the left of the dog", SMALL), ("dog", SMALL)), False),
    ("ocr_verifies", candidate("", "ocr"), True),
    ("ocr_verifies", candidate("42", "ocr"), False),
    ("solved", candidate(difficulty=Difficulty(8, 8, 8.0)), True),
    ("solved", candidate(difficulty=Difficulty(8, 7, 7.0)), False),
    ("solved", candidate(), False),
    ("boxes_too_hard", boxes(("cat", SMALL), difficulty=Difficulty(8, 0, 0.9)), True),
    ("boxes_too_hard", boxes(("cat", SMALL), difficulty=Difficulty(16, 0, 2.0)), False),
    ("boxes_too_easy", boxes(("cat", SMALL), difficulty=Difficulty(16, 16, 10.1)), True),
    ("boxes_too_easy", boxes(("cat", SMALL), difficulty=Difficulty(8, 8, 5.0)), False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given_row", "goes"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_a_rule_drops_what_it_speaks_of(name: str, given_row: Candidate, goes: bool) -> None:
    assert RULES[name].drops_row(given_row, RULES[name].default) is goes


def test_every_rule_has_a_row_that_it_drops_and_one_that_it_leaves() -> None:
    for name in RULES:
        assert {goes for case, _, goes in CASES if case == name} == {True, False}, name
    assert set(PAPER) <= {*RULES, *BALANCES}


def test_a_share_of_a_picture_is_taken_in_the_frame_of_the_boxes() -> None:
    given_row = boxes(("cat", (0, 0, 0.5, 0.5)), parm={"gold_frame": "norm_1"})
    assert box_shares(given_row.sample.reward, SIZE) == [0.25]


# Balance.


@given(st.lists(st.integers(1, 3), max_size=30), st.floats(0, 2), st.integers(0, 3))
def test_of_single_boxes_at_most_the_share_of_the_others_stays(numbers: list[int], ratio: float, seed: int) -> None:
    rows = [boxes(*[("cat", SMALL)] * number, id=str(place)) for place, number in enumerate(numbers)]
    kept, dropped = curate(rows, [Asked("single_to_multi", ratio)], seed)
    num_multi = sum(1 for number in numbers if number > 1)
    assert len(kept) + len(dropped) == len(rows)
    assert sum(1 for each in kept if not each.is_grounding) == num_multi
    num_single = len(numbers) - num_multi
    assert len(kept) - num_multi == (min(num_single, int(ratio * num_multi)) if num_multi else num_single)


def test_rows_that_come_before_change_no_lot_of_those_behind() -> None:
    rows = [candidate("7", "counting", id=str(number)) for number in range(20)]
    kept, _ = curate(rows, [Asked("per_answer", 5)], 3)
    assert len(kept) == 5
    more, _ = curate(
        [candidate("8", "counting", id=str(number)) for number in range(9)] + rows, [Asked("per_answer", 5)], 3
    )
    assert [each for each in more if each.gold == "7"] == kept
    assert kept != curate(rows, [Asked("per_answer", 5)], 4)[0]


def test_a_rare_label_takes_its_rows_along_and_a_common_one_is_capped() -> None:
    rows = [boxes(("cat", SMALL), id=str(number)) for number in range(12)] + [boxes(("yak", SMALL), ("cat", SMALL))]
    kept, dropped = curate(rows, [Asked("label_tail", 2), Asked("per_label", 7)], 0)
    assert (dropped[0].rule, dropped[0].candidate) == ("label_tail", rows[-1])
    assert len(kept) == 7


def test_a_row_goes_by_the_first_rule_that_drops_it() -> None:
    rows = [candidate("x=3" * 10), candidate("3")]
    kept, dropped = curate(rows, [Asked("answer_length", 20), Asked("answer_symbols", 0)], 0)
    assert (kept, [each.rule for each in dropped]) == (rows[1:], ["answer_length"])
