"""Engines come and go beside a run that goes on: restarts, waiting for room, the budget."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from vtriune.fleet import Fleet, FleetExhausted, Health, Spawned


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
    assert cluster.healths() == [Health.STALE, Health.DEAD, Health.DEAD]
    await cluster.fleet.revive()
    before = cluster.num_changes
    cluster.room[2].set()
    await until(lambda: cluster.healths()[2] is Health.STALE)
    assert cluster.num_changes > before
    assert cluster.healths() == [Health.STALE, Health.DEAD, Health.STALE]
    await cluster.fleet.stop()
    assert (cluster.num_spawned, cluster.num_stopped) == (2, 2)


async def test_waiting_for_room_costs_one_restart_however_often_it_is_asked_for() -> None:
    cluster = Cluster(2, num_restarts=3)
    for room in cluster.room:
        room.set()
    await cluster.fleet.start()
    cluster.room[1].clear()
    cluster.fleet.bury(cluster.fleet.engines[1], "its node is lost")
    for _ in range(10):
        await cluster.fleet.revive()
        await asyncio.sleep(0)
    assert cluster.fleet.num_restarts_left == 2
    assert cluster.healths() == [Health.STALE, Health.DEAD]
    cluster.room[1].set()
    await until(lambda: cluster.healths()[1] is Health.STALE)
    assert cluster.fleet.engines[1].incarnation == 2
    await cluster.fleet.stop()


async def test_a_run_whose_generators_all_wait_for_room_waits_with_them() -> None:
    cluster = Cluster(1, num_restarts=1)
    cluster.room[0].set()
    await cluster.fleet.start()
    cluster.room[0].clear()
    cluster.fleet.bury(cluster.fleet.engines[0], "its node is lost")
    for _ in range(3):
        await cluster.fleet.revive()
        await asyncio.sleep(0)
    await cluster.fleet.stop()
    assert cluster.num_stopped == 1


async def test_a_generator_that_does_not_start_uses_the_budget_up_and_the_end_names_why() -> None:
    cluster = Cluster(1, num_restarts=2)
    cluster.room[0].set()
    await cluster.fleet.start()
    cluster.error = RuntimeError("no such model")
    cluster.fleet.bury(cluster.fleet.engines[0], "killed")

    async def go_on() -> None:
        while True:
            await cluster.fleet.revive()
            await asyncio.sleep(0)

    with pytest.raises(FleetExhausted) as caught:
        await asyncio.wait_for(go_on(), 5)
    assert str(caught.value.__cause__) == "no such model"
    assert cluster.fleet.num_restarts_left == 0


async def test_a_first_start_that_fails_is_the_runs_error() -> None:
    cluster = Cluster(1, num_restarts=2)
    cluster.room[0].set()
    cluster.error = RuntimeError("no such model")
    with pytest.raises(RuntimeError, match="no such model"):
        await cluster.fleet.start()
