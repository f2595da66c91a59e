"""The processes of a run: spawns every role, watches them, ends them. Used by launch as `async with Crew(…)`.

    recorder ◀── verifiers ──▶ learner        references are handed out at spawn, so that groups go straight from
                     ▲                         producer to consumer
    generators ──────┘

Each generator is a mesh of its own, so that one can be replaced while the others go on.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from vtriune.config.tree import Config
from vtriune.data.processing import Preprocessor
from vtriune.data.store import Store
from vtriune.fleet import Fleet, Health, Spawned
from vtriune.messages import Canary
from vtriune.places import Places, Role, open_places
from vtriune.publisher import Publisher
from vtriune.runtime import (
    Actor,
    HostMesh,
    MeshFailure,
    ProcMesh,
    ProgressWatchdog,
    RestartPolicy,
    Stall,
    interface_of,
)

log = logging.getLogger(__name__)

START_S = 300.0
"""For Python and the imports of a role to load, on a machine that does other things besides."""
READY_S = 600.0
"""A model of many GiB may take minutes to load; a process that is dead is noticed at once, not after this."""
MAX_CANARY_ERROR = {"float32": 1e-3, "bfloat16": 0.15}
"""Nats: float32 engines agree to 1e-5; in bfloat16 the kernels' rounding differs by up to some hundredths."""


class RunStalled(RuntimeError):
    """Nothing was scored, trained or evaluated for `cluster.stall_s`; the text shows where every process stands."""


class Roles(NamedTuple):
    """The actor class of each role; launch names them, because this package may import neither actors nor learner."""

    generator: type[Actor]
    verifier_pool: type[Actor]
    learner: type[Actor]
    recorder: type[Actor]


