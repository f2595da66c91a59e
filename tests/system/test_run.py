"""The whole system as a user starts it: real vLLM, real sockets, real processes, the shipped model on the digits data."""

import json
import os
import signal
import time
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest

from tests.system.jobs import Job, control
from vtriune.data import archive
from vtriune.torchvision_schemas import define_missing_schemas


@pytest.mark.timeout(420)
def test_a_run_stopped_by_ctrl_c_resumes_and_ends_with_everything_it_promises(start: Callable[..., Job]) -> None:
    job = start("run.steps=4")
    job.wait_for_version(1)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.finish(60) == 0, job.text()
    stopped_at = max(line["version"] for line in job.lines())
    assert 1 <= stopped_at < 4
    assert (job.run_folder / "checkpoints" / f"step-{stopped_at:.0f}" / "manifest.json").is_file()
    assert job.left_behind() == []

    again = start("run.steps=4")
    assert again.finish() == 0, again.text()
    assert "held-out reward, before → after" in again.text(), "the first evaluation was before the resume"
    lines = again.lines()
    assert [line["version"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["mismatch/max_abs"] <= 1e-4 for line in lines[1:])
    assert all(line["staleness/max"] == 0 for line in lines[1:])
    assert all(line["publish/canary_max_abs"] <= 1e-4 for line in lines[1:])
    for key in ("update", "reward/mean", "throughput/completions_per_s"):
        assert all(key in line for line in lines[1:]), key
    for line in (lines[0], lines[-1]):
        assert 0 < line["eval/reward/mean"] <= 1
        assert sum(key.startswith("eval/source/") and key.endswith("/reward/mean") for key in line) == 8
    rows = [
        row for path in (again.run_folder / "rollouts").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    trained = {row["group_id"] for row in rows if row["purpose"] == "train"}
    assert trained >= set(range(32))
    define_missing_schemas()
    from transformers import AutoModelForImageTextToText

    exported = again.run_folder / "checkpoints" / "step-4" / "hf"
    assert AutoModelForImageTextToText.from_pretrained(exported).config.model_type == "qwen2_5_vl"
    for path in ("config.yaml", "logs/learner-0.log", "wandb"):
        assert (again.run_folder / path).exists(), path
    assert not (again.run_folder / "failure.json").exists()


@pytest.mark.timeout(420)
def test_off_policy_stays_within_its_bound_survives_kills_is_switched_while_it_runs_and_reports_its_learners_death(
    start: Callable[..., Job],
) -> None:
    overrides = ["policy.mode=off_policy", "policy.max_staleness=2", "evaluation.before=false"]
    # Over TCP, where a restarted process has another address than the one it replaces.
    job = start("run.steps=10000", "cluster.bind=127.0.0.1", *overrides)
    job.wait_for_version(2)
    os.kill(job.pid_of("generator"), signal.SIGKILL)
    job.wait_for_version(5)
    os.kill(job.pid_of("vtriune verifiers"), signal.SIGKILL)
    job.wait_for_version(7)
    assert control(job.run_folder, "mode=on_policy")["requested"] == {"mode": "on_policy", "max_staleness": 0}
    job.wait_for_version(11)
    control(job.run_folder, "mode=off_policy", "max_staleness=1")
    job.wait_for_version(15)
    killed_at = time.monotonic()
    os.kill(job.pid_of("learner"), signal.SIGKILL)
    assert job.finish(30) == 1, job.text()
    assert time.monotonic() - killed_at < 30
    failure = json.loads((job.run_folder / "failure.json").read_text())
    assert (failure["role"], failure["rank"], failure["signal"]) == ("learner", 0, "SIGKILL")
    assert "RUN FAILED in learner 0" in job.text()
    assert job.left_behind() == []

    lines = job.lines()
    assert [line["version"] for line in lines] == list(range(1, len(lines) + 1))
    bounds = [line["policy/max_staleness"] for line in lines]
    assert list(dict.fromkeys(bounds)) == [2, 0, 1], bounds
    # Groups admitted before a switch keep the bound they were admitted under: at 2 there are at most two batches of them.
    for index, line in enumerate(lines):
        assert line["staleness/max"] <= max(bounds[max(index - 2, 0) : index + 1])
        assert line["policy/is_off_policy"] == (line["policy/max_staleness"] > 0)
    assert max(line["staleness/max"] for line in lines) > 0
    assert lines[-1]["generators/deaths"] == 1
    assert lines[-1]["ledger/consumed"] == 8 * len(lines)
    assert lines[-1]["ledger/lost"] == 0
    assert all(line["mismatch/max_abs"] <= 1e-4 for line in lines)
    notes = [archive.notes_of(path) for _, path in archive.files(job.run_folder / "rollouts", "version")]
    # The learner may have died between the archive of a version and its line.
    assert [float(note["max_staleness"]) for note in notes[: len(bounds)]] == bounds
    assert len(notes) - len(bounds) in (0, 1)


@pytest.mark.timeout(60)
def test_a_mistyped_key_is_refused_before_anything_starts(start: Callable[..., Job]) -> None:
    job = start("policy.rolout_batch=3")
    assert job.finish(30) == 2
    assert "did you mean policy.rollout_batch?" in job.text()
    assert not job.run_folder.exists()


@pytest.mark.timeout(120)
def test_a_dry_run_checks_everything_and_starts_no_engine(start: Callable[..., Job]) -> None:
    job = start("--dry-run")
    assert job.finish(100) == 0, job.text()
    assert "fit to run" in job.text()
    assert not job.run_folder.exists()
