"""The processes of a run: spawns every role, watches them, ends them. Used by launch as `async with RunProcesses(…)`.

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
from typing import Any, NamedTuple

import numpy as np

from vtriune import roles
from vtriune.config.tree import Config
from vtriune.data.processing import Preprocessor
from vtriune.data.store import Store
from vtriune.messages import Canary
from vtriune.run.first_to_end import first_to_end
from vtriune.run.fleet import Fleet, Spawned
from vtriune.run.hosts import Hosts, Role, open_hosts
from vtriune.run.publisher import Publisher
from vtriune.runtime import (
    HostMesh,
    MeshFailure,
    ProcMesh,
    ProgressWatchdog,
    RestartPolicy,
    Stall,
    interface_of,
    report_step,
)

log = logging.getLogger(__name__)

START_S = 300.0
"""For Python and the imports of a role to load, on a machine that does other things besides."""
READY_S = 600.0
"""A model of many GiB may take minutes to load; a process that is dead is noticed at once, not after this."""
STALL_AFTER_LEASE_S = 300.0
MAX_CANARY_ERROR = {"float32": 1e-3, "bfloat16": 0.15}
"""Nats: float32 engines agree to 1e-5; in bfloat16 the kernels' rounding differs by up to some hundredths."""


class RunStalled(RuntimeError):
    """No process got any work done for `cluster.stall_s`; the text says what each did last, and where it stands."""


class ActorClasses(NamedTuple):
    """One for each role; launch names them, because this package may import neither actors nor learner."""

    generator: type[roles.Generator]
    verifier_pool: type[roles.VerifierPool]
    learner: type[roles.Learner]
    recorder: type[roles.Recorder]


class RunProcesses:
    """Enter to spawn everything; leave to end everything, whatever happened meanwhile."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        classes: ActorClasses,
        stores: list[Store],
        preprocessor: Preprocessor,
        say: Callable[[str], None],
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called when an engine dies or comes back; the controller's `wake`."""
        self.learner: roles.Learner
        self.recorder: roles.Recorder
        self.verifiers: roles.VerifierPool
        self._config = config
        self._folder = folder
        self._classes = classes
        self._store_folders = [str(store.folder) for store in stores]
        self._say = say
        self._procs: list[ProcMesh] = []
        self._hosts: Hosts
        generators = config.cluster.generators
        # Twice what the engine can run at once: a group keeps its places until its last completion ends, so with fewer the engine
        # runs half empty behind each group's longest completion. Waiting completions have no token yet, so they do not age.
        room = 2 * max(generators.max_sequences, config.policy.group_size)
        self.fleet = Fleet(generators.procs, room, generators.restarts, self._spawn_generator, lambda: self.on_change())
        self._canary = _canary(stores[-1], preprocessor)
        self._failures: asyncio.Queue[Exception] = asyncio.Queue()
        self._watchdog: ProgressWatchdog | None = None

    async def __aenter__(self) -> "RunProcesses":
        self._loop = asyncio.get_running_loop()
        self._hosts = await open_hosts(self._config.cluster, self._say)
        self._watchdog = ProgressWatchdog(_stall_s(self._config), self._stalled)
        try:
            await first_to_end(self._start(), self.watch())
        except BaseException:
            # Whatever failed half-way, the processes that did start are ended before the error goes on.
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def publisher(self) -> Publisher:
        """Publishes from this run's learner to its fleet."""
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
        self._hosts.close()

    async def _start(self) -> None:
        """Processes first, all at once; then actors, which construct while others do."""
        cluster, started = self._config.cluster, time.monotonic()
        report_step("controller", "starts recorder, learner and verifiers", START_S)
        recorder, learner, verifiers = await asyncio.gather(
            self._spawn_role("recorder", threads=1),
            self._spawn_role("learner", threads=cluster.learner.threads),
            self._spawn_role("verifiers", threads=1, num_restarts=cluster.verifiers.restarts),
        )
        classes, folders = self._classes, self._store_folders
        self.recorder = recorder.spawn("recorder", classes.recorder, self._config, str(self._folder))
        self.learner = learner.spawn("learner", classes.learner, self._config, folders)
        self.verifiers = verifiers.spawn("verifiers", classes.verifier_pool, self._config, self.learner, self.recorder)
        report_step("controller", "waits for all processes to be ready")
        await asyncio.gather(
            self.fleet.start(self._hosts.num_generators),
            self._ready_learner(interface_of(learner.peers[0])),
            self._ready_verifiers(),
            self.recorder.initialized,
        )
        report_step("controller", "all processes are ready")
        self._say(f"generators, verifiers, learner and recorder are ready after {time.monotonic() - started:.0f} s")

    async def _ready_verifiers(self) -> None:
        report_step("verifiers", "warm up", READY_S)
        await self.verifiers.ready.within(READY_S).call()
        report_step("verifiers", "are warm")

    async def _ready_learner(self, host: str) -> None:
        port = await self.learner.slice(procs=0).open_store.call_one()
        await self.learner.connect.call(host, port)

    async def _spawn_generator(self, rank: int) -> Spawned:
        work = f"generator {rank}"
        report_step(work, "waits for room")
        host = await self._hosts.generator_host(rank)
        # Nothing is heard of an engine that loads its model: the deadlines of its start say how long that may take.
        report_step(work, "starts", START_S + READY_S)
        try:
            return await self._start_generator(rank, host)
        finally:
            report_step(work, "has started, or failed to")

    async def _start_generator(self, rank: int, host: HostMesh) -> Spawned:
        engine = self.fleet.engines[rank]
        procs = await self._spawn(
            host,
            1,
            name=f"generator-{rank}",
            env=_thread_limits(self._config.cluster.generators.threads),
            on_failure=lambda failure: self._loop.call_soon_threadsafe(self.fleet.mark_dead, engine, str(failure)),
        )
        try:
            actor = procs.spawn(
                "generator", self._classes.generator, self._config, self._store_folders, self.verifiers, rank
            )
            await actor.ready.within(READY_S).call()
        except BaseException:  # Also when the run ends meanwhile: nobody else knows of this process yet.
            await procs.stop()
            raise
        return Spawned(procs, actor)

    async def _spawn_role(self, role: Role, *, threads: int, num_restarts: int = 0) -> ProcMesh:
        procs = await self._spawn(
            *self._hosts.hosts(role),
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


def _stall_s(config: Config) -> float:
    """By default so long that a lease which nobody works on has been given to another generator before."""
    given = config.cluster.stall_s
    return config.policy.lease_s + STALL_AFTER_LEASE_S if given is None else given


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
