"""Difficulty by sampling: vLLM answers rows of the demo with the demo's model, and rules go by what the answers are worth."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from examples.digits.build import write

ROOT = Path(__file__).parents[2]


def test_a_model_answers_every_row_and_what_it_mostly_gets_right_goes(tmp_path: Path) -> None:
    """The demo's model reads sums right about half of the time, so that some rows are mostly right and some are not."""
    files = [str(path) for path in write(tmp_path / "data", {"train": 32, "test": 1}, 0) if "train_math" in path.name]
    nameless = tmp_path / "nameless.jsonl"
    nameless.write_text(json.dumps({"question": "2 + 2 = ?", "answer": "4"}) + "\n")
    kept = tmp_path / "kept"
    # Seeded, and more prompts than fit in one step of the engine.
    file = tmp_path / "seeded.yaml"
    file.write_text(
        (ROOT / "examples" / "digits.yaml").read_text().replace("\nsampling:\n", "\nsampling:\n  seeded: true\n")
    )
    command = [
        sys.executable,
        "-m",
        "vtriune.curate",
        *files,
        str(nameless),
        "--out",
        str(kept),
        "--rule",
        "solved=0.5",
    ]
    sample = ["--verifier", "mathverify", "--sample", str(file), "--answers", "4"]
    ended = subprocess.run([*command, *sample], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "32 of 32 rows answered" in ended.stderr
    assert "1 of 33 rows have no id" in ended.stderr
    found = re.search(r"(\d+) of 33 rows kept", ended.stdout)
    assert found is not None
    assert 2 < int(found[1]) < 30
    assert sum(pq.read_table(path).num_rows for path in kept.glob("*.parquet")) == int(found[1])
    assert (kept / "nameless.parquet").exists(), "what is not known to be easy stays"
    assert f"{33 - int(found[1])} rows" in (kept / "report.html").read_text()


def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "vtriune.curate", "x.parquet", "--out", "kept", "--rule", "solved", "--sample", "no.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "no.yaml: cannot be read" in ended.stderr
    assert not list(tmp_path.iterdir())
