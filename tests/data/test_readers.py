"""Files as rows: the same rows whatever format they are in, bad rows by themselves, and of no format a refusal that says what to do."""

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image

from tests.data.rows import encoded
from vtriune.data import DataError
from vtriune.data.readers import BATCH_ROWS, Row, open_table

# Its presence is looked up on disk, where it is broken on machines without an accelerator.
datasets.config.TORCHCODEC_AVAILABLE = False
NUM_ROWS = BATCH_ROWS + 3
PICTURES = [encoded(8, 6, seed) for seed in range(3)]
ROWS = [{"question": f'What is {number}?\tÄ, "quoted"', "answer": str(number)} for number in range(NUM_ROWS)]


def rows(path: Path) -> list[Row]:
    """All rows; the numbers of first rows are checked."""
    found: list[Row] = []
    for first_row, batch in open_table(path).read():
        assert first_row == len(found)
        found += batch
    return found


def written_csv(path: Path, delimiter: str) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def written_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(ROWS):
            add(archive, f"shard/{number:06d}.json", json.dumps(row).encode())
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def lines(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def one_list(path: Path) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode())
    return path


def parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def saved(path: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "Parquet": ("rows.parquet", parquet),
    "JSON lines": ("rows.jsonl", lines),
    "JSON list": ("rows.json", one_list),
    "CSV": ("rows.csv", lambda path: written_csv(path, ",")),
    "TSV": ("rows.tsv", lambda path: written_csv(path, "\t")),
    "datasets": ("saved", saved),
    "tar": ("rows.tar", written_tar),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_rows_are_read_from_every_format(kind: str, tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    path = write(tmp_path / name)
    table = open_table(path)
    assert (table.kind, table.num_rows) == (kind, NUM_ROWS)
    assert {"question", "answer"} <= set(table.columns)
    assert [{**dict(row), "__key__": ""} for row in rows(path)] == [
        row | {"__key__": ""} for row in ROWS
    ] or kind == "tar"
    assert [row["question"] for row in rows(path) if isinstance(row, dict)] == [row["question"] for row in ROWS]


def test_what_a_file_is_its_first_bytes_say_and_not_its_name(tmp_path: Path) -> None:
    assert open_table(lines(tmp_path / "rows.parquet")).kind == "JSON lines"
    assert open_table(parquet(tmp_path / "rows.json")).kind == "Parquet"


def test_datasets_keeps_pictures_and_says_which_split_to_name(tmp_path: Path) -> None:
    data = Dataset.from_dict(
        {"image": [{"bytes": picture, "path": None} for picture in PICTURES], "answer": ["a", "b", "c"]}
    )
    data = data.cast_column("image", Image())
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"holds the splits train, test; name one, as .*both/train"):
        open_table(tmp_path / "both")
    found = rows(tmp_path / "both" / "train")
    assert [row["image"]["bytes"] for row in found if isinstance(row, dict)] == PICTURES
    data.select([2, 0]).save_to_disk(str(tmp_path / "selected"))
    assert [row["answer"] for row in rows(tmp_path / "selected") if isinstance(row, dict)] == ["c", "a"]


def test_members_of_one_key_are_one_row_whatever_their_order(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        add(archive, "a/0001.png", PICTURES[0])
        add(archive, "a/0001.json", b'{"question": "?", "answer": "1", "images": ["0001.png"]}')
        add(archive, "a/0002.json", b'{"question": "!", "answer": "2"}')
        add(archive, "a/0002.left.jpg", PICTURES[1])
        add(archive, "a/0002.right.JPG", PICTURES[2])
        add(archive, "a/0003.json", b"not JSON")
        add(archive, "a/0004.txt", "Größe".encode())
    found = rows(tmp_path / "shard.tar")
    assert found[0] == {"__key__": "a/0001", "question": "?", "answer": "1", "images": [PICTURES[0]]}
    assert dict(found[1])["images"] == PICTURES[1:]
    assert str(found[2]).startswith("a/0003.json is no JSON object")
    assert found[3] == {"__key__": "a/0004", "txt": "Größe"}


def test_a_line_that_cannot_be_read_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"answer": 1}\n\n[1, 2]\n{"answer": \n{"answer": "\xff"}\n{"answer": 5}\n')
    found = rows(path)
    assert [row for row in found if isinstance(row, dict)] == [{"answer": 1}, {"answer": 5}]
    assert [row[:18] for row in found if isinstance(row, str)] == ["is no JSON object "] * 3
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\na,1\nb\nc,3,4\n[1],"{""a"": 2}"\n')
    assert rows(path) == [
        {"question": "a", "answer": "1"}, "has another number of cells than the header's 2",
        "has another number of cells than the header's 2", {"question": [1], "answer": {"a": 2}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.parquet", b"", "it is empty"),
        ("broken.parquet", b"not Parquet at all", "it begins with b'not Parquet at a'"),
        ("broken.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:", "run `git lfs pull`"),
        ("rows.jsonl", b"\x1f\x8b\x08", "unpack it first, `gunzip FILE`"),
        ("refs.p", b"\x80\x04\x95", "it is a pickle"),
        ("rows.parquet", b"<!DOCTYPE html>", "what a failed download left"),
        ("rows.json", b'[{"a": 1}, ', "truncated"),
        ("rows.csv", b"question\n\xff\xfe", "utf-8"),
        ("rows.tar", b"not a tar", "cannot be read"),
    ],
)
def test_what_is_no_file_of_rows_is_refused_with_the_way_on(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        open_table(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: cannot be read (")
    assert said in str(refused.value)


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is a folder, but none that `save_to_disk` wrote; name its files, .*/\*\.parquet"
    ):
        open_table(tmp_path)


def test_base64_in_a_cell_may_be_longer_than_csv_readers_allow_by_themselves(tmp_path: Path) -> None:
    picture = base64.b64encode(encoded(300, 300)).decode()
    (tmp_path / "rows.csv").write_text(f"image,answer\n{picture},1\n")
    expected: list[Any] = [{"image": picture, "answer": "1"}]
    assert rows(tmp_path / "rows.csv") == expected
