"""Real runs compared: with their own replay, and with themselves under the same seed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.jobs import ROOT, Job, control
from vtriune.record import archive

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]


def replay(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m learner.replay`, as a user calls it."""
    command = [sys.executable, "-m", "learner.replay", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_replay_of_a_run_with_stale_groups_several_updates_two_ranks_a_kill_a_switch_and_a_resume_is_the_run_bit_for_bit(
    start: Callable[..., Job],
) -> None:
    overrides = [
        "run.steps=12", "policy.mode=off_policy", "policy.max_staleness=2", "policy.update_batch=2", "cluster.learner.procs=2",
        "evaluation.before=false", "evaluation.after=false", "checkpoint.every=5", "checkpoint.keep=5",
    ]  # fmt: skip
    job = start(*overrides)
    job.wait_for_version(2)
    os.kill(job.pid_of("generator"), signal.SIGKILL)
    job.wait_for_version(4)
    control(job.run_folder, "mode=on_policy")
    job.wait_for_version(7)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.finish(60) == 0, job.text()
    job = start(*overrides)
    assert job.finish() == 0, job.text()
    lines = job.lines()
    assert {line["policy/is_off_policy"] for line in lines} == {0.0, 1.0}
    assert max(line["staleness/max"] for line in lines) > 0
    assert max(line["updates/done"] for line in lines) == 4
    assert lines[-1]["version"] == 12
    for last, arguments in ((12, []), (5, ["--until", "5"])):
        done = replay(job.run_folder, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (
            f"of version {last} against {job.run_folder}/checkpoints/step-{last}: the same bit for bit" in done.stdout
        )
        again = [json.loads(line) for line in (job.run_folder / "replay" / "metrics.jsonl").read_text().splitlines()]
        assert [line["version"] for line in again] == list(range(1, last + 1))
        for ours, theirs in zip(again, lines, strict=False):
            known = ours.keys() & theirs.keys() - {"groups/duplicates"}  # Of what arrived twice, the archive holds one.
            of_both = {key for key in known if not key.startswith("time/")}
            assert {"loss", "grad_norm", "lr/llm", "staleness/mean"} <= of_both
            assert {key: ours[key] for key in of_both} == {key: theirs[key] for key in of_both}


OF_THE_CLOCK = ("time/", "throughput/", "memory/")
"""Beginnings of metrics that measure the machine, not the run."""


def test_the_same_seed_twice_gives_the_same_parameters_and_metrics_on_policy_with_one_generator_and_seeded_sampling(
    tmp_path: Path,
) -> None:
    overrides = [
        "run.steps=4",
        "run.seed=5",
        "sampling.seeded=true",
        "policy.filter=zero_variance",
        "checkpoint.every=2",
    ]
    jobs = []
    for name in ("one", "other"):
        # The stores are beside the folder.
        (tmp_path / name).mkdir()
        jobs.append(Job(tmp_path / name, *overrides))
        try:
            assert jobs[-1].finish() == 0, jobs[-1].text()
        finally:
            jobs[-1].end()
    one, other = jobs
    done = replay(one.run_folder, "--locate", other.run_folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained on the same up to version 4" in done.stdout
    assert f"of version 4 against {other.run_folder}/checkpoints/step-4: the same bit for bit" in done.stdout
    lines = [
        [{key: value for key, value in line.items() if not key.startswith(OF_THE_CLOCK)} for line in job.lines()]
        for job in jobs
    ]
    assert lines[0] == lines[1]
    assert len(archive.files(one.run_folder / "rollouts", "version")) == 4
