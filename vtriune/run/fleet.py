"""The generators as the controller sees them: their health, their room, their versions. Called by controller and publisher.

    STARTING ──▶ STALE ──refit (full publish) and canary──▶ HEALTHY
                   └──────── process ended, or a call broke ───┴──▶ DEAD ──▶ its successor is STARTING, at once

Only a HEALTHY engine is leased to, so nothing is ever sampled from a version older than the last publish. A slot is one engine from
its start to its death, and a dead one stays dead: whoever still holds it cannot take its successor for it. Successors start beside
the run, which goes on with the others, whatever it does meanwhile; they join at the next publish, or earlier where the run waits.

| waits                | for                                                  | unblocked by                                       |
| -------------------- | ---------------------------------------------------- | -------------------------------------------------- |
| `start`, a successor | the end of the process before, room, the new process | its deadlines; room on a cluster, which may never  |
|                      |                                                      | come: others go on, and without any `cluster.stall_s` |
| `generate`           | a group's report                                     | the report, an error, the engine's end; leases have |
|                      |                                                      | deadlines of their own, `policy.lease_s`           |
| `figures`            | every engine's answer                                | `FIGURES_S`                                        |
| `stop`               | starts under way, every process                      | their cancellation; SIGKILL after a grace          |
"""

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from vtriune import roles
from vtriune.messages import GroupReport, Lease
from vtriune.run.stopwatch import Busy
from vtriune.runtime import ActorError, ConnectionLost, MeshFailure, MessageRefused, kind_of, report_step

log = logging.getLogger(__name__)

FIGURES_S = 5.0
"""A process that does not tell its figures within this is left out of a version's line."""


class Health(enum.Enum):
    """Whether an engine may be leased to."""

    STARTING = "starting"
    DEAD = "dead"
    STALE = "stale"
    HEALTHY = "healthy"


class Stoppable(Protocol):
    """A generator's process, as far as the fleet knows it."""

    def stop(self) -> Awaitable[None]: ...


class Spawned(NamedTuple):
    """A generator's process and its actor, both one rank."""

    procs: Stoppable
    actor: roles.Generator


@dataclass(eq=False)
class EngineSlot:
    """One engine, from its start to its death."""

    rank: int
    health: Health = Health.STARTING
    spawned: Spawned | None = None
    num_leased: int = 0
    """Completions, over all its leases."""

    @property
    def actor(self) -> roles.Generator:
        """The mesh to call, which raises MeshFailure once dead. RuntimeError while it starts."""
        if self.spawned is None:
            raise RuntimeError(f"generator {self.rank} has not started")
        return self.spawned.actor


class FleetExhausted(RuntimeError):
    """No generator is left and the restart budget is used up: `cluster.generators.restarts`."""


