"""One progress for lines, leases, evaluations, orders and the mode in force, over resumes and changes of length."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.run.stage import Stage
from tests.run.test_controller import ON, reach
from vtriune.config.load import ConfigError
from vtriune.config.tree import Optimizer, Phase, Policy
from vtriune.record.checkpoint import latest_complete
from vtriune.run.folder import claim
from vtriune.run.schedule import ModeInForce


async def stopped_at(stage: Stage, version: int, wanted: ModeInForce | None = None) -> Path:
    """Run until `version` is published, switched to `wanted`, and stop there; the checkpoint."""
    controller = await stage.open()
    if wanted is not None:
        controller.switch(wanted)
    running = asyncio.create_task(controller.run())
    await reach(controller, version)
    controller.stop()
    async with asyncio.timeout(30):
        await running
    checkpoint = latest_complete(stage.folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


async def resume(stage: Stage, checkpoint: Path) -> None:
    """Go on from `checkpoint` to the end."""
    controller = await stage.open()
    await controller.resume(checkpoint)
    async with asyncio.timeout(30):
        await controller.run()


async def test_a_resume_trains_at_once_in_the_phase_that_progress_has_reached(tmp_path: Path) -> None:
    phases = [Phase(until=0.5, mode="off_policy", max_staleness=2), Phase(mode="on_policy")]
    policy = Policy(mode="off_policy", rollout_batch=6, update_batch=2, group_size=2, schedule=phases)
    stage = Stage(tmp_path, policy, steps=12, training_s=0.004)
    checkpoint = await stopped_at(stage, 8)
    num_before = len(stage.orders)
    await resume(stage, checkpoint)
    assert [len(order.updates) for order in stage.orders] == [3] * 6 + [1] * 6
    assert 8 <= num_before < 12


async def test_a_live_switch_outlives_a_resume(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=16, training_s=0.004)
    checkpoint = await stopped_at(stage, 4, ModeInForce("off_policy", 1))
    await resume(stage, checkpoint)
    assert [record.metrics["policy/max_staleness"] for record in stage.records] == [0.0] + [1.0] * 15


@pytest.mark.parametrize("is_late", [False, True], ids=["before the stop", "while its checkpoint is written"])
async def test_a_live_switch_outlives_a_stop_that_comes_before_another_version(tmp_path: Path, is_late: bool) -> None:
    stage = Stage(tmp_path, ON, steps=6)
    checkpoint = await stopped_at(stage, 3)
    controller = await stage.open()
    await controller.resume(checkpoint)
    controller.switch(ModeInForce("off_policy", 2 if is_late else 1))
    controller.stop()
    stage.saving_s = 0.05
    async with asyncio.timeout(30):
        running = asyncio.create_task(controller.run())
        while not (written := [*checkpoint.parent.glob(".step-*.partial")]) and not running.done():
            await asyncio.sleep(0.001)
        assert written, "the checkpoint of before has another switch"
        controller.switch(ModeInForce("off_policy", 1))
        await running
    assert controller.groups.version == int(checkpoint.name.removeprefix("step-"))
    again = await stage.open()
    await again.resume(checkpoint)
    assert again.status()["requested"] == {"mode": "off_policy", "max_staleness": 1}


async def test_progress_is_of_one_source_in_lines_leases_and_evaluations(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=5, evaluate_every=2)
    await stage.run()
    assert [record.metrics.get("progress") for record in stage.records] == [0.2, 0.4, 0.6, 0.8, 1.0]
    asked = {
        purpose: [lease.progress for lease in stage.leases if lease.purpose == purpose]
        for purpose in ("train", "evaluate")
    }
    assert sorted(set(asked["train"]))[:5] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert set(asked["evaluate"]) == {None}, "an evaluation has a threshold of its own at every step"


async def test_over_epochs_progress_counts_samples_so_that_filtered_ones_move_it_and_it_ends_at_one(
    tmp_path: Path,
) -> None:
    policy = Policy(mode="on_policy", rollout_batch=6, group_size=2, filter="zero_variance")
    stage = Stage(tmp_path, policy, steps=None, epochs=2, num_rows=30)
    stage.equal_rewards = lambda lease: lease.group_id % 2 == 0
    await stage.run()
    progress = [lease.progress for lease in stage.leases]
    assert progress == sorted(progress)
    assert progress[-1] > 0.7, "thresholds are those of a run half done, though most of its samples are accounted for"
    assert stage.records[-1].metrics.get("progress") == 1.0


async def test_a_raised_number_of_steps_goes_on_from_the_stored_progress_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, ON, steps=10, training_s=0.002)
    checkpoint = await stopped_at(stage, 5)
    version = int(checkpoint.name.removeprefix("step-"))
    longer = Stage(tmp_path, ON, steps=40)
    await resume(longer, checkpoint)
    progress = [lease.progress for lease in longer.leases]
    assert progress[0] == version / 10
    assert progress == sorted(progress)
    assert longer.records[-1].metrics.get("progress") == 1.0
    assert any("10 → 40 versions" in message for message in caplog.messages)


async def test_a_run_whose_rate_has_fallen_to_nothing_is_refused_more_steps_before_anything_starts(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, ON, steps=3)
    await stage.run()
    checkpoint = latest_complete(tmp_path / "checkpoints")
    assert checkpoint is not None
    longer = Stage(tmp_path, ON, steps=6)
    here = replace(longer.config.run, folder=str(tmp_path.parent), name=tmp_path.name)
    config = replace(longer.config, run=here, optimizer=Optimizer(decay="cosine"))
    with pytest.raises(ConfigError, match=r"write optimizer.decay=none"):
        claim(config, "continue")
    assert claim(replace(config, optimizer=Optimizer()), "continue").checkpoint == checkpoint
    await resume(longer, checkpoint)
    assert [order.progress for order in longer.orders] == [[1.0, 1.0]] * 3
