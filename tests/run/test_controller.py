"""The controller over handwritten actors: bounds, exactly-once, faults, switches and stops, without a process."""

import asyncio
import functools
import random
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from tests.run.stage import Stage
from tests.run.test_fleet import until
from vtriune.config.tree import Cluster, Policy, SamplingSection, Verifiers
from vtriune.messages import Lease, PublishOrder, PublishReport
from vtriune.record.checkpoint import latest_complete
from vtriune.run import fleet, publisher
from vtriune.run.controller import Controller
from vtriune.run.fleet import FleetExhausted
from vtriune.run.schedule import ModeInForce

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2)
OFF = Policy(mode="off_policy", max_staleness=2, rollout_batch=6, group_size=2)


async def reach(controller: Controller, version: int) -> None:
    """Return once the controller has published `version`."""
    while controller.groups.version < version:
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


async def test_the_verifiers_figures_stand_in_every_line_and_a_dead_verifier_ends_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=3)
    stage.config = msgspec.structs.replace(stage.config, cluster=Cluster(verifiers=Verifiers(procs=2)))
    await stage.run()
    for record in stage.records:
        figures = {key: value for key, value in record.metrics.items() if "verifiers/" in key}
        assert figures.pop("throughput/verifiers/idle_share", None) is not None
        assert figures == {
            "verifiers/num_restarts": 2.0, "verifiers/mathverify/num_samples": 8.0, "verifiers/mathverify/fault_rate": 0.25,
            "time/verifiers/mathverify/latency_p99_s": 0.5, "throughput/verifiers/mathverify/samples_per_s": 16.0,
        }  # fmt: skip
    stage = Stage(tmp_path / "dead", ON, steps=3)
    stage.verifiers.is_dead = True
    await stage.run()
    assert (len(stage.records), stage.verifiers.num_asked) == (3, 3)


async def test_the_verifiers_figures_of_a_line_end_with_its_batch_before_the_publish_lets_others_in(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, ON, steps=3)
    versions: list[int] = []
    stage.verifiers.on_asked = lambda: versions.append(stage.generators[0].version)
    await stage.run()
    assert versions == [0, 1, 2]


async def test_seeded_held_out_rows_draw_numbers_of_their_own_the_same_at_every_version(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=2, evaluate_every=1)
    stage.config = msgspec.structs.replace(stage.config, sampling=SamplingSection(seeded=True))
    await stage.run()
    seeds: dict[int, set[int | None]] = {}
    for lease in stage.leases:
        if lease.purpose == "evaluate":
            seeds.setdefault(lease.sample.row, set()).add(lease.sampling.seed)
    assert len(seeds) == 4
    assert all(len(of_row) == 1 for of_row in seeds.values())
    assert len(set.union(*seeds.values()) - {None}) == 4


@pytest.mark.parametrize("filtered", ["none", "zero_variance"])
async def test_on_policy_with_one_generator_lines_and_orders_do_not_depend_on_the_clock(
    tmp_path: Path, filtered: Literal["none", "zero_variance"]
) -> None:
    runs, policy = [], msgspec.structs.replace(ON, filter=filtered)
    for seed in range(6):
        stage = Stage(tmp_path / str(seed), policy, steps=4, num_generators=1, seed=seed, evaluate_every=2)
        stage.equal_rewards = lambda lease: lease.group_id % 3 == 0
        await stage.run()
        of_the_clock = ("time/", "throughput/", "memory/")
        lines = [
            {key: value for key, value in record.metrics.items() if not key.startswith(of_the_clock)}
            for record in stage.records
        ]
        runs.append((lines, stage.orders))
    for run in runs[1:]:
        assert run == runs[0]


async def test_evaluation_cuts_the_distribution_as_its_section_says_and_training_never(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=2, evaluate_every=1)
    leases: list[Lease] = []
    stage.cut = lambda lease: leases.append(lease)  # type: ignore[func-returns-value]
    await stage.run()
    cuts = {(lease.purpose, lease.sampling.temperature, lease.sampling.top_p, lease.sampling.top_k) for lease in leases}
    assert cuts == {("train", 1.0, 1.0, -1), ("evaluate", 1.0, 0.9, 20), ("evaluate", 0.0, 0.9, 20)}


