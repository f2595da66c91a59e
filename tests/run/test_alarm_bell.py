"""What a person is told of a run that goes wrong but goes on, and what stops it: the controller over handwritten actors."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.run.stage import Stage
from vtriune.config.sections.alarms import Action, EmptyBatches, LostShare
from vtriune.config.tree import Alarms, Policy
from vtriune.messages import Lease
from vtriune.record.checkpoint import latest_complete
from vtriune.runtime import ActorError

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2)
FILTERED = msgspec.structs.replace(ON, filter="zero_variance")
TRACEBACK = 'Traceback (most recent call last):\n  File "pixels.py", line 7, in decode\nOSError: broken'


def with_alarms(stage: Stage, **alarms: Any) -> Stage:
    stage.config = msgspec.structs.replace(stage.config, alarms=Alarms(**alarms))
    return stage


def break_rows(stage: Stage, is_broken: Callable[[int], bool]) -> None:
    """Every attempt at a group with such an id fails in the generator."""

    def generation_s(lease: Lease) -> float:
        if is_broken(lease.group_id):
            raise ActorError("generate", "builtins.OSError", f"broken data stream\nof {lease.sample.row}", TRACEBACK)
        return 0.001

    stage.generation_s = generation_s  # type: ignore[method-assign]


async def finish(stage: Stage) -> None:
    async with asyncio.timeout(60):
        await stage.controller.run()


def told(stage: Stage, name: str) -> list[str]:
    return [line for line in stage.said if line.startswith(f"alarm {name}")]


async def test_a_filter_that_leaves_nothing_is_told_once_with_an_example(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FILTERED, steps=5)
    stage.equal_rewards = lambda lease: True
    controller = await stage.run()
    [line] = told(stage, "empty_batches")
    assert "nothing was learned in the last 2 versions" in line
    assert "odd, row 1 of rows.parquet (1): 'a response to train'" in line
    assert controller.bell.stopped_by is None
    assert controller.groups.version == 5


async def test_an_alarm_with_the_action_stop_ends_the_run_with_a_checkpoint_and_says_which(tmp_path: Path) -> None:
    stage = with_alarms(Stage(tmp_path, FILTERED, steps=9), empty_batches=EmptyBatches(versions=3, action="stop"))
    stage.equal_rewards = lambda lease: True
    controller = await stage.run()
    assert controller.groups.version == 3
    assert controller.bell.stopped_by is not None
    assert controller.ending.startswith("stopped at version 3 of 9 by alarms.empty_batches: nothing was learned")
    checkpoint = latest_complete(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-3"


async def test_a_lost_group_is_one_line_with_source_row_and_reason_and_one_traceback_for_all_of_its_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, ON)
    controller = await stage.open()
    break_rows(stage, lambda group_id: group_id in (3, 8))
    with caplog.at_level(logging.WARNING):
        await finish(stage)
    counts = controller.groups.counts()
    assert (counts["lost"], counts["consumed"]) == (2, 36)
    rows = [lease.sample.row for lease in stage.leases if lease.group_id in (3, 8) and lease.attempt == 2]
    assert [line for line in stage.said if "lost" in line] == [
        f"group lost · {('even', 'odd')[row % 2]}, row {row} of rows.parquet ({row}): OSError: broken data stream"
        for row in rows
    ]
    assert caplog.text.count("Traceback") == 1
    assert controller.groups.accounts().lost_reasons == {"OSError: broken data stream": 2}
    assert controller.bell.stopped_by is None


async def test_when_every_group_is_lost_the_run_stops_by_the_alarm_with_a_checkpoint(tmp_path: Path) -> None:
    stage = with_alarms(Stage(tmp_path, ON), lost_share=LostShare(share=0.05, window=100))
    controller = await stage.open()
    break_rows(stage, lambda group_id: True)
    await finish(stage)
    [line] = told(stage, "lost_share")
    assert "more than 5.0% of 100 groups drawn one after the other were lost; for example" in line
    assert "broken data stream" in line
    assert controller.ending.startswith("stopped at version 0 of 6 by alarms.lost_share: more than 5.0%")
    assert latest_complete(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize("action", ["log", "stop"])
async def test_loss_is_a_rate_over_recent_groups_and_not_a_share_of_all_ever(tmp_path: Path, action: Action) -> None:
    """Eleven whole versions, then every second group is broken: a tenth of all would be lost only versions later."""
    stage = with_alarms(Stage(tmp_path, ON, steps=16), lost_share=LostShare(share=0.1, window=20, action=action))
    controller = await stage.open()
    break_rows(stage, lambda group_id: group_id >= 66 and group_id % 2 == 0)
    await finish(stage)
    assert len(told(stage, "lost_share")) == 1
    assert (controller.groups.version == 16) == (action == "log")
    if action == "stop":
        counts = controller.groups.counts()
        assert counts["lost"] <= 6, "the third loss rings, the others were on their way"


async def test_a_loss_that_stops_a_run_is_in_its_checkpoint_so_that_the_same_command_gets_past_it(
    tmp_path: Path,
) -> None:
    stage = with_alarms(Stage(tmp_path, ON, steps=3, checkpoint_every=1), lost_share=LostShare(share=0.0))
    await stage.open()
    break_rows(stage, lambda group_id: group_id in (8, 10))
    await finish(stage)
    for _ in range(2):
        assert stage.controller.groups.version == 1, (
            "broken groups are lost long before the whole ones beside them are scored"
        )
        controller = await stage.open()
        await controller.resume(tmp_path / "checkpoints" / "step-1")
        await finish(stage)
        if controller.bell.stopped_by is None:
            break
    assert (controller.groups.version, controller.groups.counts()["lost"]) == (3, 2)


async def test_what_was_lost_before_a_resume_counts_after_it_and_is_not_told_twice(tmp_path: Path) -> None:
    alarms = {"lost_share": LostShare(share=0.1, window=50, action="log")}
    stage = with_alarms(Stage(tmp_path, ON, steps=2), **alarms)
    await stage.open()
    break_rows(stage, lambda group_id: group_id < 5)
    await finish(stage)
    assert told(stage, "lost_share") == []
    stage.config = msgspec.structs.replace(stage.config, run=msgspec.structs.replace(stage.config.run, steps=4))
    for broken, expected in ((range(20, 21), 1), (range(31, 32), 1)):
        controller = await stage.open()
        await controller.resume(latest_complete(tmp_path / "checkpoints"))  # type: ignore[arg-type]
        controller.bell.recall(stage.lines)
        break_rows(stage, lambda group_id, broken=broken: group_id in broken)
        await finish(stage)
        assert len(told(stage, "lost_share")) == expected
        stage.config = msgspec.structs.replace(stage.config, run=msgspec.structs.replace(stage.config.run, steps=6))


async def test_groups_of_which_too_few_verdicts_say_anything_are_faulted_and_every_draw_is_accounted_for(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, FILTERED, steps=3)
    plain = stage.rewards
    stage.rewards = lambda lease: [1.0] if lease.sample.row % 7 == 0 else plain(lease)  # type: ignore[method-assign]
    stage.equal_rewards = lambda lease: lease.sample.row % 5 == 0
    controller = await stage.open()
    break_rows(stage, lambda group_id: group_id == 3)
    await finish(stage)
    by_source = controller.groups.accounts().by_source
    for counts in by_source.values():
        assert counts["drawn"] == sum(counts[end] for end in ("consumed", "filtered", "faulted", "lost", "open"))
    sums = {key: sum(counts[key] for counts in by_source.values()) for key in by_source["odd"]}
    assert min(sums["faulted"], sums["filtered"], sums["lost"]) > 0
    assert sums["consumed"] == 18
    assert 0 < stage.records[-1].metrics["ledger/faulted"] <= sums["faulted"]
