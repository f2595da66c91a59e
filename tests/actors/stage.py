"""Actors for the tests: a generator that samples rows without a store, and a verifier process that keeps what it gets."""

import asyncio
import time
from typing import Any

from actors.engine import Engine, environment
from actors.engine.engine import InFlight
from actors.generator import Generator
from actors.verifier_pool import report_of
from tests.actors.worlds import Rows, preprocessor_of
from verifiers import Verdict
from vtriune.config.tree import Config
from vtriune.messages import Group, GroupReport, ScoredGroup
from vtriune.runtime import Actor, ActorMesh, endpoint


class Keeper(Actor):
    """Stands in for the verifier pool: every verdict is `ok`."""

    def __init__(self) -> None:
        self.groups: list[Group] = []

    @endpoint
    async def score(self, group: Group) -> GroupReport:
        self.groups.append(group)
        verdict = Verdict("ok", 1.0, 1.0, 1.0, {}, "")
        return report_of(ScoredGroup(group, [verdict] * len(group.trajectories), 0.0))

    @endpoint
    async def take(self) -> list[Group]:
        groups, self.groups = self.groups, []
        return groups


class StagedGenerator(Generator):
    """The product's generator over `Rows`; `step_pause_s` slows every step down, so that a publish meets running ones."""

    def __init__(self, config: Config, verifiers: ActorMesh[Keeper], step_pause_s: float = 0.0) -> None:
        super().__init__(config, [], verifiers, 0)  # type: ignore[arg-type]
        self._step_pause_s = step_pause_s

    def _build(self) -> Engine:
        environment.settle(self._config.cluster.generators)
        engine = Engine(self._config, preprocessor_of(self._config), Rows(), 0)
        self._slow_down(engine)
        self._watch_preemptions(engine)
        return engine

    def _slow_down(self, engine: Any) -> None:
        step = engine._core.step

        def slower() -> Any:
            time.sleep(self._step_pause_s)
            return step()

        engine._core.step = slower

    def _watch_preemptions(self, engine: Any) -> None:
        scheduler = engine._core._client.engine_core.scheduler
        preempt = scheduler._preempt_request
        self._num_preemptions = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._num_preemptions += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    @endpoint
    async def num_preemptions(self) -> int:
        """Requests the scheduler took the blocks from, since the start."""
        return self._num_preemptions

    @endpoint
    async def set_in_flight(self, mode: InFlight) -> None:
        """As if `policy.in_flight` had been another."""
        self._running.in_flight = mode

    @endpoint
    async def hold(self) -> None:
        """What is asked for from now on waits, and is begun at once with `release`."""
        await asyncio.wrap_future(self._running._loop.hold(drain=False))

    @endpoint
    async def release(self) -> None:
        await asyncio.wrap_future(self._running._loop.release())

    @endpoint
    async def break_step(self) -> None:
        """The next step raises."""

        def broken() -> Any:
            raise ZeroDivisionError("a kernel divided by zero")

        self._running._core.step = broken
