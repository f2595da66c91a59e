"""Which files a run reads: those that it names, whatever characters are in their names."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from vtriune.config.sections.data import Files
from vtriune.data.adapters import Said
from vtriune.data.inputs import data_files
from vtriune.data.schema import DataError


def names(entries: Sequence[str | Files]) -> list[str]:
    return [str(given.path) for given in data_files("data.train", entries)]


def test_a_file_of_the_very_name_is_read_and_only_another_name_is_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows[1].parquet", "rows1.parquet", "a b é*.parquet", "a b éz.parquet"):
        Path(name).touch()
    Path("folder.parquet").mkdir()
    assert names(["rows[1].parquet"]) == ["rows[1].parquet"]
    assert names(["rows[12].parquet"]) == ["rows1.parquet"]
    assert names(["a b é*.parquet"]) == ["a b é*.parquet"]
    assert names(["*.parquet"]) == sorted(name for name in os.listdir() if name != "folder.parquet")
    assert names([f"{tmp_path}/rows?.parquet"]) == [f"{tmp_path}/rows1.parquet"]


def test_a_name_that_is_no_file_and_one_that_comes_twice_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").touch()
    Path("folder").mkdir()
    with pytest.raises(DataError, match=r"data\.train: rows\[1\]\.parquet matches no file"):
        data_files("data.train", ["rows[1].parquet"])
    with pytest.raises(DataError, match=r"data\.test: folder is a folder without a file of \.parquet, \.jsonl"):
        data_files("data.test", ["folder"])
    with pytest.raises(DataError, match=r"data\.train: named twice.*rows\.parquet"):
        data_files("data.train", ["*.parquet", "folder/../rows.parquet"])


def test_a_folder_stands_for_its_files_and_those_of_the_folders_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "rows [1]"
    (folder / "train_math_s_9_x3").mkdir(parents=True)
    for name in ("b.parquet", "a.jsonl", "README.md", "infos.json", "train_math_s_9_x3/00000-of-00001.parquet"):
        (folder / name).touch()
    assert [Path(name).relative_to(folder) for name in names([str(folder)])] == [
        Path("a.jsonl"), Path("b.parquet"), Path("train_math_s_9_x3/00000-of-00001.parquet"),
    ]  # fmt: skip


def test_a_folder_of_json_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "llava.json").touch()
    assert names([str(tmp_path)]) == [f"{tmp_path}/llava.json"]


def test_what_an_entry_says_goes_with_each_of_its_files(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).touch()
    entry = Files(files=[f"{tmp_path}/*.csv"], source="mine", verifier="detection", frame="norm_1000", repeats=2)
    found = data_files("data.train", [entry])
    assert [given.path.name for given in found] == ["a.csv", "b.csv"]
    assert [given.said for given in found] == [Said("mine", "detection", {"gold_frame": "norm_1000"}, 2)] * 2