class LeaseLost(Exception):
    """A lease ended without a report, and cost no more than that; `is_death` with its generator, or cut off from it: the group may
    be innocent."""

    def __init__(self, reason: str, *, is_death: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.is_death = reason, is_death


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
        self.engines = [EngineSlot(rank) for rank in range(num_engines)]
        self.room = room
        self.num_restarts_left = num_restarts
        self.num_deaths = 0
        self.num_shared = 0
        """Groups sampled by several engines."""
        self.verifying = Busy(time.monotonic())
        """When groups were being verified, those of evaluations too."""
        self._spawn = spawn
        self._on_change = on_change
        self._starting: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._last_error: Exception | None = None
        self._traced: set[tuple[str, ...]] = set()
        """Tracebacks that are in the log already: the places each went through."""

    @property
    def healthy(self) -> list[EngineSlot]:
        """Engines that may be leased to, by rank."""
        return [engine for engine in self.engines if engine.health is Health.HEALTHY]

    @property
    def stale(self) -> list[EngineSlot]:
        """Engines that run and wait for a refit."""
        return [engine for engine in self.engines if engine.health is Health.STALE]

    async def start(self, num_awaited: int | None = None) -> None:
        """Spawn every engine. The first `num_awaited` (default: all) are STALE afterwards; the others join when they are up.

        Raises what the spawn of an awaited one raises.
        """
        num_awaited = len(self.engines) if num_awaited is None else num_awaited
        for engine in self.engines[num_awaited:]:
            self._begin(self._start_again(engine.rank))
        await asyncio.gather(*(self._begin(self._start(engine)) for engine in self.engines[:num_awaited]))

    def pick(self, num_completions: int) -> EngineSlot | None:
        """The healthy engine with the most room, or None when none has room for `num_completions`."""
        engine = min(self.healthy, key=lambda e: e.num_leased, default=None)
        if engine is None or engine.num_leased + num_completions > self.room:
            return None
        return engine

    def pick_others(self, engine: EngineSlot, num_groups: int, num_completions: int) -> list[EngineSlot]:
        """Idle engines to share the group that `engine` is about to be leased, `num_groups` being left to lease, this one included:
        near the end of an on-policy batch, or with fewer groups than engines, nobody looks on."""
        idle = [e for e in self.healthy if e.num_leased == 0 and e is not engine]
        num_sharing = min((len(idle) + 1) // max(num_groups, 1), num_completions)
        return idle[: max(num_sharing - 1, 0)] if engine.num_leased == 0 else []

    def reserve(self, engine: EngineSlot, lease: Lease, others: Sequence[EngineSlot] = ()) -> None:
        """Take the lease's room at once, so that whoever leases many groups in a row spreads them; `generate` frees it."""
        for sharing in (engine, *others):
            sharing.num_leased += _share(lease, others)

    async def generate(self, engine: EngineSlot, lease: Lease, others: Sequence[EngineSlot] = ()) -> GroupReport:
        """Have `engine` generate a reserved group, shared with `others`, and see it scored and delivered. Raises LeaseLost, having
        marked the engine dead where it is to blame, and what an actor raises of kind `fatal`."""
        self.num_shared += bool(others)
        try:
            alive = [other.actor for other in others if other.health is not Health.DEAD]
            report = await engine.actor.generate.call_one(lease, alive)
            self.verifying.ended(report.verification_s, time.monotonic())
            report_step("groups", f"group {lease.group_id} is scored and delivered")
            return report
        except MeshFailure as failure:
            self.mark_dead(engine, _first_line(failure))
            raise LeaseLost("generator died", is_death=True) from failure
        except ConnectionLost as error:
            # The generator lives, and may even deliver: whichever attempt is reported first counts.
            raise LeaseLost(_first_line(error), is_death=True) from error
        except (ActorError, MessageRefused) as error:
            kind = kind_of(error)
            if kind == "fatal":
                raise
            if kind == "engine":
                self.mark_dead(engine, _first_line(error))
            if isinstance(error, MessageRefused):
                raise LeaseLost(_first_line(error)) from error
            self._trace(error)
            raise LeaseLost(error.reason) from error
        finally:
            for sharing in (engine, *others):
                sharing.num_leased -= _share(lease, others)
            self._on_change()

    def _trace(self, error: ActorError) -> None:
        """The traceback into the log, once for all errors that came the same way."""
        way = tuple(line for line in error.remote_traceback.splitlines() if line.startswith("  File "))
        if way not in self._traced:
            self._traced.add(way)
            log.warning("%s", error)

    async def figures(self) -> dict[str, float]:
        """Means over the healthy engines since the last call: `throughput/generators/tokens_per_s` and so on."""
        answers = await asyncio.gather(
            *(e.actor.stats.within(FIGURES_S).call_one() for e in self.healthy), return_exceptions=True
        )
        # An engine that dies now is marked by whoever waits for its work.
        known = [answer for answer in answers if isinstance(answer, dict)]
        told = {
            k: [answer[k] for answer in known if k in answer] for k in ("idle_share", "tokens_per_s", "tokens_per_step")
        }
        return {f"throughput/generators/{key}": sum(values) / len(values) for key, values in told.items() if values}

    def mark_dead(self, engine: EngineSlot, reason: str) -> None:
        """The engine's process ended or no longer answers; its successor starts, while the budget lasts. Idempotent."""
        if engine.health not in (Health.STALE, Health.HEALTHY):
            return
        log.warning("generator %d died: %s", engine.rank, reason)
        engine.health = Health.DEAD
        self.num_deaths += 1
        if not self._is_stopping and self._may_restart():
            self._begin(self._start_again(engine.rank))
        self._on_change()

    def raise_if_exhausted(self) -> None:
        """Raises FleetExhausted when no engine is alive and none on its way."""
        if not self._starting and not self.healthy and not self.stale:
            raise FleetExhausted(
                f"all {len(self.engines)} generators are dead and cluster.generators.restarts is used up; "
                "the last lines of logs/generator-*.log say why"
            ) from self._last_error

    async def stop(self) -> None:
        """End every engine's process, and starts under way; none begins from now on."""
        self._is_stopping = True
        starting = list(self._starting)
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(self._stop(engine) for engine in self.engines))

    def _begin(self, starting: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start engines beside the run."""
        task = asyncio.create_task(starting)
        self._starting.add(task)
        task.add_done_callback(self._started)
        return task

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        self._on_change()

    def _may_restart(self) -> bool:
        """Takes one from the budget, if there is one left."""
        may = self.num_restarts_left > 0
        self.num_restarts_left -= may
        return may

    async def _start_again(self, rank: int) -> None:
        """A successor, once the process before has ended: that may be a living one whose engine broke."""
        while True:
            try:
                await self._stop(self.engines[rank])
                self.engines[rank] = EngineSlot(rank)
                return await self._start(self.engines[rank])
            except Exception as error:
                # Whatever it was, the run goes on with the others; the budget says whether it is tried again.
                log.warning("generator %d did not start: %s", rank, error)
                self._last_error = error
                self.engines[rank].health = Health.DEAD
            if not self._may_restart():
                return None

    async def _start(self, engine: EngineSlot) -> None:
        start = time.monotonic()
        engine.spawned = await self._spawn(engine.rank)
        engine.health = Health.STALE
        log.info("generator %d ready after %.1f s", engine.rank, time.monotonic() - start)

    async def _stop(self, engine: EngineSlot) -> None:
        if engine.spawned is not None:
            await engine.spawned.procs.stop()


def _share(lease: Lease, others: Sequence[EngineSlot]) -> int:
    """Completions of each engine, rounded up."""
    return -(-lease.num_completions // (1 + len(others)))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
