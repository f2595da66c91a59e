"""Long work is no stall and a hang is one, whatever a run does at the time: launch over real processes whose actors do nothing else."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  The controller's sampler does: a second or two of which no run of these tests may be accused.

from tests.run import slow_actors
from vtriune import launch
from vtriune.config.tree import Checkpoint, Cluster, Config, Evaluation, Policy, Run
from vtriune.run import processes
from vtriune.run.console import open_screen
from vtriune.run.folder import Claim
from vtriune.run.processes import RunStalled

HANG_S, SLOW_S = 2.0, 4.0
"""`cluster.stall_s` of runs that are to stall, and of those that are not, though this machine be busy."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs launch's run to its end, with some calls slow and one that hangs, after a first one when it `resumes`."""
    monkeypatch.setattr(launch, "CLASSES", slow_actors.CLASSES)
    monkeypatch.setattr(launch, "begin", lambda *_: None)
    monkeypatch.setattr(launch, "open_preprocessor", lambda config: slow_actors.Processor())
    monkeypatch.setattr(launch, "open_stores", lambda *_: (slow_actors.Rows(100), None))

    async def run(*, slow: str = "", hang: str = "", resumes: bool = False, steps: int = 1) -> None:
        monkeypatch.setenv("SLOW", slow)
        monkeypatch.setenv("HANG", hang)
        config = Config(
            run=Run(name="job", folder=str(tmp_path), steps=steps),
            policy=Policy(rollout_batch=1, group_size=2, lease_s=60.0),
            cluster=Cluster(stall_s=HANG_S if hang else SLOW_S),
            evaluation=Evaluation(before=False, after=False),
            checkpoint=Checkpoint(),
        )
        checkpoint = tmp_path / "job" / "checkpoints" / "step-1" if resumes else None
        async with asyncio.timeout(60):
            await launch._run(config, Claim(tmp_path / "job", checkpoint), open_screen("plain", "job"))

    return run


def test_where_the_file_does_not_say_a_stall_is_five_minutes_longer_than_a_lease() -> None:
    assert processes._stall_s(Config()) == 900
    assert processes._stall_s(Config(policy=Policy(lease_s=4000.0))) == 4300
    assert processes._stall_s(Config(policy=Policy(lease_s=4000.0), cluster=Cluster(stall_s=4000.0))) == 4000


async def test_a_hang_while_the_learner_starts_ends_the_run_with_its_name(start: Any) -> None:
    with pytest.raises(RunStalled) as stalled:
        await start(hang="connect")
    assert re.search(r"learner-0 connect: step 1 of 2, \d s ago", str(stalled.value))


async def test_a_hang_in_an_update_or_in_a_load_at_resume_ends_the_run_and_says_what_it_waits_for(start: Any) -> None:
    with pytest.raises(RunStalled) as stalled:
        await start(hang="train")
    assert re.search(r"controller: waits for the learner to train version 1, \d s ago", str(stalled.value))
    assert re.search(r"learner-0 train: step 1 of 2, \d s ago", str(stalled.value))
    assert "in train" in str(stalled.value)
    await start()
    with pytest.raises(RunStalled) as stalled:
        await start(hang="load", resumes=True, steps=2)
    assert re.search(r"controller: waits for the learner to load .*step-1, \d s ago", str(stalled.value))
    assert re.search(r"learner-0 load: step 1 of 2, \d s ago", str(stalled.value))


@pytest.mark.long
async def test_long_first_answers_updates_lines_last_checkpoints_and_loads_that_get_on_are_no_stall(start: Any) -> None:
    await start(slow=f"connect={SLOW_S + 1.5}")
    started = time.monotonic()
    slow = [f"{call}={SLOW_S + 1.5}" for call in ("load", "generate", "train", "record_step", "saved")]
    await start(slow=" ".join(slow), resumes=True, steps=2)
    assert time.monotonic() - started > 5 * (SLOW_S + 1.5)
