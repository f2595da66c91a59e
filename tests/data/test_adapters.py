"""Rows of the forms that people have become rows of this schema, or are refused with what is to be said for them."""

import base64
import json
from pathlib import Path
from typing import Any

import datasets.config
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image
from hypothesis import given
from hypothesis import strategies as st

from tests.data.rows import encoded, row, write_parquet
from verifiers import RewardSpec
from vtriune.data import DataError, Sample, Store, build_store
from vtriune.data.adapters import Said, recognise
from vtriune.data.build import Input
from vtriune.data.readers import Table
from vtriune.data.schema import PARQUET_SCHEMA, parse_row

# Its presence is looked up on disk, where it is broken on machines without an accelerator.
datasets.config.TORCHCODEC_AVAILABLE = False
PICTURE = encoded(40, 30)
SAID = Said(verifier="mathverify")
QUESTION = "<image>How many?"
EXPECTED = ([("user", QUESTION)], [PICTURE], "7", "mathverify")


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def store_of(path: Path, said: Said = SAID, **options: Any) -> Store:
    return build_store([Input(path, said)], path.parent / "store", **options)


def told(sample: Sample) -> tuple[list[tuple[str, str]], list[bytes], str, str]:
    return [(t.role, t.content) for t in sample.prompt], sample.images, sample.reward.gold, sample.reward.verifier


BASE64 = base64.b64encode(PICTURE).decode()
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "verl": ("verl", {
        "data_source": "geo", "prompt": [{"role": "user", "content": QUESTION}], "images": [BASE64], "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"split": "train", "index": 3},
    }),
    "EasyR1": ("question", {"problem": QUESTION, "answer": "7", "images": [BASE64], "id": 3}),
    "TRL": ("TRL", {"prompt": [{"role": "user", "content": QUESTION}], "solution": "7", "image": BASE64, "id": 3}),
    "TRL, text": ("TRL", {"prompt": "How many?", "solution": "7", "images": [BASE64], "id": 3}),
    "TRL, parts": ("TRL", {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
        "solution": "7", "images": [BASE64], "id": 3,
    }),
    "open-r1": ("TRL", {"problem": "How many?", "solution": "7", "image": f"data:image/png;base64,{BASE64}", "id": 3}),
    "LLaVA": ("LLaVA", {
        "id": "3", "image": "pictures/a.png",
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "7"}],
    }),
    "plain": ("question", {"question": "How many?", "answer": 7, "image": "pictures/a.png", "id": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_each_form_is_the_same_sample(name: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURE)
    form, given = FORMS[name]
    store = store_of(lines(tmp_path / "rows.jsonl", given))
    sample = store.sample(0)
    prompt, *others = told(sample)
    # Where nobody says it, pictures are shown before the question.
    assert [(role, content.replace("<image>\n", "<image>")) for role, content in prompt] == EXPECTED[0]
    assert tuple(others) == EXPECTED[1:]
    assert (sample.sample_id, sample.source) == ("3", "geo" if name == "verl" else "rows")
    assert store.index.files[0].form == f"{form} (JSON lines)"


@pytest.mark.parametrize("name", FORMS)
def test_a_form_whose_rows_name_no_verifier_asks_for_one(name: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", FORMS[name][1])
    with pytest.raises(
        DataError, match=r"name no verifier; say it for the file, as data\.train: \[\{files: .*verifier:"
    ):
        store_of(path, Said())


def test_conversations_keep_their_turns_and_end_with_the_gold_answer(tmp_path: Path) -> None:
    turns = [
        ("system", "Be short."),
        ("human", "<image>What?"),
        ("gpt", "A cat."),
        ("human", "How many?"),
        ("gpt", "7"),
    ]
    given = {"conversations": [{"from": who, "value": what} for who, what in turns], "image": BASE64}
    sample = store_of(lines(tmp_path / "rows.jsonl", given)).sample(0)
    assert [turn.role for turn in sample.prompt] == ["system", "user", "assistant", "user"]
    assert (sample.prompt[3].content, sample.reward.gold) == ("How many?", "7")
    with pytest.raises(DataError, match=r"row 0: conversations: the last turn must be gpt's, which is the gold answer"):
        store_of(lines(tmp_path / "more.jsonl", given | {"conversations": given["conversations"][:-1]}))


def test_what_is_said_of_a_file_goes_before_what_its_rows_say(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [row(0, verifier_parm={"verifier_style": "a"})])
    said = Said(source="mine", verifier="ocr", verifier_parm={"fold_case": "all"}, repeats=3)
    store = store_of(path, said)
    assert len(store) == 3
    sample = store.sample(2)
    assert (sample.source, sample.reward) == (
        "mine",
        RewardSpec("0", "\\boxed{0}", 1.0, 0.1, "ocr", {"verifier_style": "a", "fold_case": "all"}),
    )
    assert store.fingerprint != store_of(path, Said()).fingerprint


def test_a_column_that_is_said_for_the_file_may_be_missing(tmp_path: Path) -> None:
    written = {name: value for name, value in row(0).items() if name != "data_source"}
    path = lines(tmp_path / "train_math_my_set_1_x2.jsonl", {**written, "images": [BASE64]})
    store = store_of(path, Said(source="mine"))
    assert (store.sample(0).source, len(store)) == ("mine", 2)


def test_the_folder_of_shards_says_how_often_and_the_key_overrules_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train_math_my_set_1_x3" / "00000-of-00001.parquet", [row(0)])
    assert len(store_of(path, Said())) == 3
    assert len(store_of(path, Said(repeats=1))) == 1


# Pictures.


@pytest.mark.parametrize(
    "images",
    ["a.png", ["a.png"], [{"bytes": None, "path": "a.png"}], {"path": "a.png"}, BASE64, [{"bytes": BASE64}]],
)
def test_a_picture_may_be_a_path_from_the_files_folder_in_this_schema_too(images: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    path = lines(tmp_path / "rows.jsonl", row(0, images=images))
    assert store_of(path, Said()).sample(0).images == [PICTURE]


def test_paths_in_parquet_begin_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURE)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "?", "answer": "7", "image": "pictures/a.png"}]), path)
    assert store_of(path).sample(0).images == [PICTURE]


