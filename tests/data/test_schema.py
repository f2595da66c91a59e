"""The row schema: columns, file names, what a row turns into."""

import base64
import json
import re
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from tests.data.rows import DETECTION_PARM, encoded, row
from vtriune.data.schema import (
    PARQUET_SCHEMA,
    DataError,
    FileName,
    check_columns,
    parse_file_name,
    parse_row,
    without_nulls,
)

WORD = st.text("abcxyz", min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_detection_coco_test_multi_2000", FileName("test", "detection", "coco_test_multi", 2000)),
        ("train_puzzle_puzzlevqa_2648_x2", FileName("train", "puzzle", "puzzlevqa", 2648, 2)),
        ("train_math_mm_math_3539", FileName("train", "math", "mm_math", 3539)),
    ],
)
def test_file_names_are_parsed_from_both_ends(name: str, expected: FileName) -> None:
    assert parse_file_name(Path("train") / f"{name}.parquet") == expected


@given(st.tuples(WORD, WORD, st.lists(WORD, min_size=1).map("_".join), st.integers(0, 10**6), st.integers(1, 9)))
def test_every_file_name_that_is_built_by_the_rule_is_read_back(parts: tuple[str, str, str, int, int]) -> None:
    split, task, source, num_rows, repeats = parts
    name = f"{split}_{task}_{source}_{num_rows}_x{repeats}.parquet"
    assert parse_file_name(name) == FileName(split, task, source, num_rows, repeats)


@pytest.mark.parametrize("name", ["mydata", "train_math_5", "train_math_source", "a__b_5", "train_math_s_5_x0"])
def test_a_file_name_of_another_form_means_nothing(name: str) -> None:
    assert parse_file_name(f"{name}.parquet") is None


@pytest.mark.parametrize("column", ["data_source", "images", "prompt", "reward_model"])
def test_a_missing_column_is_named_with_its_file(column: str) -> None:
    schema = PARQUET_SCHEMA.remove(PARQUET_SCHEMA.get_field_index(column))
    with pytest.raises(DataError, match=rf"data\.parquet: column `{column}` is missing"):
        check_columns(schema, "data.parquet")
    check_columns(schema, "data.parquet", {column})


@pytest.mark.parametrize("column", ["ability", "extra_info"])
def test_columns_that_nothing_depends_on_may_be_missing(column: str) -> None:
    check_columns(PARQUET_SCHEMA.remove(PARQUET_SCHEMA.get_field_index(column)), "data.parquet")


def test_a_missing_field_and_a_wrong_type_are_named_together() -> None:
    schema = PARQUET_SCHEMA.set(1, pa.field("images", pa.int8()))
    schema = schema.set(4, pa.field("reward_model", pa.struct([("answer", pa.string()), ("verifier", pa.string())])))
    with pytest.raises(DataError, match=r"`images` is int8, not a list.*`reward_model` lacks the field `ground_truth`"):
        check_columns(schema, "data.parquet")


def test_wide_types_and_extra_columns_are_accepted() -> None:
    schema = PARQUET_SCHEMA.set(0, pa.field("data_source", pa.large_string())).append(pa.field("more", pa.int8()))
    images = pa.field("images", pa.large_list(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])))
    check_columns(schema.set(1, images), "data.parquet")


def test_a_row_becomes_a_sample() -> None:
    sample, problems = parse_row(row(3, verifier="detection", verifier_parm=DETECTION_PARM))
    assert problems == []
    assert sample is not None
    assert (sample.source, sample.sample_id, len(sample.images)) == ("digits", "id-3", 1)
    assert sample.reward.gold == "\\boxed{3}"
    assert sample.reward.verifier_parm is not None
    assert "verifier_style" not in sample.reward.verifier_parm


def test_a_row_may_have_no_image_and_leave_the_ratios_to_their_defaults() -> None:
    sample, problems = parse_row(row(images=None, accuracy_ratio=None, format_ratio=None, extra_info=None))
    assert problems == []
    assert sample is not None
    assert (sample.images, sample.reward.accuracy_ratio, sample.reward.format_ratio, sample.sample_id) == (
        [],
        1.0,
        0.1,
        "",
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_source": None}, "data_source is None"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [{"role": "user", "content": None}]}, r"prompt\[0\] has role 'user' and content None"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "must be the user's"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, r"images\[0\] has no bytes \(path 'a.png'\)"),
        ({"reward_model": None}, "reward_model is null"),
        ({"verifier": None}, "reward_model.verifier is null"),
        ({"format_ratio": float("nan")}, "must be finite"),
    ],
)
def test_a_row_that_is_no_sample_says_why(changes: dict[str, object], reason: str) -> None:
    sample, problems = parse_row(row(**changes))
    assert sample is None
    assert len(problems) == 1
    assert re.search(reason, problems[0])


