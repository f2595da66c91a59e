"""`python -m vtriune.data check`, as a user calls it: every row counted once, bad ones listed and written, the page, the exit code."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.data.rows import DETECTION_PARM, MODEL, encoded, row, write_parquet
from vtriune.data.__main__ import main

BOUNDS = ["--model", str(MODEL), "--min-pixels", "784", "--max-pixels", "28224"]
BOXES = "[{'bbox_2d': [4, 4, 20, 30], 'label': 'cat'}, {'bbox_2d': [0, 0, 9, 9], 'label': 'dog'}]"


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["check", *words])
    captured = capsys.readouterr()
    return code, re.sub(r"\s+", " ", captured.out + captured.err)


def boxed(number: int) -> dict[str, Any]:
    return row(number, "boxes", verifier="detection", verifier_parm=DETECTION_PARM, answer="", ground_truth=BOXES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_every_source_is_told_in_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*(row(number, "numbers") for number in range(3)), *(boxed(number) for number in range(3, 5))]
    rows.append(row(5, "numbers", verifier="ocr", ground_truth="5"))
    write_parquet(folder / "train_math_s_6_x2.parquet", rows)
    write_parquet(folder / "test_math_s_1.parquet", [row(2, "numbers")])
    code, text = checked(capsys, ".", *BOUNDS, "--html")
    assert code == 0
    for figure in (
        "train: numbers",
        "rows │ 4, of which an epoch shows 8", "mathverify (3), ocr (1)", "train: boxes", "rows │ 2", "held out: numbers",
        "pictures a row │ 1 (4)", "40x40 · 40x40 · 40x40", "gold boxes a row │ 2 · 2 · 2 · 2; 4 in all",
        "held out: numbers: 1 rows show a picture that is trained on too", "every row can be trained on",
    ):  # fmt: skip
        assert figure in text, figure
    assert re.search(r"prompt tokens │ \d+ · \d+ · \d+ · \d+ of at most 8,192", text)
    page = (folder / "data-check" / "samples.html").read_text()
    assert page.count("<section>") == 7
    assert page.count("<img src=") == 7


def test_what_comes_again_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [row(1), row(1), row(1, extra_info={"id": "other", "image_path": None}), row(2, images=row(1)["images"])]
    write_parquet(folder / "rows.parquet", again)
    code, text = checked(capsys, "rows.parquet")
    assert code == 0
    assert "the same id again │ 1 " in text
    assert "the same picture and question again │ 2 " in text


def test_bad_rows_are_listed_and_written_and_the_exit_code_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        row(1, images=[{"bytes": encoded(40, 40)[:300], "path": None}]),
        row(2, verifier="nobody"),
        row(3, prompt=[]),
    ]
    write_parquet(folder / "rows.parquet", [row(0), *bad, row(4)])
    code, text = checked(capsys, "rows.parquet")
    assert code == 1
    assert "3 rows cannot be trained on:" in text
    table = pq.read_table(folder / "data-check" / "quarantine.parquet").to_pylist()
    assert [line["row"] for line in table] == [1, 2, 3]
    assert all(line["file"] == "rows.parquet" and line["reasons"] for line in table)
    write_parquet(folder / "rows.parquet", [row(0)])
    assert checked(capsys, "rows.parquet")[0] == 0
    assert not (folder / "data-check" / "quarantine.parquet").exists(), "of an earlier check"


def test_what_rows_do_not_say_is_said_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.png").write_bytes(encoded(60, 40))
    line = {
        "question": "Where?",
        "answer": json.dumps([{"bbox_2d": [0, 0, 500, 500], "label": "cat"}]),
        "image": "a.png",
    }
    (folder / "rows.jsonl").write_text(json.dumps(line) + "\n")
    code, text = checked(capsys, "rows.jsonl")
    assert code == 2
    assert "name no verifier" in text
    said = [
        "--verifier",
        "detection",
        "--frame",
        "norm_1000",
        "--source",
        "mine",
        "--verifier-parm",
        '{"frame": "norm_1000"}',
    ]
    code, text = checked(capsys, "rows.jsonl", *said)
    assert code == 0
    assert "read as question (JSON lines)" in text
    assert "train: mine" in text


def test_a_second_look_decodes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(folder / "rows.parquet", [row(number) for number in range(4)])
    first = checked(capsys, "rows.parquet", *BOUNDS)
    monkeypatch.setattr("vtriune.data.pictures.examine", None)
    assert checked(capsys, "rows.parquet", *BOUNDS) == first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check"], "no file named"),
        (["check", "nowhere.parquet"], "matches no file"),
        ([], "usage"),
        (["chekc"], "usage"),
    ],
)
def test_a_command_without_data_says_what_to_write(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_runs_file_says_files_verifiers_model_and_bounds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"<image>How much is {number} + 1?", "answer": str(number + 1)} for number in range(3)]
    for name in ("mine", "held"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(each | {"image": f"{name}.png"}) + "\n" for each in rows)
        )
    (folder / "mine.png").write_bytes(encoded(40, 40))
    (folder / "held.png").write_bytes(encoded(60, 40))
    (folder / "run.yaml").write_text(f"""
        model: {{path: {MODEL}}}
        data:
          train: [{{files: [mine.jsonl], source: sums, verifier: counting}}]
          test: [{{files: [held.jsonl], source: sums, verifier: counting}}]
          min_pixels: 784
          max_pixels: 28224
          max_prompt_tokens: 77
    """)
    code, text = checked(capsys, "run.yaml")
    assert code == 0, text
    assert "train: sums" in text
    assert "held out: sums" in text
    assert "counting" in text
    assert "of at most 77" in text
    for words, beside in ((("--model", "other"), "--model"), (("mine.jsonl",), "mine.jsonl")):
        code, text = checked(capsys, "run.yaml", *words)
        assert code == 2
        assert f"{beside} beside a run's file" in text
    (folder / "run.yaml").write_text("data: {trian: [mine.jsonl]}")
    code, text = checked(capsys, "run.yaml")
    assert code == 2
    assert "trian" in text
