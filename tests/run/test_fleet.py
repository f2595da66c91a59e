"""Engines come and go beside a run that goes on: restarts, waiting for room, the budget."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from vtriune.run.fleet import Fleet, FleetExhausted, Health, Spawned


class Cluster:
    """Spawns engines when `room` of their rank is set; may refuse."""

    def __init__(self, num_engines: int, num_restarts: int) -> None:
        self.room = [asyncio.Event() for _ in range(num_engines)]
        self.num_spawned = 0
        self.num_stopped = 0
        self.num_changes = 0
        self.error: Exception | None = None
        self.fleet = Fleet(num_engines, 4, num_restarts, self._spawn, self._changed)

    async def _spawn(self, rank: int) -> Spawned:
        await self.room[rank].wait()
        if self.error is not None:
            raise self.error
        self.num_spawned += 1
        return Spawned(self, None)

    async def stop(self) -> None:
        self.num_stopped += 1

    def _changed(self) -> None:
        self.num_changes += 1

    def healths(self) -> list[Health]:
        return [engine.health for engine in self.fleet.engines]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_a_start_waits_for_those_that_have_room_and_the_others_join_later() -> None:
    cluster = Cluster(3, num_restarts=0)
    cluster.room[0].set()
    await cluster.fleet.start(1)
    assert cluster.healths() == [Health.STALE, Health.STARTING, Health.STARTING]
    before = cluster.num_changes
    cluster.room[2].set()
    await until(lambda: cluster.healths()[2] is Health.STALE)
    await until(lambda: cluster.num_changes > before)
    assert cluster.healths() == [Health.STALE, Health.STARTING, Health.STALE]
    await cluster.fleet.stop()
    assert (cluster.num_spawned, cluster.num_stopped) == (2, 2)


async def test_a_successor_starts_at_once_and_waiting_for_room_costs_one_restart_however_often_it_is_reported() -> None:
    cluster = Cluster(2, num_restarts=3)
    for room in cluster.room:
        room.set()
    await cluster.fleet.start()
    cluster.room[1].clear()
    lost = cluster.fleet.engines[1]
    for _ in range(10):
        cluster.fleet.mark_dead(lost, "its node is lost")
        cluster.fleet.mark_dead(cluster.fleet.engines[1], "its node is lost")
        cluster.fleet.raise_if_exhausted()
        await asyncio.sleep(0)
    assert cluster.fleet.num_restarts_left == 2
    assert cluster.healths() == [Health.STALE, Health.STARTING]
    cluster.room[1].set()
    await until(lambda: cluster.healths()[1] is Health.STALE)
    assert (lost.health, cluster.fleet.num_deaths) == (Health.DEAD, 1)
    await cluster.fleet.stop()


async def test_what_is_known_of_a_dead_engine_says_nothing_of_its_successor() -> None:
    cluster = Cluster(1, num_restarts=5)
    cluster.room[0].set()
    await cluster.fleet.start()
    dead = cluster.fleet.engines[0]
    dead.num_leased = 3
    cluster.fleet.mark_dead(dead, "killed")
    await until(lambda: cluster.healths() == [Health.STALE])
    cluster.fleet.mark_dead(dead, "a call to it broke, as one now hears")
    assert (cluster.healths(), cluster.fleet.engines[0].num_leased) == ([Health.STALE], 0)
    await cluster.fleet.stop()


async def test_a_run_whose_generators_all_wait_for_room_waits_with_them() -> None:
    cluster = Cluster(1, num_restarts=1)
    cluster.room[0].set()
    await cluster.fleet.start()
    cluster.room[0].clear()
    cluster.fleet.mark_dead(cluster.fleet.engines[0], "its node is lost")
    for _ in range(3):
        cluster.fleet.raise_if_exhausted()
        await asyncio.sleep(0)
    await cluster.fleet.stop()
    assert cluster.num_stopped == 1


async def test_a_generator_that_does_not_start_uses_the_budget_up_and_the_end_names_why() -> None:
    cluster = Cluster(1, num_restarts=2)
    cluster.room[0].set()
    await cluster.fleet.start()
    cluster.error = RuntimeError("no such model")
    cluster.fleet.mark_dead(cluster.fleet.engines[0], "killed")

    async def go_on() -> None:
        while True:
            cluster.fleet.raise_if_exhausted()
            await asyncio.sleep(0)

    with pytest.raises(FleetExhausted) as caught:
        await asyncio.wait_for(go_on(), 5)
    assert str(caught.value.__cause__) == "no such model"
    assert cluster.fleet.num_restarts_left == 0


@pytest.mark.parametrize("phase", ["the dead process ends", "its successor starts", "it has ended"])
async def test_no_process_is_left_when_the_run_ends_while_a_generator_is_replaced(phase: str) -> None:
    """`living` counts processes, as a machine would."""
    living: set[str] = set()
    may_end, may_start = asyncio.Event(), asyncio.Event()
    names = iter("abc")

    class Process:
        def __init__(self) -> None:
            self.name = next(names)
            living.add(self.name)

        async def stop(self) -> None:
            if self.name == "a":
                await may_end.wait()
            living.discard(self.name)

    async def spawn(rank: int) -> Spawned:
        process = Process()
        try:
            if process.name == "b":
                await may_start.wait()
        except asyncio.CancelledError:
            await process.stop()
            raise
        return Spawned(process, None)  # type: ignore[arg-type]

    fleet = Fleet(1, 4, 2, spawn, lambda: None)
    await fleet.start()
    fleet.mark_dead(fleet.engines[0], "its engine broke, the process lives")
    await asyncio.sleep(0)
    if phase != "the dead process ends":
        may_end.set()
        await until(lambda: "b" in living)
    if phase == "it has ended":
        may_start.set()
        await until(lambda: fleet.stale)
    stopping = asyncio.create_task(fleet.stop())
    await asyncio.sleep(0)
    fleet.mark_dead(fleet.engines[0], "stopped")
    may_end.set()
    await stopping
    await asyncio.sleep(0.01)
    assert living == set()


async def test_a_first_start_that_fails_is_the_runs_error() -> None:
    cluster = Cluster(1, num_restarts=2)
    cluster.room[0].set()
    cluster.error = RuntimeError("no such model")
    with pytest.raises(RuntimeError, match="no such model"):
        await cluster.fleet.start()
