"""Held-out rows: each is scored once, or tried three times and left out by name, whatever engines do meanwhile."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.run.stage import Stage
from vtriune.config.tree import Policy
from vtriune.messages import Lease
from vtriune.run import evaluation
from vtriune.run.fleet import FleetExhausted
from vtriune.run.ledger import Ledger
from vtriune.runtime import ActorError, ConnectionLost, MessageRefused

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2)
OFF = replace(ON, mode="off_policy", max_staleness=2)
MODES = pytest.mark.parametrize("policy", [ON, OFF], ids=["on_policy", "off_policy"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are looked at more often, for the tests' sake."""
    monkeypatch.setattr(evaluation, "LOOK_S", 0.05)


def evaluated(stage: Stage, kind: str) -> list[tuple[float, float]]:
    """(rows scored, rows left out) of each evaluation."""
    return [
        (record.metrics[f"eval/{kind}/num_rows"], record.metrics[f"eval/{kind}/num_lost"])
        for record in stage.records
        if f"eval/{kind}/num_rows" in record.metrics
    ]


def tries(stage: Stage, row: int) -> list[int]:
    """Attempts at a held-out row, in order."""
    return [lease.attempt for lease in stage.leases if lease.purpose == "evaluate" and lease.sample.row == row]


@MODES
@pytest.mark.parametrize(
    "error",
    [ActorError("generate", "builtins.ValueError", "no such picture", ""), MessageRefused("no such picture")],
    ids=["raised", "refused"],
)
async def test_a_row_that_every_engine_refuses_is_tried_as_often_as_a_group_and_then_left_out_by_name(
    tmp_path: Path, policy: Policy, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, policy, steps=2, evaluate_every=1)

    async def refuse(lease: Lease) -> None:
        if lease.purpose == "evaluate" and lease.sample.row == 2:
            raise error

    stage.on_scored = refuse  # type: ignore[method-assign]
    await stage.run()
    assert evaluated(stage, "greedy") == evaluated(stage, "sampled") == [(3.0, 1.0)]
    assert tries(stage, 2) == [*range(Ledger().max_failures)] * 2
    assert [len(record.evaluated) for record in stage.records] == [6, 0], "what was left out is waited for nowhere"
    named, _ = stage.said
    assert named.startswith("evaluation, sampled: row 2 of rows.parquet is left out after 3 attempts: ")
    assert "no such picture" in named
    assert named in caplog.messages


async def test_an_engine_that_hangs_costs_a_row_its_lease_and_not_the_evaluation(tmp_path: Path) -> None:
    stage = Stage(tmp_path, replace(ON, lease_s=0.1), steps=2, evaluate_every=1, room=3)
    controller = await stage.open()
    hanging, healthy = stage.generators
    generate = hanging.generate

    async def hang(lease: Lease) -> None:
        if lease.purpose == "evaluate" and lease in of_the_hanging:
            await asyncio.Event().wait()

    of_the_hanging: list[Lease] = []

    async def noted(lease: Lease, others: list) -> object:  # type: ignore[type-arg]
        of_the_hanging.append(lease)
        return await generate(lease, others)

    noted.__annotations__ = dict(generate.__annotations__)
    hanging.generate = noted  # type: ignore[method-assign,assignment]
    stage.on_scored = hang  # type: ignore[method-assign]
    async with asyncio.timeout(20):
        await controller.run()
    assert evaluated(stage, "greedy") == evaluated(stage, "sampled") == [(4.0, 0.0)]
    assert {attempt for row in range(4) for attempt in tries(stage, row)} > {0}
    assert sum(engine.num_leased for engine in controller._fleet.engines) == 0, "places of hung rows are free again"
    assert (healthy.is_dead, stage.records[-1].metrics["generators/deaths"]) == (False, 0)


async def test_a_row_that_hangs_in_every_engine_is_left_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path, replace(ON, lease_s=0.1), steps=2, evaluate_every=1)

    async def hang(lease: Lease) -> None:
        if lease.purpose == "evaluate" and lease.sample.row == 1 and lease.sampling.temperature == 0.0:
            await asyncio.Event().wait()

    stage.on_scored = hang  # type: ignore[method-assign]
    async with asyncio.timeout(20):
        await stage.run()
    assert (evaluated(stage, "greedy"), evaluated(stage, "sampled")) == ([(3.0, 1.0)], [(4.0, 0.0)])
    assert stage.said[0].endswith("left out after 3 attempts: lease overdue")


async def test_a_report_of_a_lease_that_was_given_up_counts_if_it_is_the_first(tmp_path: Path) -> None:
    stage = Stage(tmp_path, replace(ON, lease_s=0.1), steps=2, evaluate_every=1)

    async def dawdle(lease: Lease) -> None:
        if lease.purpose == "evaluate" and lease.sample.row == 1:
            await asyncio.sleep(0.3 if lease.attempt == 0 else 60)

    stage.on_scored = dawdle  # type: ignore[method-assign]
    async with asyncio.timeout(20):
        await stage.run()
    assert evaluated(stage, "greedy") == [(4.0, 0.0)]
    assert set(stage.records[0].evaluated.values()) == {0}


@MODES
async def test_a_row_whose_engines_die_or_are_cut_off_is_tried_longer_for_it_may_be_innocent(
    tmp_path: Path, policy: Policy
) -> None:
    stage = Stage(tmp_path, policy, steps=2, evaluate_every=1, restarts=6)
    num_deaths = num_cut_off = 0

    async def break_off(lease: Lease) -> None:
        nonlocal num_deaths, num_cut_off
        if lease.purpose == "evaluate" and lease.sample.row == 0 and num_deaths < 3:
            num_deaths += 1
            for generator in stage.generators:
                generator.is_dead = True
            raise ConnectionLost("its machine is gone")
        if lease.purpose == "evaluate" and lease.sample.row == 1 and num_cut_off < 5:
            num_cut_off += 1
            raise ConnectionLost("cut off")

    stage.on_scored = break_off  # type: ignore[method-assign]
    async with asyncio.timeout(20):
        await stage.run()
    assert num_deaths >= 1
    assert evaluated(stage, "greedy") == evaluated(stage, "sampled") == [(4.0, 0.0)]


async def test_an_evaluation_without_an_engine_left_ends_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=2, evaluate_every=1)

    async def die(lease: Lease) -> None:
        if lease.purpose == "evaluate":
            for generator in stage.generators:
                generator.is_dead = True
            stage.generators[0].check_alive()

    stage.on_scored = die  # type: ignore[method-assign]
    with pytest.raises(FleetExhausted):
        async with asyncio.timeout(20):
            await stage.run()


async def test_rows_are_recorded_as_they_were_leased_and_seeded_ones_draw_numbers_of_their_own(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=1, evaluate_after=True, seed=3)
    stage.config = replace(stage.config, sampling=replace(stage.config.sampling, seeded=True))
    stage.generation_s = lambda lease: 0.01 * (4 - lease.sample.row)  # type: ignore[method-assign]
    await stage.run()
    ids = list(stage.records[-1].evaluated)
    assert ids == sorted(ids, reverse=True)
    leases = [lease for lease in stage.leases if lease.purpose == "evaluate"]
    assert len({lease.sampling.seed for lease in leases}) == len({lease.sample.row for lease in leases}) == 4
