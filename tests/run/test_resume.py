"""A run that goes on from a checkpoint: with another batch, with what the checkpoint says of switches and seeds."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from tests.run.stage import Stage
from vtriune.config.tree import Policy
from vtriune.record.checkpoint import latest_complete
from vtriune.run.controller import Controller

OFF = Policy(mode="off_policy", max_staleness=2, rollout_batch=8, group_size=2)


async def stopped(stage: Stage, version: int = 2) -> Path:
    """Train to `version`, stop; the checkpoint."""
    await stage.stopped_at(version)
    checkpoint = latest_complete(stage.folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


async def resumed(stage: Stage, checkpoint: Path, policy: Policy) -> Controller:
    """The run goes on to its end under `policy`."""
    stage.config = msgspec.structs.replace(stage.config, policy=policy)
    controller = await stage.open()
    await controller.resume(checkpoint)
    running = asyncio.create_task(controller.run())
    done, _ = await asyncio.wait([running], timeout=20)
    if not done:
        slots = controller.groups.slots()
        running.cancel()
        pytest.fail(f"it waits for ever at version {controller.groups.version}: {slots}")
    await running
    return controller


@pytest.mark.parametrize("batch", [1, 3, 4, 20])
@pytest.mark.parametrize("mode", ["on_policy", "off_policy"])
async def test_a_resume_with_another_rollout_batch_goes_on_and_every_group_ends_once_and_within_its_bound(
    tmp_path: Path, batch: int, mode: str
) -> None:
    stage = Stage(tmp_path, OFF, steps=6, training_s=0.004, num_generators=3, room=12)
    checkpoint = await stopped(stage)
    version = int(checkpoint.name.removeprefix("step-"))
    policy = Policy(mode=mode, rollout_batch=batch, group_size=2)  # type: ignore[arg-type]
    controller = await resumed(stage, checkpoint, policy)
    controller.groups.audit()
    assert [len(order.group_ids) for order in stage.orders] == [8] * version + [batch] * (6 - version)
    # What came back is consumed before anything new, oldest first, up to the look-ahead.
    later = [group_id for order in stage.orders[version:] for group_id in order.group_ids]
    assert len(set(later)) == len(later)
    assert sorted(later)[0] == 8 * version


@pytest.mark.parametrize("batch", [2, 3])
async def test_all_samples_of_an_epoch_are_trained_on_though_the_batch_changes_on_the_way(
    tmp_path: Path, batch: int
) -> None:
    stage = Stage(tmp_path, OFF, steps=None, epochs=1, num_rows=60, training_s=0.004)
    checkpoint = await stopped(stage)
    controller = await resumed(stage, checkpoint, msgspec.structs.replace(OFF, rollout_batch=batch))
    assert controller.groups.counts()["consumed"] == 60
    assert controller.progress == 1.0


async def test_an_epoch_goes_on_with_a_larger_batch_though_it_holds_fewer_of_these_than_versions_are_done(
    tmp_path: Path,
) -> None:
    stage = Stage(
        tmp_path, msgspec.structs.replace(OFF, rollout_batch=4), steps=None, epochs=1, num_rows=60, training_s=0.004
    )
    checkpoint = await stopped(stage, version=8)
    controller = await resumed(stage, checkpoint, msgspec.structs.replace(OFF, rollout_batch=20))
    assert controller.groups.counts()["consumed"] == 60


async def test_prompt_seeds_and_samples_after_a_resume_are_those_of_the_uninterrupted_run(tmp_path: Path) -> None:
    plain, interrupted = Stage(tmp_path / "plain", OFF, steps=6), Stage(tmp_path / "stopped", OFF, steps=6)
    assert plain.config.data.prompt_pool
    await plain.run()
    checkpoint = await stopped(interrupted)
    await resumed(interrupted, checkpoint, OFF)
    expected, found = (
        {lease.group_id: (lease.sample.row, lease.prompt_seed) for lease in stage.leases}
        for stage in (plain, interrupted)
    )
    common = expected.keys() & found.keys()
    assert len(common) >= 48
    assert {group_id: found[group_id] for group_id in common} == {group_id: expected[group_id] for group_id in common}
    assert len({seed for _, seed in found.values()}) == len(found)
