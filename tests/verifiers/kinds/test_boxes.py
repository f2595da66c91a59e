"""From text to boxes: what is read, what is recovered, what is dropped."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.kinds.boxes import Answer, Box, gold_boxes, is_valid, parse_boxes, recover_boxes
from verifiers.registry import GoldError
from verifiers.tags import answer_text

SOUND = "[{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}, {'bbox_2d': [5, 6, 7, 8], 'label': 'dog'}]"
CAT, DOG = Box((1.0, 2.0, 3.0, 4.0), "cat"), Box((5.0, 6.0, 7.0, 8.0), "dog")


@pytest.mark.parametrize(
    "text",
    [
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8], "label": "dog"}]',
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}, {'bbox_2d': [5.0, 6, 7, 8], 'label': 'dog'}]",
        "```json\n[{'label': 'cat', 'bbox_2d': [1, 2, 3, 4]}, {'bbox_2d': [5, 6, 7, 8], 'label': 'dog'}]\n```",
        "Here they are: {'bbox_2d': [1, 2, 3, 4], 'label': 'cat'} and {'bbox_2d': [5, 6, 7, 8], 'label': 'dog'}.",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}, {'bbox_2d': [5, 6, 7, 8], 'label': 'dog'}, {'bbox_2d': [9, 9",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}, {'bbox_2d': [9, 9], 'label': 'x'}, {'bbox_2d': [5, 6, 7, 8], 'label': 'dog'}]",
        "[[{'bbox_2d': [[1, 2, 3, 4]], 'label': 'cat'}], {'bbox_2d': (5, 6, 7, 8), 'label': 'dog', 'confidence': 1}]",
        SOUND.replace("}, {", "}, {'bbox_2d': [1, NaN, 3, 4], 'label': 'x'}, {"),
        SOUND.replace("}, {", "}, {'bbox_2d': [3, 2, 1, 4], 'label': 'x'}, {"),
        SOUND.replace("}, {", "}, {'bbox_2d': [1, 2, 3, 1e999], 'label': 'x'}, {"),
    ],
)
def test_the_two_boxes_are_read(text: str) -> None:
    assert parse_boxes(text).boxes == [CAT, DOG]


def test_a_bare_object_is_one_box() -> None:
    assert parse_boxes("{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}") == Answer([CAT])


@pytest.mark.parametrize("label", ["men's shoe", 'a "sign"', "a\\b", "crème brûlée", "狗", "x, y", "a: b"])
def test_a_label_survives_json_and_pythons_own_quoting(label: str) -> None:
    item = {"bbox_2d": [1, 2, 3, 4], "label": label}
    for text in (json.dumps([item]), json.dumps([item], ensure_ascii=False), str([item])):
        assert [box.label for box in parse_boxes(text).boxes] == [label], text


def test_an_unescaped_apostrophe_does_not_lose_the_box() -> None:
    assert parse_boxes("[{'bbox_2d': [1, 2, 3, 4], 'label': 'men's shoe'}]").boxes[0].label == "men's shoe"


def test_recovery_reads_a_label_that_is_spelt_like_the_key_of_the_box() -> None:
    assert recover_boxes('{"label": "bbox_2d", "bbox_2d": [1, 2, 3, 4]}') == [Box((1, 2, 3, 4), "bbox_2d")]


number = st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6)
item = st.fixed_dictionaries(
    {
        "bbox_2d": st.tuples(number, number, number, number).map(list),
        "label": st.text(st.characters(codec="utf-8"), max_size=12),
    }
)


@given(st.lists(item, max_size=6))
def test_recovery_reads_from_sound_json_what_the_decoder_reads(items: list[dict]) -> None:
    # As documented: an opening brace may stand in a label that comes after its box, as the prompts ask for it.
    items = [entry for entry in items if "{" not in entry["label"] or list(entry) == ["bbox_2d", "label"]]
    items = [entry for entry in items if not set(entry["label"]) & set('}"\\')]
    text = json.dumps(items, ensure_ascii=False)
    assert [box for box in recover_boxes(text) if is_valid(box)] == parse_boxes(text).boxes


@given(st.lists(item, min_size=1, max_size=5), st.integers(0, 400))
def test_a_truncated_answer_keeps_its_complete_boxes(items: list[dict], length: int) -> None:
    items = [{**entry, "label": "cat"} for entry in items]
    text = json.dumps(items)
    whole, cut = parse_boxes(text).boxes, parse_boxes(text[:length]).boxes
    assert cut == whole[: len(cut)]
    complete = text[:length].count("}")
    assert len(cut) == sum(
        box.bbox_2d[0] <= box.bbox_2d[2] and box.bbox_2d[1] <= box.bbox_2d[3]
        for box in (Box(tuple(map(float, entry["bbox_2d"])), "cat") for entry in items[:complete])
    )


def test_the_last_pair_of_tags_holds_the_answer() -> None:
    assert answer_text("I write <answer>a</answer>. <answer>b</answer>") == "b"
    assert answer_text("<answer>b</answer> as I closed with </answer>") == "b"
    assert answer_text("quoted <answer> here <answer>b</answer>") == "b"
    assert answer_text("<answer>[1, 2") == "[1, 2"
    assert answer_text("nothing </answer>") is None


def test_only_a_literal_empty_list_is_one() -> None:
    assert parse_boxes(" [] ").is_empty_list
    for text in ("", "[", "[{}]", "[1]", "{}", "none", "[[]]"):
        assert parse_boxes(text) == Answer([]), text


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 20_000,
        "{'bbox_2d':[" * 8_000,
        "bbox_2d" * 14_000,
        "{'bbox_2d': [1,2,3,4], 'label': '" * 3_000,
        "{'bbox_2d': [1,2,3,4], " + "'label':'" * 11_000 + "}",
        "{'bbox_2d': [" + "1" * 100_000 + "]}",
        "'" * 100_000,
    ],
    ids=range(8),
)
def test_hostile_text_takes_time_linear_in_its_length(text: str) -> None:
    started_s = time.perf_counter()
    parse_boxes(text)
    assert time.perf_counter() - started_s < 1.0


def test_a_gold_answer_is_read_whole_or_not_at_all() -> None:
    gold = gold_boxes("<answer> [{'bbox_2d': [1, 2, 3, 4], 'label': \"men's shoe\"}] </answer>")
    assert (gold.coordinates, gold.labels) == ([1.0, 2.0, 3.0, 4.0], ["men's shoe"])
    with pytest.raises(GoldError, match="no list of boxes"):
        gold_boxes("[{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}, {'bbox_2d': [1, 2, 3], 'label': 'dog'}]")


def test_boxes_in_the_layout_that_the_row_names_are_corners_afterwards() -> None:
    text = "[{'bbox_2d': [2, 1, 4, 3], 'label': 'cat'}]"
    assert parse_boxes(text, "yxyx").boxes == [CAT]
    assert parse_boxes("[{'bbox_2d': [1, 2, 2, 2], 'label': 'cat'}]", "xywh").boxes == [CAT]
    assert gold_boxes(text, "yxyx").coordinates == [1, 2, 3, 4]


def test_corners_in_the_wrong_order_are_counted_and_a_gold_of_them_says_what_to_set() -> None:
    text = "[{'bbox_2d': [30, 40, 5, 6], 'label': 'cat'}]"
    assert parse_boxes(text) == Answer([], num_inverted=1)
    with pytest.raises(GoldError, match="gold_layout"):
        gold_boxes(text)
    assert gold_boxes(text, "xywh").coordinates == [30, 40, 35, 46]
