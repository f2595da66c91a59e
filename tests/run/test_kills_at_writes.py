"""SIGKILL before each write of a run: what is left says one thing, and the resumed run has one history without a seam."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from learner.replay import read_run
from tests.run.killed_at_every_write import NUM_VERSIONS
from vtriune.record import archive
from vtriune.record.checkpoint import latest_complete

ROOT = Path(__file__).parents[2]
EVALUATED = [2]


@pytest.fixture(
    scope="module",
    params=[pytest.param(7, marks=pytest.mark.timeout(120)), pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(600)])],
    ids=["every 7th", "every one"],
)  # fmt: skip
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of the write before which it was killed: the run's folder after it was resumed, to its end."""
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-m", "tests.run.killed_at_every_write", str(folder), str(request.param)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {int(path.name): path for path in folder.iterdir() if path.name.isdigit()}
    assert len(found) > 60 / request.param
    return dict(sorted(found.items()))


def versions(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    # A kill may leave a torn line, never one that is not at the end.
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line)["version"] for line in whole.splitlines()]


def archived(run: Path, kind: archive.Kind) -> list[int]:
    return [number for number, _ in archive.files(run / "rollouts", kind)]


def deliveries(run: Path) -> list[tuple[int, int]]:
    """(group, attempt) of everything trained or to be trained on that the archive holds."""
    found: list[tuple[int, int]] = []
    for path in sorted((run / "rollouts").glob("*.parquet")):
        rows: list[dict[str, Any]] = pq.read_table(path, columns=["group_id", "attempt", "purpose"]).to_pylist()
        found += {(row["group_id"], row["attempt"]) for row in rows if row["purpose"] == "train"}
    return found


def test_whatever_the_kill_left_a_line_implies_its_archive_and_a_checkpoint_both_of_all_its_versions(
    runs: dict[int, Path],
) -> None:
    num_checkpoints = Counter[int]()
    for number, run in runs.items():
        killed = run.with_name(f"{number}-killed")
        if not killed.exists():
            continue  # The last one came to its end.
        checkpoint = latest_complete(killed / "checkpoints")
        reached = int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else 0
        lines, files = versions(killed), archived(killed, "version")
        assert lines == list(range(1, len(lines) + 1)), number
        assert files[: len(lines)] == lines, f"killed before write {number}: lines {lines}, archives {files}"
        assert set(archived(killed, "evaluation")) >= {version for version in EVALUATED if version in lines}
        assert len(lines) >= reached, f"killed before write {number}: checkpoint {reached}, lines {lines}"
        num_checkpoints[reached] += 1
    assert set(num_checkpoints) >= {0, 1, 2}


def test_a_resumed_run_has_one_line_one_archive_and_one_evaluation_of_each_version_and_is_replayed_over_the_seam(
    runs: dict[int, Path],
) -> None:
    expected = list(range(1, NUM_VERSIONS + 1))
    for number, run in runs.items():
        assert versions(run) == archived(run, "version") == expected, number
        assert archived(run, "evaluation") == EVALUATED
        assert [batch.order.version for batch in read_run(run)] == [version - 1 for version in expected]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["archive/num_missing"] for line in lines] == [0.0] * NUM_VERSIONS
        assert all("eval/reward/mean" in lines[version - 1] for version in EVALUATED)
        assert not [path for path in run.rglob("*") if path.name.endswith(".partial") or path.name == "journal"]


def test_group_and_attempt_name_one_delivery_however_the_run_was_killed(runs: dict[int, Path]) -> None:
    for number, run in runs.items():
        twice = [key for key, count in Counter(deliveries(run)).items() if count > 1]
        assert not twice, f"killed before write {number}: {twice} are in two files"
