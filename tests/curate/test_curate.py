"""`python -m vtriune.curate`, as a user calls it: what is kept is in files of the same schema, what is not is in the report."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from tests.data.rows import row, write_parquet
from tests.record.groups import scored, trajectory, verdict
from vtriune.config import Config
from vtriune.config.load import to_yaml
from vtriune.curate.__main__ import main
from vtriune.data import build_store
from vtriune.record import archive


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_kept_rows_keep_their_columns_and_the_names_say_their_number(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(number, "s", ground_truth="x=3" if number % 3 == 0 else str(number)) for number in range(10)]
    for each in rows:
        each["reward_model"]["answer"] = ""
    write_parquet(folder / "data" / "train_math_s_10_x2.parquet", rows)
    assert main(["data", "--out", "kept", "--rule", "answer_symbols", "--rule", "answer_length=3"]) == 0
    assert "6 of 10 rows kept, in 1 files" in capsys.readouterr().out
    table = pq.read_table(folder / "kept" / "train_math_s_6_x2.parquet")
    assert table.schema == pq.read_schema(folder / "data" / "train_math_s_10_x2.parquet")
    assert [each["extra_info"]["id"] for each in table.to_pylist()] == [f"id-{n}" for n in range(10) if n % 3]
    assert len(build_store([folder / "kept" / "train_math_s_6_x2.parquet"], folder / "store")) == 12
    page = (folder / "kept" / "report.html").read_text()
    assert "6 of 10 rows kept" in page
    assert "answer_symbols: the answer holds one of = [ ] ( ) ;: 4 rows" in page
    assert page.count("<section>") == 4


def test_rows_of_other_forms_are_written_in_this_schema(folder: Path) -> None:
    lines = [{"question": "How many?", "answer": str(number), "id": number} for number in (1, 22, 333)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["rows.jsonl", "--verifier", "counting", "--out", "kept", "--rule", "per_answer"]) == 0
    store = build_store([folder / "kept" / "rows.parquet"], folder / "store")
    assert [store.sample(number).reward.gold for number in range(3)] == ["1", "22", "333"]


def test_difficulty_is_what_a_recorded_run_found(folder: Path) -> None:
    path = write_parquet(folder / "rows.parquet", [row(number, "s") for number in range(3)])
    store = build_store([path], folder / "runs" / "stores")
    groups = []
    for number, rewards in enumerate(([1.0, 1.0], [1.0, 0.0], [None, 1.0])):
        group = scored([verdict(reward) for reward in rewards], [trajectory(), trajectory()], group_id=number)
        lease = replace(group.group.lease, sample=store.ref(number), header=store.header(number))
        groups.append(archive.Archived(0, replace(group, group=replace(group.group, lease=lease))))
    archive.write(folder / "runs" / "mine" / "rollouts", "version", 1, groups)
    (folder / "runs" / "mine" / "config.yaml").write_text(to_yaml(Config()))
    assert main(["rows.parquet", "--out", "kept", "--run", "runs/mine", "--rule", "solved"]) == 0
    assert [each["extra_info"]["id"] for each in pq.read_table(folder / "kept" / "rows.parquet").to_pylist()] == [
        "id-1"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rows.parquet", "--out", "kept"], "no rule named: --rule NAME, or --paper"),
        (
            ["rows.parquet", "--out", "kept", "--rule", "anser_length"],
            "no rule anser_length; there are multiple_choice",
        ),
        (["rows.parquet", "--out", "kept", "--rule", "answer_length=short"], "'short' is no number"),
        (["nowhere.parquet", "--out", "kept", "--paper"], "matches no file"),
        (["rows.parquet", "--out", "kept", "--rule", "solved", "--run", "nowhere"], "is no run folder"),
    ],
)
def test_what_cannot_be_done_says_what_to_write(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(folder / "rows.parquet", [row(0)])
    assert main(words) == 2
    assert said in capsys.readouterr().err
