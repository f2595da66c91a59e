"""The generators as the controller sees them: their health, their room, their versions. Called by controller and publisher.

    DEAD ──spawn──▶ STALE ──refit (full publish) and canary──▶ HEALTHY
      ▲                                                          │
      └───────────────── process ended, or a call broke ─────────┘

Only a HEALTHY engine is leased to, so nothing is ever sampled from a version older than the last publish. Engines are
spawned beside the run, which goes on with the others meanwhile; on a cluster a spawn first waits for room, perhaps for ever.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from vtriune.messages import GroupReport, Lease

log = logging.getLogger(__name__)


class Health(enum.Enum):
    """Whether an engine may be leased to."""

    DEAD = "dead"
    STALE = "stale"
    HEALTHY = "healthy"


class Spawned(NamedTuple):
    """A generator's process and its actor, both one rank."""

    procs: Any
    actor: Any


class Engine:
    """One generator rank over all its incarnations."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.health = Health.DEAD
        self.spawned: Spawned | None = None
        self.num_leased = 0
        """Completions, over all its leases."""
        self.incarnation = 0

    @property
    def actor(self) -> Any:
        """The mesh to call; raises RuntimeError while dead."""
        if self.spawned is None:
            raise RuntimeError(f"generator {self.rank} is dead")
        return self.spawned.actor


class FleetExhausted(RuntimeError):
    """No generator is left and the restart budget is used up: `cluster.generators.restarts`."""


class Fleet:
    """`num_engines` generators, `room` completions each at a time."""

    def __init__(
        self,
        num_engines: int,
        room: int,
        num_restarts: int,
        spawn: Callable[[int], Awaitable[Spawned]],
        on_change: Callable[[], None],
    ) -> None:
        self.engines = [Engine(rank) for rank in range(num_engines)]
        self.room = room
        self.num_restarts_left = num_restarts
        self.num_deaths = 0
        self.num_shared = 0
        """Groups sampled by several engines."""
        self.on_report: Callable[[], None] = lambda: None
        """Called whenever a group is scored and delivered, or trained on: the progress that the watchdog waits for."""
        self._spawn = spawn
        self._on_change = on_change
        self._spawning: dict[int, asyncio.Task[None]] = {}
        self._last_error: Exception | None = None

    @property
    def healthy(self) -> list[Engine]:
        """Engines that may be leased to, by rank."""
        return [engine for engine in self.engines if engine.health is Health.HEALTHY]

    @property
    def stale(self) -> list[Engine]:
        """Engines that run and wait for a refit."""
        return [engine for engine in self.engines if engine.health is Health.STALE]

    async def start(self, num_awaited: int | None = None) -> None:
        """Spawn every engine. The first `num_awaited` (default: all) are STALE afterwards; the others join when they are up.

        Raises what the spawn of an awaited one raises.
        """
        num_awaited = len(self.engines) if num_awaited is None else num_awaited
        for engine in self.engines[num_awaited:]:
            self._begin(engine)
        await asyncio.gather(*(self._start(engine) for engine in self.engines[:num_awaited]))

    def pick(self, num_completions: int) -> Engine | None:
        """The healthy engine with the most room, or None when none has room for `num_completions`."""
        engine = min(self.healthy, key=lambda e: e.num_leased, default=None)
        if engine is None or engine.num_leased + num_completions > self.room:
            return None
        return engine

    def pick_others(self, engine: Engine, num_groups: int, num_completions: int) -> list[Engine]:
        """Idle engines to share the group that `engine` is about to be leased, `num_groups` being left to lease, this one included:
        near the end of an on-policy batch, or with fewer groups than engines, nobody looks on."""
        idle = [e for e in self.healthy if e.num_leased == 0 and e is not engine]
        num_sharing = min((len(idle) + 1) // max(num_groups, 1), num_completions)
        return idle[: max(num_sharing - 1, 0)] if engine.num_leased == 0 else []

    def reserve(self, engine: Engine, lease: Lease, others: Sequence[Engine] = ()) -> None:
        """Take the lease's room at once, so that whoever leases many groups in a row spreads them; `generate` frees it."""
        for sharing in (engine, *others):
            sharing.num_leased += _share(lease, others)

    async def generate(self, engine: Engine, lease: Lease, others: Sequence[Engine] = ()) -> GroupReport:
        """Have `engine` generate a reserved group, shared with `others`, and see it scored and delivered. Raises what the actor
        raises."""
        self.num_shared += bool(others)
        try:
            alive = [other.actor for other in others if other.spawned is not None]
            report: GroupReport = await engine.actor.generate.call_one(lease, alive)
            self.on_report()
            return report
        finally:
            for sharing in (engine, *others):
                sharing.num_leased -= _share(lease, others)
            self._on_change()

    async def figures(self) -> dict[str, float]:
        """Means over the healthy engines since the last call: `generators/idle_share`, `generators/tokens_per_s` and so on."""
        answers = await asyncio.gather(
            *(_awaited(e.actor.stats.call_one()) for e in self.healthy), return_exceptions=True
        )
        # An engine that dies now is buried by whoever waits for its work.
        known = [answer for answer in answers if isinstance(answer, dict)]
        keys = ("idle_share", "tokens_per_s", "tokens_per_step")
        return {
            f"generators/{key}": sum(answer[key] for answer in known) / len(known)
            for key in keys
            if known and key in known[0]
        }

    def bury(self, engine: Engine, reason: str) -> None:
        """The engine's process ended or no longer answers. Idempotent per incarnation."""
        if engine.health is Health.DEAD:
            return
        log.warning("generator %d died: %s", engine.rank, reason)
        engine.health = Health.DEAD
        self.num_deaths += 1
        self._on_change()

    async def revive(self) -> None:
        """Begin to respawn dead engines while the budget lasts; each is STALE when it is up. Does not wait for that.

        Raises FleetExhausted when none is left alive and none is on its way.
        """
        for engine in self.engines:
            if engine.health is Health.DEAD and engine.rank not in self._spawning and self.num_restarts_left > 0:
                self.num_restarts_left -= 1
                self._begin(engine)
        if not self._spawning and all(engine.health is Health.DEAD for engine in self.engines):
            raise FleetExhausted(
                f"all {len(self.engines)} generators are dead and cluster.generators.restarts is used up; "
                "the last lines of logs/generator-*.log say why"
            ) from self._last_error

    async def stop(self) -> None:
        """End every engine's process, and spawns under way."""
        spawning = list(self._spawning.values())
        for task in spawning:
            task.cancel()
        await asyncio.gather(*spawning, return_exceptions=True)
        await asyncio.gather(*(self._stop(engine) for engine in self.engines))

    def _begin(self, engine: Engine) -> None:
        self._spawning[engine.rank] = asyncio.create_task(self._respawn(engine))

    async def _respawn(self, engine: Engine) -> None:
        try:
            await self._stop(engine)
            await self._start(engine)
        except Exception as error:
            # Whatever it was, the run goes on with the others; the budget says whether it is tried again.
            log.warning("generator %d did not start: %s", engine.rank, error)
            self._last_error = error
        finally:
            del self._spawning[engine.rank]
            self._on_change()

    async def _start(self, engine: Engine) -> None:
        start = time.monotonic()
        engine.spawned = await self._spawn(engine.rank)
        engine.health, engine.incarnation = Health.STALE, engine.incarnation + 1
        log.info("generator %d ready after %.1f s", engine.rank, time.monotonic() - start)
        self._on_change()

    async def _stop(self, engine: Engine) -> None:
        if engine.spawned is not None:
            spawned, engine.spawned = engine.spawned, None
            await spawned.procs.stop()


def _share(lease: Lease, others: Sequence[Engine]) -> int:
    """Completions of each engine, rounded up."""
    return -(-lease.num_completions // (1 + len(others)))


async def _awaited(future: Any) -> Any:
    return await future