async def test_several_updates_share_one_rollout_batch(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, Policy(mode="off_policy", max_staleness=0, rollout_batch=6, update_batch=2, group_size=2), steps=3
    )
    await stage.run()
    assert [[len(update) for update in order.updates] for order in stage.orders] == [[2, 2, 2]] * 3
    assert [order.progress for order in stage.orders] == [
        [(version + index / 3) / 3 for index in range(4)] for version in range(3)
    ]


async def test_an_epoch_consumes_every_sample_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=None, epochs=1, num_rows=20)
    controller = await stage.run()
    assert len(stage.consumed) == 20
    assert controller.groups.counts()["consumed"] == 20
    controller.groups.audit()


async def test_a_dead_generators_groups_are_generated_by_the_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, OFF, steps=8, training_s=0.005)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 1)
    stage.generators[0].is_dead = True
    async with asyncio.timeout(30):
        await running
    counts = controller.groups.counts()
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
    controller.groups.audit()
    counts = controller.groups.counts()
    assert (counts["consumed"], counts["lost"]) == (12 * 6, 0)
    assert stage.records[-1].metrics["ledger/reissues"] > 12
    trained = [order.attempts for order in stage.orders]
    assert {attempt for attempts in trained for attempt in attempts.values()} == {0, 1, 2}
    assert [record.order for record in stage.records] == stage.orders, (
        "the recorder archives the attempts that were trained on"
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
    assert controller.groups.counts()["consumed"] == 120


async def test_a_dead_generators_successor_starts_while_the_learner_trains_and_joins_at_the_next_publish(
    tmp_path: Path,
) -> None:
    """The learner is the bottleneck: a batch is always ready, so that nobody ever waits for one."""
    stage = Stage(tmp_path, OFF, steps=12, training_s=0.05, restarts=1)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 3)
    await until(lambda: controller.groups.is_training and controller.groups.counts()["scored"] >= 2 * 6)
    version = controller.groups.version
    # As its process's watcher tells.
    controller._fleet.mark_dead(controller._fleet.engines[0], "killed")
    await until(lambda: len(stage.generators) == 3)
    assert (controller.groups.version, controller.groups.is_training) == (version, True), "it starts at once"
    await reach(controller, version + 1)
    assert stage.generators[2].version == version + 1
    await running
    assert {record.metrics["generators/deaths"] for record in stage.records[version:]} == {1.0}
    assert len(stage.consumed) == 72


async def test_a_generator_that_dies_and_comes_back_during_a_publish_is_not_taken_for_one_that_has_the_weights(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, OFF, steps=6, restarts=1)
    controller = await stage.open()
    first, second = stage.generators
    is_back = asyncio.Event()
    healthy_first, healthy_second = first.receive, second.receive

    async def die(order: PublishOrder) -> PublishReport:
        first.is_dead = order.version == 2
        return await healthy_first(order)

    async def receive_once_it_is_back(order: PublishOrder) -> PublishReport:
        if order.version == 2 and not is_back.is_set():
            controller._fleet.mark_dead(controller._fleet.engines[0], "killed")
            await until(lambda: len(stage.generators) == 3 and bool(controller._fleet.stale))
            is_back.set()
        return await healthy_second(order)

    first.receive, second.receive = die, receive_once_it_is_back  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        await controller.run()
    assert len(stage.consumed) == 36, "an engine without the weights would have been leased to, which its fake refuses"
    assert stage.generators[2].version == 6


@pytest.mark.parametrize("call", ["receive", "canary", "stats"])
async def test_a_generator_that_hangs_over_a_publish_costs_itself_and_one_that_tells_no_figures_nothing(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "ANSWER_S", 0.1)
    monkeypatch.setattr(fleet, "FIGURES_S", 0.1)
    stage = Stage(tmp_path, ON, steps=3)
    controller = await stage.open()
    culprit = stage.generators[0]
    healthy = getattr(culprit, call)

    @functools.wraps(healthy)
    async def hang(*arguments: object) -> object:
        if culprit.version == 1:
            await asyncio.Event().wait()
        return await healthy(*arguments)

    setattr(culprit, call, hang)
    async with asyncio.timeout(30):
        await controller.run()
    assert len(stage.consumed) == 18
    assert stage.records[-1].metrics["generators/deaths"] == (call != "stats")