@given(st.decimals(-1000, 1000, places=3).map(float))
def test_a_decimal_stored_as_float32_is_read_as_that_decimal(value: float) -> None:
    assert without_nulls(float(np.float32(value))) == value


@given(st.floats(allow_nan=False))
def test_a_float64_that_is_no_float32_is_left_alone(value: float) -> None:
    with np.errstate(over="ignore"):
        is_float32 = float(np.float32(value)) == value
    cleaned = without_nulls(value)
    assert np.float32(cleaned) == np.float32(value) if is_float32 else cleaned == value


def test_nulls_are_dropped_at_every_depth() -> None:
    assert without_nulls({"a": None, "b": {"c": None}, "d": [{"e": None, "f": 0}]}) == {"d": [{"f": 0}]}


PICTURE = encoded(40, 40, 3)
TEXT = "<image>What is number 3?"
SAME_ROW: dict[str, dict[str, object]] = {
    "a prompt that is text": {"prompt": TEXT},
    "turns as JSON": {"prompt": json.dumps([{"role": "user", "content": TEXT}])},
    "content parts": {
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is number 3?"}],
            }
        ]
    },
    "bytes alone": {"images": [PICTURE]},
    "a single picture": {"images": {"bytes": PICTURE, "path": None}},
    "a single picture's bytes": {"images": PICTURE},
    "base64": {"images": [base64.b64encode(PICTURE).decode()]},
    "a data: address": {"images": ["data:image/png;base64," + base64.b64encode(PICTURE).decode()]},
    "base64 in the struct": {"images": [{"bytes": base64.b64encode(PICTURE).decode(), "path": None}]},
    "a gold that is an int": {"answer": 3},
    "parameters as JSON": {"verifier_parm": "{}"},
    "no parameters as JSON": {"verifier_parm": "null"},
}


@pytest.mark.parametrize("form", SAME_ROW)
def test_a_form_that_can_mean_one_thing_only_is_that_row(form: str, tmp_path: Path) -> None:
    path = tmp_path / "form.parquet"
    pq.write_table(pa.Table.from_pylist([row(3, **SAME_ROW[form])]), path)
    check_columns(pq.read_schema(path), path)
    sample, problems = parse_row(pq.read_table(path).to_pylist()[0])
    assert problems == []
    assert sample is not None
    usual, _ = parse_row(row(3))
    assert usual is not None
    assert msgspec.structs.replace(sample, reward=usual.reward) == usual
    assert (sample.reward.answer, sample.reward.gold) == ("3", "\\boxed{3}")
    assert not sample.reward.verifier_parm


def test_parameters_as_json_are_those_parameters() -> None:
    as_json, as_struct = (
        parse_row(row(3, verifier="detection", verifier_parm=parm))[0]
        for parm in (json.dumps(DETECTION_PARM), DETECTION_PARM)
    )
    assert as_json is not None
    assert as_json == as_struct


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"prompt": [{"role": "system", "content": "<image>"}, {"role": "user", "content": "?"}]},
            r"prompt\[0\] of 'system' holds <image>; only a turn of 'user' shows pictures",
        ),
        (
            {"prompt": [{"role": "tool", "content": "7"}, {"role": "user", "content": "<image>"}]},
            r"prompt\[0\] is a turn of 'tool'; write what it says",
        ),
        ({"prompt": [{"role": "user", "content": "<video>"}]}, r"prompt\[0\] holds <video>.*not read"),
        ({"prompt": [{"role": "user", "content": "<image 1>"}]}, r"prompt\[0\] holds <image 1>.*write <image> where"),
        ({"prompt": [{"role": "user", "content": "<image_2>"}]}, r"prompt\[0\] holds <image_2>"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video", "text": None}]}]},
            r"prompt\[0\] has role 'user' and content \[.*pictures in the column `images`",
        ),
        ({"images": ["photos/a.png"]}, r"images\[0\] has no bytes \(path 'photos/a.png'\); embed"),
        ({"images": ["https://a.org/a.png"]}, r"images\[0\] has no bytes .*; embed"),
        ({"verifier_parm": "{"}, r"verifier_parm is text that is no JSON object"),
        ({"verifier_parm": "[1]"}, r"verifier_parm, as JSON: Expected `object"),
        ({"ground_truth": True}, r"reward_model: Expected `str`, got `bool`"),
    ],
)
def test_a_form_that_cannot_be_taken_is_refused_with_the_way_on(changes: dict[str, object], reason: str) -> None:
    sample, problems = parse_row(row(**changes))
    assert sample is None
    assert re.search(reason, "; ".join(problems)), problems
