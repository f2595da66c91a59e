"""The controller over handwritten actors: bounds, exactly-once, faults, switches and stops, without a process."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.vtriune.stage import Stage
from vtriune.checkpoint import latest_complete
from vtriune.config.tree import Policy
from vtriune.controller import Controller
from vtriune.leasing import TooManyLost
from vtriune.messages import Lease, PublishOrder, PublishReport
from vtriune.runtime import ActorError
from vtriune.schedule import Stance

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2)
OFF = Policy(mode="off_policy", max_staleness=2, rollout_batch=6, group_size=2)


async def reach(controller: Controller, version: int) -> None:
    """Return once the controller has published `version`."""
    while controller.window.version < version:
        await asyncio.sleep(0.001)


async def test_on_policy_every_token_is_of_the_learners_own_version(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON)
    await stage.run()
    assert [len(order.updates) for order in stage.orders] == [1] * 6
    assert set(stage.consumed.values()) == {0}
    assert len(stage.consumed) == 36


@pytest.mark.parametrize("seed", range(5))
async def test_off_policy_runs_ahead_and_never_beyond_the_bound(tmp_path: Path, seed: int) -> None:
    stage = Stage(tmp_path, OFF, steps=12, training_s=0.01, seed=seed)
    stage.slow = {1, 8, 20, 33}
    await stage.run()
    assert max(stage.consumed.values()) in (1, 2)
    assert len(stage.consumed) == 72
    assert {1, 8, 20} <= set(stage.consumed), "slow groups were starved"


async def test_off_policy_with_staleness_zero_consumes_the_same_groups_as_on_policy(tmp_path: Path) -> None:
    on, off = (
        Stage(tmp_path / "on", ON),
        Stage(tmp_path / "off", Policy("off_policy", 0, rollout_batch=6, group_size=2)),
    )
    await on.run()
    await off.run()
    assert [order.updates for order in on.orders] == [order.updates for order in off.orders]


async def test_several_updates_share_one_rollout_batch(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, Policy(mode="off_policy", max_staleness=0, rollout_batch=6, update_batch=2, group_size=2), steps=3
    )
    await stage.run()
    assert [[len(update) for update in order.updates] for order in stage.orders] == [[2, 2, 2]] * 3
    assert [order.first_update for order in stage.orders] == [0, 3, 6]
    assert {order.num_updates_total for order in stage.orders} == {9}


async def test_an_epoch_consumes_every_sample_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=None, epochs=1, num_rows=20)
    controller = await stage.run()
    assert len(stage.consumed) == 20
    assert controller.leasing.ledger.counts()["consumed"] == 20
    controller.leasing.ledger.audit()


async def test_a_dead_generators_groups_are_generated_by_the_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, OFF, steps=8, training_s=0.005)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 1)
    stage.generators[0].is_dead = True
    async with asyncio.timeout(30):
        await running
    counts = controller.leasing.ledger.counts()
    assert counts["consumed"] == 48
    assert counts["lost"] == 0
    assert stage.records[-1].metrics["generators/deaths"] == 1


@pytest.mark.parametrize("policy", [ON, OFF], ids=["on_policy", "off_policy"])
async def test_cut_off_generators_cost_leases_and_no_group_also_when_it_had_been_delivered(
    tmp_path: Path, policy: Policy
) -> None:
    stage = Stage(tmp_path, policy, steps=12, training_s=0.002, evaluate_every=4)
    chance = random.Random(3)
    # Never on a last attempt, which would lose the group.
    stage.cut = lambda lease: (
        chance.choice([None, None, "mid-group", "mid-ack"])
        if lease.attempt < 2 and (lease.purpose == "train" or chance.random() < 0.5)
        else None
    )
    controller = await stage.run()
    ledger = controller.leasing.ledger
    ledger.audit()
    counts = ledger.counts()
    assert (counts["consumed"], counts["lost"]) == (12 * 6, 0)
    assert ledger.num_reissues > 12
    trained = [order.attempts for order in stage.orders]
    assert {attempt for attempts in trained for attempt in attempts.values()} == {0, 1, 2}
    assert [record.attempts for record in stage.records] == trained, (
        "the recorder archives the attempt that was trained on"
    )
    assert len(stage.delivered) > len(stage.consumed), "some groups were delivered by two attempts"
    open_from = [order.open_from for order in stage.orders]
    assert open_from == sorted(open_from)
    assert all(order.open_from > min(batch) for order, batch in zip(stage.orders, trained, strict=True))
    assert stage.records[-1].metrics["generators/deaths"] == 0


async def test_groups_are_shared_out_when_there_are_fewer_than_idle_generators(tmp_path: Path) -> None:
    few = Stage(tmp_path / "few", Policy(rollout_batch=2, group_size=8), num_generators=5, room=16)
    await few.run()
    # Five idle generators, two groups of the batch to come: two for the first, three for the last.
    assert few.shares[:12] == [2, 3] * 6
    assert few.records[-1].metrics["generators/shared_groups"] == 12
    many = Stage(tmp_path / "many", ON, num_generators=5)
    await many.run()
    assert set(many.shares) == {1}, "six groups keep five generators busy as they are"


async def test_a_restarted_generator_is_refitted_before_it_is_leased_to(tmp_path: Path) -> None:
    stage = Stage(tmp_path, OFF, steps=20, training_s=0.005, restarts=1, num_generators=1)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 2)
    stage.generators[0].is_dead = True
    async with asyncio.timeout(30):
        await running
    assert len(stage.generators) == 2
    assert stage.generators[1].version == 20
    assert controller.leasing.ledger.counts()["consumed"] == 120


async def test_a_run_without_any_generator_left_ends_with_an_error(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, num_generators=1)
    controller = await stage.open()
    stage.generators[0].is_dead = True
    with pytest.raises(Exception, match="generators are dead"):
        await controller.run()


async def test_groups_that_always_fail_are_lost_by_name_and_then_end_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON)

    async def fail(*_: object) -> None:
        raise ActorError("generate", "builtins.ValueError", "bad prompt", "")

    controller = await stage.open()
    for generator in stage.generators:
        generator.generate = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ExceptionGroup) as caught:
        await controller.run()
    assert caught.group_contains(TooManyLost, match="bad prompt")


async def test_filtered_groups_are_replaced_and_the_batch_is_full(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2, filter="zero_variance"), steps=3)
    stage.equal_rewards = lambda lease: lease.group_id % 3 == 0
    controller = await stage.run()
    assert [len(order.updates[0]) for order in stage.orders] == [6, 6, 6]
    assert all(group_id % 3 for group_id in stage.consumed)
    assert controller.leasing.ledger.counts()["filtered"] >= 6


async def test_a_filter_that_leaves_nothing_ends_the_run_without_an_exception(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=4, group_size=2, filter="zero_variance"), steps=3)
    stage.equal_rewards = lambda lease: True
    await stage.run()
    assert [order.updates for order in stage.orders] == [[], [], []]


async def test_a_live_switch_takes_effect_at_a_publish_and_loses_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=30, training_s=0.004)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 5)
    controller.switch(Stance("off_policy", 2))
    await reach(controller, 15)
    controller.switch(Stance("on_policy", 0))
    async with asyncio.timeout(30):
        await running
    modes = [record.metrics["policy/is_off_policy"] for record in stage.records if record.version]
    assert modes[0] == 0.0
    assert 1.0 in modes
    assert modes[-1] == 0.0
    assert set(stage.consumed.values()) <= {0, 1, 2}
    last = stage.orders[-1]
    assert all(stage.consumed[group_id] == 0 for group_id in last.updates[0])
    controller.leasing.ledger.audit()
    assert controller.leasing.ledger.counts()["consumed"] == 180


async def test_after_a_switch_to_on_policy_a_batch_is_one_update_whatever_the_file_says(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, Policy(mode="off_policy", max_staleness=0, rollout_batch=6, update_batch=2, group_size=2), steps=4
    )
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 1)
    controller.switch(Stance("on_policy", 0))
    async with asyncio.timeout(30):
        await running
    assert [len(update) for update in stage.orders[0].updates] == [2, 2, 2]
    assert [len(update) for update in stage.orders[-1].updates] == [6]


async def test_a_stop_finishes_the_version_in_hand_and_a_resume_repeats_no_sample(tmp_path: Path) -> None:
    stage = Stage(tmp_path, OFF, steps=20, training_s=0.004)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 2)
    controller.stop()
    async with asyncio.timeout(30):
        await running
    stopped_at = controller.window.version
    assert 0 < stopped_at < 20
    checkpoint = latest_complete(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{stopped_at}"
    resumed = await stage.open()
    await resumed.resume(checkpoint)
    async with asyncio.timeout(30):
        await resumed.run()
    assert len(stage.consumed) == 120
    samples = Counter(record.version for record in stage.records)
    assert max(samples.values()) == 1
    assert resumed.leasing.ledger.counts()["consumed"] == 120


async def test_an_evaluation_scores_every_row_though_its_only_generator_dies(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=3, evaluate_every=1, num_generators=1, restarts=2)
    num_calls = 0

    def die_once(lease: Lease) -> float:
        nonlocal num_calls
        num_calls += lease.purpose == "evaluate"
        if num_calls == 3:
            stage.generators[0].is_dead = True
        return 0.001

    stage.generation_s = die_once  # type: ignore[method-assign]
    await stage.run()
    evaluated = [
        record.metrics["eval/greedy/num_rows"] for record in stage.records if "eval/greedy/num_rows" in record.metrics
    ]
    assert evaluated == [4.0, 4.0]
    assert len(stage.generators) == 2


async def test_a_publish_broken_by_one_engine_is_repeated_with_the_unharmed_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=4)
    controller = await stage.open()
    culprit, bystander = stage.generators

    async def break_off(order: PublishOrder) -> PublishReport:
        raise ActorError("receive", "vtriune.weight_group.PublishFailure", "out of memory", "")

    unharmed, num_failures = bystander.receive, 0

    async def fail_once(order: PublishOrder) -> PublishReport:
        nonlocal num_failures
        if order.version == 2 and not num_failures:
            num_failures += 1
            raise ActorError("receive", "vtriune.weight_group.PeerFailure", "member 1 failed", "")
        return await unharmed(order)

    healthy = culprit.receive

    async def break_at_two(order: PublishOrder) -> PublishReport:
        return await (break_off(order) if order.version == 2 else healthy(order))

    culprit.receive, bystander.receive = break_at_two, fail_once  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        await controller.run()
    assert num_failures == 1
    assert stage.records[-1].metrics["generators/deaths"] == 1
    assert len(stage.consumed) == 24


async def test_an_engine_that_dies_in_a_publish_is_reported_to_the_others_and_the_publish_repeated(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, ON, steps=4)
    controller = await stage.open()
    culprit = stage.generators[0]
    healthy = culprit.receive

    async def die_at_two(order: PublishOrder) -> PublishReport:
        culprit.is_dead = order.version == 2
        return await healthy(order)

    culprit.receive = die_at_two  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        await controller.run()
    assert [member for member, _ in stage.reported_lost] == [1]
    assert "generator rank 0" in stage.reported_lost[0][1]
    assert stage.records[-1].metrics["generators/deaths"] == 1
    assert len(stage.consumed) == 24
