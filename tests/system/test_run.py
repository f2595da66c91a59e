"""The whole system as a user starts it: real vLLM, real sockets, real processes, the shipped model on the digits data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
import pyarrow.parquet as pq
import pytest

from tests.system.jobs import Job, control
from vtriune.messages import TrainOrder
from vtriune.record import archive, open_run
from vtriune.record.checkpoint import all_steps
from vtriune.run.stopwatch import Part
from vtriune.torchvision_schemas import define_missing_schemas

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(420)
def test_a_run_stopped_by_ctrl_c_resumes_and_ends_with_everything_it_promises(start: Callable[..., Job]) -> None:
    job = start("run.steps=90", "checkpoint.every=1")
    job.wait_for_version(2)
    assert job.readers_of_stdin() == []
    second = start("run.steps=90", "--fresh")
    assert second.finish(60) == 2
    assert f"is being run by pid {job.process.pid} on " in second.text()
    os.kill(job.process.pid, signal.SIGINT)
    assert job.finish(60) == 0, job.text()
    stopped_at = int(max(line["version"] for line in job.lines()))
    assert 2 <= stopped_at < 90
    checkpoints = [path.name for path in all_steps(job.run_folder / "checkpoints")]
    assert checkpoints == [f"step-{version}" for version in (stopped_at - 1, stopped_at)]
    assert job.left_behind() == []

    # From the one before the last, and otherwise than before.
    last = stopped_at + 1
    again = start(f"run.steps={last}", "checkpoint.every=0", "loss.clip_high=0.3", "--resume-from", checkpoints[0])
    assert again.finish() == 0, again.text()
    assert "loss.clip_high: 0.28 → 0.3\n" in again.text()
    aside = again.run_folder / f"after-{checkpoints[0]}.1"
    assert [path.name for path in (aside / "checkpoints").iterdir()] == [checkpoints[1]]
    assert [path.name for path in (aside / "rollouts").iterdir()] == [f"version-{stopped_at:06}.parquet"]
    assert f"what the run had made after {checkpoints[0]} is in {aside}" in again.text()
    assert "held-out reward, before → after" in again.text(), "the first evaluation was before the resume"
    lines = again.lines()
    assert [line["version"] for line in lines] == list(range(last + 1))
    assert all(line["mismatch/max_abs"] <= 1e-4 for line in lines[1:])
    assert all(line["staleness/max"] == 0 for line in lines[1:])
    assert all(line["publish/canary_max_abs"] <= 1e-4 for line in lines[1:])
    of_verifiers = ("verifiers/num_samples", "verifiers/num_restarts", "time/verifiers/mathverify/latency_p99_s")
    for key in ("update", "reward/mean", "throughput/completions_per_s", *of_verifiers):
        assert all(key in line for line in lines[1:]), key
    for line in (lines[0], lines[-1]):
        assert 0 < line["eval/reward/mean"] <= 1
        assert sum(key.startswith("eval/source/") and key.endswith("/reward/mean") for key in line) == 8
    rows = [
        row for path in (again.run_folder / "rollouts").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    trained = {row["group_id"] for row in rows if row["purpose"] == "train"}
    assert trained >= set(range(8 * last))
    recorded = open_run(again.run_folder)
    answers = list(recorded.answers("version", last))
    assert len(answers) == 8 * 4
    for answer in answers:
        sample = recorded.sample(answer)
        assert (sample.source, sample.reward) == (answer.header.source, answer.header.reward)
        in_file = pq.read_table(ROOT / answer.header.file).slice(answer.header.file_row, 1).to_pylist()[0]
        assert in_file["extra_info"]["id"] == sample.sample_id == answer.header.sample_id
        assert [image["bytes"] for image in in_file["images"]] == sample.images
    assert [line["version"] for line in recorded.metrics()] == list(range(last + 1))
    for name in (f"version-{last:06}", f"evaluation-{last:06}"):
        archived, again_scored = again.run_folder / "rollouts" / f"{name}.parquet", again.run_folder / f"{name}.parquet"
        command = [sys.executable, "-m", "verifiers.rescore", str(archived), "-o", str(again_scored)]
        subprocess.run(command, check=True, timeout=120)
        rescored = pq.read_table(again_scored).to_pylist()
        assert [row["verdict_reward"] for row in rescored] == [row["reward"] for row in rescored]
        assert any(row["image_sizes"] for row in rescored)
    define_missing_schemas()
    from transformers import AutoModelForImageTextToText

    exported = again.run_folder / "checkpoints" / f"step-{last}" / "hf"
    assert AutoModelForImageTextToText.from_pretrained(exported).config.model_type == "qwen2_5_vl"
    for path in ("config.yaml", "logs/learner-0.log", "wandb"):
        assert (again.run_folder / path).exists(), path
    assert not (again.run_folder / "failure.json").exists()

    once_more = start(f"run.steps={last}")
    assert once_more.finish(60) == 0
    assert "job is finished: its results are in" in once_more.text()
    assert once_more.lines() == lines


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
    # Not after so many versions: of how many the groups are admitted already depends on when the switch comes.
    job.wait_for(lambda: job.lines()[-1]["policy/max_staleness"] == 0, "a batch admitted on-policy")
    control(job.run_folder, "mode=off_policy", "max_staleness=1")
    job.wait_for(lambda: job.lines()[-1]["policy/max_staleness"] == 1, "a batch admitted off-policy again")
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
    # Of the batches: groups admitted before a switch keep the bound they were admitted under.
    bounds = [line["policy/max_staleness"] for line in lines]
    assert list(dict.fromkeys(bounds)) == [2, 0, 1], bounds
    for line in lines:
        assert line["staleness/max"] <= line["policy/max_staleness"]
        assert line["policy/is_corrected"] == (line["policy/max_staleness"] > 0)
        parts = [line[f"time/{part}_s"] for part in get_args(Part)]
        assert sum(parts) == pytest.approx(line["time/step_s"], abs=1e-9, rel=0)
    modes = [line["policy/is_off_policy"] for line in lines]
    assert [mode for mode, before in zip(modes, [None, *modes], strict=False) if mode != before] == [1.0, 0.0, 1.0]
    assert max(line["staleness/max"] for line in lines) > 0
    assert lines[-1]["generators/deaths"] == 1
    assert lines[-1]["ledger/consumed"] == 8 * len(lines)
    assert lines[-1]["ledger/lost"] == 0
    # Absent where nothing was compared: a batch without a token of its learner's version, a publish without a generator.
    for key in ("mismatch/max_abs", "publish/canary_max_abs"):
        assert max(line[key] for line in lines if key in line) <= 1e-4
    notes = [archive.notes_of(path) for _, path in archive.files(job.run_folder / "rollouts", "version")]
    # The learner may have died between the archive of a version and its line.
    orders = [msgspec.json.decode(note[archive.ORDER], type=TrainOrder) for note in notes]
    assert [order.max_staleness for order in orders[: len(bounds)]] == bounds
    assert [float(order.mode == "off_policy") for order in orders[: len(bounds)]] == modes
    progress = [line["progress"] for line in lines]
    assert [order.progress[-1] for order in orders[: len(progress)]] == progress == sorted(progress)
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