def test_the_image_feature_of_datasets_is_read(tmp_path: Path) -> None:
    data = Dataset.from_dict({"question": ["?"], "answer": ["7"], "image": [{"bytes": PICTURE, "path": None}]})
    data.cast_column("image", Image()).save_to_disk(str(tmp_path / "saved"))
    assert store_of(tmp_path / "saved").sample(0).images == [PICTURE]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("https://example.org/a b.png", r"fetch it, `curl -LO 'https://example.org/a b.png'`"),
        ("nowhere.png", r"the picture '.*nowhere\.png' cannot be read \(No such file or directory\); paths begin"),
        (".", r"cannot be read \(Is a directory\)"),
    ],
)
def test_a_picture_that_is_not_there_costs_its_row_and_says_why(image: str, reason: str, tmp_path: Path) -> None:
    good = {"question": "?", "answer": "7", "image": BASE64}
    path = lines(tmp_path / "rows.jsonl", good, good | {"image": image})
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1: .*{reason}"):
        store_of(path)
    assert len(store_of(path, on_bad_row="quarantine")) == 1


def test_a_picture_that_is_changed_makes_the_store_anew(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    path = lines(tmp_path / "rows.jsonl", {"question": "?", "answer": "7", "image": "a.png"})
    first = store_of(path)
    assert store_of(path).fingerprint == first.fingerprint
    (tmp_path / "a.png").write_bytes(encoded(50, 50))
    second = store_of(path)
    assert second.sample(0).images == [encoded(50, 50)]
    assert second.fingerprint != first.fingerprint
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        store_of(path)


# What is no form.


def test_columns_of_no_form_are_named_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no known form\. Known are .* Columns found: text, label"):
        store_of(lines(tmp_path / "rows.jsonl", {"text": "a", "label": 1}))
    with pytest.raises(DataError, match=r"column `reward_model` missing\. Columns found: data_source, images"):
        store_of(lines(tmp_path / "near.jsonl", {n: v for n, v in row(0, images=[]).items() if n != "reward_model"}))


def test_a_marker_that_this_schema_lacks_is_not_made_up(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", row(0, images=[BASE64], prompt=[{"role": "user", "content": "What?"}]))
    assert store_of(path, Said()).sample(0).prompt[0].content == "What?"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("[{"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "from", "value",
        "bytes", "path", "verifier", "verifier_parm", "ground_truth", "style", "id"]) | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
COLUMNS = {
    "this schema": PARQUET_SCHEMA.names,
    "verl": ["data_source", "prompt", "images", "reward_model", "extra_info"],
    "TRL": ["prompt", "solution", "image"],
    "LLaVA": ["conversations", "image"],
    "question": ["question", "answer", "images"],
}


@given(st.data(), st.sampled_from(list(COLUMNS)))
def test_whatever_a_row_holds_it_is_a_sample_or_says_why_not(data: st.DataObject, form: str) -> None:
    columns = COLUMNS[form]
    raw = {name: data.draw(JSON, name) for name in columns}
    table = Table(
        "JSON lines", tuple(columns), 1, PARQUET_SCHEMA if form == "this schema" else None, lambda: iter([(0, [raw])])
    )
    said = Said(verifier="mathverify", verifier_parm=data.draw(st.none() | st.just({"a": 1})))
    read, _ = recognise(table, Path("/nowhere/rows.jsonl"), said).read(raw)
    sample, problems = (None, [read]) if isinstance(read, str) else parse_row(read)
    assert all(isinstance(problem, str) for problem in problems)
    if sample is not None:
        assert msgspec.convert(msgspec.to_builtins(sample), Sample) == sample
