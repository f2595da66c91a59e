"""Archived responses scored anew."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verifiers import RewardSpec, score

ROWS = [
    (r"\boxed{\frac{1}{2}}", {"ground_truth": "0.5", "verifier": "mathverify"}),
    (r"\boxed{41}", {"ground_truth": "42", "verifier": "mathverify"}),
    ("words", {"ground_truth": "words", "verifier": "mathverify"}),
    ("<answer>3</answer>", {"ground_truth": "3", "verifier": "counting"}),
]


def rescored(folder: Path, table: pa.Table) -> subprocess.CompletedProcess[str]:
    pq.write_table(table, folder / "rollouts.parquet")
    command = [
        sys.executable,
        "-m",
        "verifiers.rescore",
        str(folder / "rollouts.parquet"),
        "-o",
        str(folder / "out.parquet"),
    ]
    return subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, timeout=120)


def test_a_file_gets_its_verdicts_beside_its_columns(tmp_path: Path) -> None:
    responses, specs = zip(*ROWS, strict=True)
    done = rescored(
        tmp_path,
        pa.table({"response": responses, "reward_model": [json.dumps(spec) for spec in specs], "kept": range(4)}),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["kept"] for row in out] == [0, 1, 2, 3]
    for row, (response, spec) in zip(out, ROWS, strict=True):
        expected = score(response, RewardSpec(**spec), None)
        assert row["verdict_status"] == expected.status
        assert row["verdict_reward"] == (None if math.isnan(expected.reward) else expected.reward)
        assert json.loads(row["verdict_components"]) == expected.components
    assert "fault" in done.stdout
    assert not list(tmp_path.glob(".*partial"))


def test_a_file_without_its_columns_is_refused_by_name(tmp_path: Path) -> None:
    done = rescored(tmp_path, pa.table({"answer": ["a"]}))
    assert done.returncode == 1
    assert "reward_model" in done.stdout
    assert not (tmp_path / "out.parquet").exists()