class Crew:
    """Enter to spawn everything; leave to end everything, whatever happened meanwhile."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        roles: Roles,
        stores: list[Store],
        preprocessor: Preprocessor,
        say: Callable[[str], None],
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called when an engine dies or comes back; the controller's bell."""
        self.learner: Any = None
        self.recorder: Any = None
        self.verifiers: Any = None
        self._config = config
        self._folder = folder
        self._roles = roles
        self._store_folders = [str(store.folder) for store in stores]
        self._say = say
        self._procs: list[ProcMesh] = []
        self._places: Places
        generators = config.cluster.generators
        # Twice what the engine can run at once: a group keeps its places until its last completion ends, so with fewer the engine
        # runs half empty behind each group's longest completion. Waiting completions have no token yet, so they do not age.
        room = 2 * max(generators.max_sequences, config.policy.group_size)
        self.fleet = Fleet(generators.procs, room, generators.restarts, self._spawn_generator, lambda: self.on_change())
        self._canary = _canary(stores[-1], preprocessor)
        self._failures: asyncio.Queue[Exception] = asyncio.Queue()
        self._watchdog: ProgressWatchdog | None = None

    async def __aenter__(self) -> "Crew":
        self._loop = asyncio.get_running_loop()
        self._places = await open_places(self._config.cluster, self._say)
        try:
            await self._start()
            self._watchdog = ProgressWatchdog(self._config.cluster.stall_s, self._stalled)
            self.fleet.on_report = self._watchdog.progress
        except BaseException:
            # Whatever failed half-way, the processes that did start are ended before the error goes on.
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def publisher(self) -> Publisher:
        """Publishes from this crew's learner to its fleet."""
        return Publisher(
            self.learner, self.fleet, self._canary, max_canary_error=MAX_CANARY_ERROR[self._config.model.dtype]
        )

    async def watch(self) -> None:
        """Waits for a process to end that the run cannot go on without, or for a stall; raises MeshFailure or RunStalled."""
        raise await self._failures.get()

    async def close(self) -> None:
        """End every process. Idempotent."""
        if self._watchdog is not None:
            self._watchdog.close()
        await self.fleet.stop()
        await asyncio.gather(*(procs.stop() for procs in self._procs))
        self._procs.clear()
        self._places.close()

    async def _start(self) -> None:
        """Processes first, all at once; then actors, which construct while others do."""
        cluster, started = self._config.cluster, time.monotonic()
        recorder, learner, verifiers = await asyncio.gather(
            self._spawn_role("recorder", threads=1),
            self._spawn_role("learner", threads=cluster.learner.threads),
            self._spawn_role("verifiers", threads=1, num_restarts=cluster.verifiers.restarts),
        )
        roles, folders = self._roles, self._store_folders
        self.recorder = recorder.spawn("recorder", roles.recorder, self._config, str(self._folder))
        self.learner = learner.spawn("learner", roles.learner, self._config, str(self._folder), folders)
        self.verifiers = verifiers.spawn(
            "verifiers", roles.verifier_pool, self._config, folders, self.learner, self.recorder
        )
        await asyncio.gather(
            self.fleet.start(self._places.num_generators),
            self._ready_learner(interface_of(learner.peers[0])),
            _ready(self.verifiers),
            self.recorder.initialized,
        )
        self._say(f"generators, verifiers, learner and recorder are ready after {time.monotonic() - started:.0f} s")

    async def _ready_learner(self, host: str) -> None:
        port = await self.learner.slice(procs=0).open_store.call_one()
        await self.learner.connect.call(host, port)
        await self.learner.ready.call()

    async def _spawn_generator(self, rank: int) -> Spawned:
        procs = await self._spawn(
            await self._places.generator_host(rank),
            1,
            name=f"generator-{rank}",
            env=_thread_limits(self._config.cluster.generators.threads),
            on_failure=lambda failure: self._loop.call_soon_threadsafe(self._generator_failed, rank, failure),
        )
        try:
            actor = procs.spawn(
                "generator", self._roles.generator, self._config, self._store_folders, self.verifiers, rank
            )
            await _ready(actor)
        except BaseException:  # Also when the run ends meanwhile: nobody else knows of this process yet.
            await procs.stop()
            raise
        return Spawned(procs, actor)

    async def _spawn_role(self, role: Role, *, threads: int, num_restarts: int = 0) -> ProcMesh:
        procs = await self._spawn(
            *self._places.hosts(role),
            name=role,
            env=_thread_limits(threads),
            on_failure=lambda failure: self._loop.call_soon_threadsafe(self._failed, failure),
            restart=RestartPolicy(num_restarts) if num_restarts else None,
        )
        self._procs.append(procs)
        return procs

    async def _spawn(self, hosts: HostMesh, per_host: int, **options: Any) -> ProcMesh:
        """Processes along the one dimension `procs`."""
        spawning = asyncio.ensure_future(
            asyncio.to_thread(
                hosts.spawn_procs,
                {"procs": per_host},
                log_folder=self._folder / "logs",
                frozen_after_s=self._config.cluster.heartbeat_s,
                ready_s=START_S,
                **options,
            )
        )
        try:
            return (await asyncio.shield(spawning)).flatten("procs")
        except asyncio.CancelledError:
            # The thread cannot be cancelled; what it started must not outlive the run.
            await (await spawning).stop()
            raise

    def _failed(self, failure: MeshFailure) -> None:
        """A restarted verifier process costs the groups it held nothing: generators have them scored again."""
        if failure.is_restarting:
            log.warning("%s; it is restarted", failure)
        else:
            self._failures.put_nowait(failure)

    def _stalled(self, stall: Stall) -> None:
        """On the watchdog's thread."""
        self._loop.call_soon_threadsafe(self._failures.put_nowait, RunStalled(stall.report()))

    def _generator_failed(self, rank: int, failure: MeshFailure) -> None:
        engine = self.fleet.engines[rank]
        if engine.health is not Health.DEAD:
            self.fleet.bury(engine, str(failure))


async def _ready(actor: Any) -> None:
    await actor.ready.within(READY_S).call()


def _thread_limits(threads: int) -> dict[str, str]:
    """Two cores are shared by five processes: each is told how many threads it may use, and not to spin for long.

    OpenMP's threads rest between operations. Without any spinning (PASSIVE alone) waking them doubles the time of a small
    model's update on two threads; with libgomp's own count they would burn the core that the next process waits for.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "20000",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _canary(store: Store, preprocessor: Preprocessor) -> Canary:
    """The first sample's prompt, image included, with its gold answer as the response."""
    sample = store.sample(0)
    ids = preprocessor.tokenizer(sample.reward.gold, add_special_tokens=False)["input_ids"]
    return Canary(store.ref(0), np.asarray([*ids, *preprocessor.end_token_ids[:1]], np.int32))