async def test_a_budget_that_is_used_up_ends_the_run_only_once_there_is_no_generator_and_nothing_to_train_on(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, OFF, steps=12, training_s=0.05)
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 3)
    await until(lambda: controller.groups.is_training and controller.groups.counts()["scored"] >= 2 * 6)
    version = controller.groups.version
    for engine in controller._fleet.engines:
        controller._fleet.mark_dead(engine, "killed")
    with pytest.raises(FleetExhausted):
        await running
    assert len(stage.generators) == 2
    assert controller.groups.version == version + 2, "what was scored is trained on"


async def test_a_run_without_any_generator_left_ends_with_an_error(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, num_generators=1)
    controller = await stage.open()
    stage.generators[0].is_dead = True
    with pytest.raises(Exception, match="generators are dead"):
        await controller.run()


async def test_filtered_groups_are_replaced_and_the_batch_is_full(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2, filter="zero_variance"), steps=3)
    stage.equal_rewards = lambda lease: lease.group_id % 3 == 0
    controller = await stage.run()
    assert [len(order.updates[0]) for order in stage.orders] == [6, 6, 6]
    assert all(group_id % 3 for group_id in stage.consumed)
    assert controller.groups.counts()["filtered"] >= 6


async def test_what_became_of_each_sources_groups_is_in_the_metrics_and_adds_up(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2, filter="zero_variance"), steps=3)
    stage.equal_rewards = lambda lease: lease.sample.row % 4 == 1
    await stage.run()
    metrics = stage.records[-1].metrics
    assert metrics["source/even/ledger/filtered"] == 0 < metrics["source/odd/ledger/filtered"]
    for end in ("consumed", "filtered", "faulted", "lost"):
        assert sum(metrics[f"source/{source}/ledger/{end}"] for source in ("even", "odd")) == metrics[f"ledger/{end}"]


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
    controller.switch(ModeInForce("off_policy", 2))
    await reach(controller, 15)
    controller.switch(ModeInForce("on_policy", 0))
    async with asyncio.timeout(30):
        await running
    modes = [record.metrics["policy/is_off_policy"] for record in stage.records if record.version]
    assert modes[0] == 0.0
    assert 1.0 in modes
    assert modes[-1] == 0.0
    assert set(stage.consumed.values()) <= {0, 1, 2}
    # Groups that were admitted before the switch may be stale, whatever is in force when they are trained on.
    corrections = [(order.max_staleness, order.correction) for order in stage.orders]
    assert (2, "decoupled") in corrections[14:]
    assert set(corrections) == {(0, "none"), (2, "decoupled")}
    last = stage.orders[-1]
    assert all(stage.consumed[group_id] == 0 for group_id in last.updates[0])
    controller.groups.audit()
    assert controller.groups.counts()["consumed"] == 180


async def test_after_a_switch_to_on_policy_a_batch_is_one_update_whatever_the_file_says(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, Policy(mode="off_policy", max_staleness=0, rollout_batch=6, update_batch=2, group_size=2), steps=4
    )
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    await reach(controller, 1)
    controller.switch(ModeInForce("on_policy", 0))
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
    stopped_at = controller.groups.version
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
    assert resumed.groups.counts()["consumed"] == 120


async def test_a_lease_brings_what_scoring_needs_of_its_sample_and_an_evaluation_no_progress(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=2, evaluate_every=1)
    leases: list[Lease] = []

    def rewards(lease: Lease) -> list[float]:
        leases.append(lease)
        return [1.0, 0.0][: lease.num_completions]

    stage.rewards = rewards  # type: ignore[method-assign]
    await stage.run()
    assert all(lease.header == stage.store.header(lease.sample.row) for lease in leases)
    assert {lease.progress for lease in leases if lease.purpose == "train"} >= {0.0, 0.5}
    assert {lease.purpose for lease in leases if lease.progress is None} == {"evaluate"}
    assert None in {lease.progress for lease in leases}


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
