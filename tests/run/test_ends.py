"""How a run ends: every row drawn as often as the epochs say, the end evaluated, kept and explained, on every way to it."""

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.run.stage import Stage
from tests.run.test_controller import reach
from vtriune.config.tree import Phase, Policy
from vtriune.messages import Lease
from vtriune.record.checkpoint import latest_complete
from vtriune.run.folder import claim
from vtriune.run.snapshots import read_state
from vtriune.runtime import ActorError

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2, filter="zero_variance")
OFF = replace(ON, mode="off_policy", max_staleness=2)
PHASES = [Phase(until=0.5, mode="off_policy", max_staleness=2), Phase(mode="on_policy")]


def epochs(folder: Path, policy: Policy, *, num_rows: int = 40, epochs: int = 1, seed: int = 0) -> Stage:
    return Stage(
        folder, policy, steps=None, epochs=epochs, num_rows=num_rows, seed=seed, evaluate_after=True, training_s=0.002
    )


def is_finished(stage: Stage) -> bool:
    """Whether the same command would say that there is nothing left to do."""
    here = replace(stage.config.run, folder=str(stage.folder.parent), name=stage.folder.name)
    return claim(replace(stage.config, run=here), "continue").finished is not None


def was_evaluated(stage: Stage) -> bool:
    """Whether the last line, and no other, holds an evaluation."""
    return ["eval/greedy/num_rows" in record.metrics for record in stage.records] == [
        *([False] * (len(stage.records) - 1)),
        True,
    ]


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    rollout_batch=st.integers(1, 64),
    num_epochs=st.integers(1, 3),
    bound=st.none() | st.integers(0, 2),
    flat=st.integers(0, 4),
    oversample=st.sampled_from([1.0, 1.1, 2.0]),
    seed=st.integers(0, 9),
)
def test_every_row_is_drawn_once_an_epoch_and_the_last_line_accounts_for_all(
    num_rows: int, rollout_batch: int, num_epochs: int, bound: int | None, flat: int, oversample: float, seed: int
) -> None:
    mode = "on_policy" if bound is None else "off_policy"
    policy = Policy(
        mode=mode, max_staleness=bound, rollout_batch=rollout_batch, group_size=2, filter="zero_variance",
        max_oversample=oversample,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        stage = epochs(Path(folder) / "job", policy, num_rows=num_rows, epochs=num_epochs, seed=seed)
        stage.equal_rewards = lambda lease: lease.sample.row % 4 < flat
        controller = asyncio.run(stage.run())
        assert is_finished(stage)
    drawn = [lease.sample.row for lease in stage.leases if lease.purpose == "train"]
    assert Counter(drawn) == dict.fromkeys(range(num_rows), num_epochs)
    for start in range(0, len(drawn), num_rows):
        assert len(set(drawn[start : start + num_rows])) == num_rows, "a row came twice before all had come"
    counts, last = controller.groups.counts(), stage.records[-1].metrics
    assert counts["consumed"] + counts["filtered"] == num_rows * num_epochs
    assert (last["progress"], last["ledger/consumed"] + last["ledger/filtered"]) == (1.0, num_rows * num_epochs)
    assert was_evaluated(stage)
    assert controller.groups.version <= -(-num_rows * num_epochs // rollout_batch) == controller.num_versions
    if not flat:
        sizes = [len(order.group_ids) for order in stage.orders]
        assert sizes == [
            min(rollout_batch, num_rows * num_epochs - first * rollout_batch) for first in range(len(sizes))
        ]


@pytest.mark.parametrize("num_epochs", [1, 3])
async def test_a_batch_larger_than_the_data_is_one_short_version_of_each_row_once_an_epoch(
    tmp_path: Path, num_epochs: int
) -> None:
    stage = epochs(tmp_path, replace(ON, rollout_batch=1024), num_rows=256, epochs=num_epochs)
    await stage.run()
    (order,) = stage.orders
    rows = Counter(lease.sample.row for lease in stage.leases if lease.purpose == "train")
    assert (len(order.group_ids), set(rows.values())) == (256 * num_epochs, {num_epochs})


@pytest.mark.parametrize(
    "policy", [ON, OFF, replace(OFF, max_staleness=None, schedule=PHASES)], ids=["on", "off", "schedule"]
)
@pytest.mark.parametrize("every", [1, 3])
async def test_an_end_of_the_data_before_its_time_is_evaluated_kept_and_explained(
    tmp_path: Path, policy: Policy, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stage = epochs(tmp_path, policy, num_rows=40, epochs=3)
    stage.equal_rewards = lambda lease: lease.group_id % every == 0
    controller = await stage.run()
    version = controller.groups.version
    assert version < 20 == controller.num_versions
    assert was_evaluated(stage)
    assert stage.records[-1].metrics["progress"] == 1.0
    assert is_finished(stage)
    num_flat = sum(group_id % every == 0 for group_id in range(120))
    ending = f"the data of 3 epochs are used up at version {version} of 20 planned: of 120 groups {num_flat} filtered"
    assert controller.ending == ending
    assert ending in caplog.messages
    if policy.schedule:
        assert stage.orders[-1].mode == "on_policy"


async def test_lost_groups_shorten_the_run_and_are_named_at_its_end(tmp_path: Path) -> None:
    stage = epochs(tmp_path, ON, num_rows=36)

    async def refuse(lease: Lease) -> None:
        if lease.purpose == "train" and lease.group_id >= 33:
            raise ActorError("generate", "builtins.ValueError", "bad prompt", "")

    stage.on_scored = refuse  # type: ignore[method-assign]
    controller = await stage.run()
    assert controller.ending == "the data of 1 epochs are used up at version 6 of 6 planned: of 36 groups 3 lost"
    assert was_evaluated(stage)
    assert stage.records[-1].metrics["progress"] == 1.0


async def test_a_run_over_steps_says_that_all_are_trained(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=3, evaluate_after=True)
    controller = await stage.run()
    assert (controller.ending, was_evaluated(stage)) == ("trained to version 3 of 3", True)


@pytest.mark.parametrize("policy", [ON, OFF], ids=["on", "off"])
async def test_a_stop_just_before_the_end_leaves_the_end_to_the_resume(tmp_path: Path, policy: Policy) -> None:
    """The last groups are filtered away while a stop waits: nothing is left to train, and yet the run has not ended."""
    stage = epochs(tmp_path / "job", policy)
    controller = await stage.open()
    last = range(36, 40)
    is_due = asyncio.Event()

    async def wait(lease: Lease) -> None:
        if lease.purpose == "train" and lease.group_id in last:
            await is_due.wait()

    stage.on_scored = wait  # type: ignore[method-assign]
    stage.equal_rewards = lambda lease: lease.group_id in last
    settle = controller._snapshots.settle

    async def settle_late(*, waits: bool) -> None:
        if controller.leasing.is_stopped:
            is_due.set()
            while controller.groups.counts()["filtered"] < len(last):
                await asyncio.sleep(0)
        await settle(waits=waits)

    controller._snapshots.settle = settle_late  # type: ignore[method-assign]
    running = asyncio.create_task(controller.run())
    await reach(controller, 6)
    await asyncio.sleep(0.02)
    controller.stop()
    await running
    assert controller.ending == "stopped at version 6 of 7 on request; the same command goes on"
    checkpoint = latest_complete(tmp_path / "job" / "checkpoints")
    assert checkpoint is not None
    assert not read_state(checkpoint).ledger.open_groups
    assert not is_finished(stage)
    resumed = await stage.open()
    await resumed.resume(checkpoint)
    await resumed.run()
    assert [order.group_ids for order in stage.orders[6:]] == [[]]
    assert was_evaluated(stage)
    assert is_finished(stage)


async def test_a_stop_during_the_last_batch_is_the_end(tmp_path: Path) -> None:
    stage = epochs(tmp_path / "job", replace(ON, filter="none"), num_rows=12)
    stage.training_s = 0.05
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 1)
    while not controller.groups.is_training:
        await asyncio.sleep(0.001)
    controller.stop()
    await running
    assert controller.ending == "the data of 1 epochs are used up at version 2 of 2 planned"
    assert was_evaluated(stage)
    assert is_finished(stage)


async def test_a_run_resumed_with_a_larger_batch_ends_with_its_data_and_not_by_the_number_of_its_versions(
    tmp_path: Path,
) -> None:
    small = epochs(tmp_path / "job", Policy(rollout_batch=2, group_size=2), num_rows=40)
    controller = await small.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 10)
    controller.stop()
    await running
    checkpoint = latest_complete(tmp_path / "job" / "checkpoints")
    assert checkpoint is not None
    large = epochs(tmp_path / "job", Policy(rollout_batch=8, group_size=2), num_rows=40)
    assert not is_finished(large)
    resumed = await large.open()
    await resumed.resume(checkpoint)
    await resumed.run()
    assert resumed.groups.counts()["consumed"] == 40
    assert resumed.groups.version == resumed.num_versions
    assert was_evaluated(large)
