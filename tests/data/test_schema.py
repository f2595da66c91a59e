"""The row schema: columns, file names, what a row turns into."""

import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from tests.data.rows import DETECTION_PARM, row
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


@pytest.mark.parametrize("column", PARQUET_SCHEMA.names)
def test_a_missing_column_is_named_with_its_file(column: str) -> None:
    schema = PARQUET_SCHEMA.remove(PARQUET_SCHEMA.get_field_index(column))
    with pytest.raises(DataError, match=rf"data\.parquet: column `{column}` is missing"):
        check_columns(schema, "data.parquet")


def test_a_missing_field_and_a_wrong_type_are_named_together() -> None:
    schema = PARQUET_SCHEMA.set(1, pa.field("images", pa.binary()))
    schema = schema.set(4, pa.field("reward_model", pa.struct([("answer", pa.string()), ("verifier", pa.string())])))
    with pytest.raises(
        DataError, match=r"`images` is binary, not a list.*`reward_model` lacks the field `ground_truth`"
    ):
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
