"""One run of the real control plane over simulated device time: spawns the actors, runs the product's Controller, reads the traces.

Real: controller, leasing, window, ledger, fleet, publisher, runtime, sockets, verifier pool with its workers, recorder with journal and
archive, data store and cursor; the learner keeps what it is given until it is trained. Simulated: decoding, training, weight transfer.
Left out: tracking, evaluation.
"""

import asyncio
import contextlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from actors.recorder import Recorder
from actors.verifier_pool import VerifierPoolActor
from bench.device_time.roles import (
    Device,
    EngineTrace,
    LearnerTrace,
    SimulatedGenerator,
    SimulatedLearner,
)
from vtriune.config.tree import (
    Cluster,
    Config,
    Data,
    Evaluation,
    Generators,
    Policy,
    Rewards,
    Run,
    SamplingSection,
    Tracking,
)
from vtriune.data.build import build_store
from vtriune.data.schema import PARQUET_SCHEMA
from vtriune.data.store import Store
from vtriune.messages import Canary
from vtriune.plan.schedule import Schedule, ScheduleResult
from vtriune.run.controller import Controller
from vtriune.run.fleet import Fleet, Spawned
from vtriune.run.publisher import Publisher
from vtriune.run.snapshots import Snapshots
from vtriune.runtime import MeshFailure, ProcMesh, this_host
from vtriune.runtime.stacks import TITLE

NUM_ROWS = 512
ROLES = ("controller", "verifiers", "learner", "recorder")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """What the control plane itself takes per version, in machine seconds: it is not scaled by the clock."""

    critical_s: float
    """Median time per version in which no device worked that should have: on the path last token → scored → delivered →
    reported → cut → order received, training done → publish ordered → engines resumed; and, on-policy, engines resumed →
    the critical group's lease received."""
    controller_cpu_s: float
    """Processor time of the controller's process per version, all its threads."""

    def share(self, schedule: Schedule) -> float:
        """Of a step at the real clock."""
        return self.critical_s / schedule.optimal_step_s

    def cpu_share(self, schedule: Schedule) -> float:
        """Of one core, at the real clock."""
        return self.controller_cpu_s / schedule.optimal_step_s


class Measured(msgspec.Struct, frozen=True):
    """One run."""

    outcome: ScheduleResult
    overhead: Overhead
    num_duplicates: int
    ledger: dict[str, int]
    peak_bytes: dict[str, int]
    """Resident memory by role, at its fullest."""


class Lines:
    """The controller's watcher: keeps what the console would show, and how much memory the processes had at their fullest."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.cpu_s: list[float] = []
        self.peak_bytes: dict[str, int] = {}
        """Resident, by role: the fullest of its processes when looked at, and at the end of each version."""

    def show(self, metrics: dict[str, float]) -> None:
        """One version."""
        self.lines.append(metrics)
        self.cpu_s.append(time.process_time())
        self.look()

    def look(self) -> None:
        """At every process of the run."""
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error, IndexError):
                title = process.cmdline()[0].removeprefix(TITLE)
                role = "controller" if process is own else title.rpartition("-")[0]
                if role in ROLES:
                    self.peak_bytes[role] = max(self.peak_bytes.get(role, 0), process.memory_info().rss)


async def measure(
    schedule: Schedule, folder: Path, *, clock_scale: float, num_processes: int = 2, num_verifiers: int = 1
) -> Measured:
    """Run `schedule` once with `clock_scale` machine seconds per device second. Raises whatever the run raises."""
    store = await asyncio.to_thread(_build_store, folder)
    config = _config(schedule, folder)
    device = Device(schedule.lengths, schedule.costs, schedule.training_s, clock_scale, schedule.seed)
    stage = _Stage(config, store, device, folder, num_processes, schedule.leased_completions)
    failures: asyncio.Queue[MeshFailure] = asyncio.Queue()
    try:
        await stage.start(failures, num_verifiers)
        return await _run(schedule, stage, clock_scale, failures)
    finally:
        await stage.stop()


class _Stage:
    """The actors of one run."""

    def __init__(
        self, config: Config, store: Store, device: Device, folder: Path, num_processes: int, room: int
    ) -> None:
        self.config, self.store, self.folder = config, store, folder
        self.controller: Controller | None = None
        self.watcher = Lines()
        self.learner: Any = None
        self.generators: list[Any] = [None] * config.cluster.generators.procs
        self._device = device
        self._num_processes = num_processes
        self._room = room
        self._importing = asyncio.Lock()
        self._procs: list[ProcMesh] = []
        self._hosts: ProcMesh | None = None
        self._verifiers: Any = None
        self._recorder: Any = None

    async def start(self, failures: asyncio.Queue[MeshFailure], num_verifiers: int) -> None:
        """Every process and actor; the engines are STALE afterwards, as in a real run."""
        loop = asyncio.get_running_loop()

        def failed(failure: MeshFailure) -> None:
            loop.call_soon_threadsafe(failures.put_nowait, failure)

        async def procs(name: str, count: int) -> ProcMesh:
            return await asyncio.to_thread(
                this_host().spawn_procs,
                {"procs": count},
                name=name,
                env=ENVIRONMENT,
                log_folder=self.folder,
                on_failure=failed,
            )

        others, recorders, verifiers, self._hosts = await asyncio.gather(
            procs("learner", 1),
            procs("recorder", 1),
            procs("verifiers", num_verifiers),
            procs("generators", self._num_processes),
        )
        self._procs = [others, recorders, verifiers, self._hosts]
        self._recorder = recorders.spawn("recorder", Recorder, self.config, str(self.folder))
        self.learner = others.spawn("learner", SimulatedLearner, self._device)
        self._verifiers = verifiers.spawn("verifiers", VerifierPoolActor, self.config, self.learner, self._recorder)
        generators = self.config.cluster.generators
        self.fleet = Fleet(generators.procs, self._room, 0, self._spawn_generator, self._wake)
        await asyncio.gather(self.fleet.start(), self.learner.ready.call(), self._verifiers.ready.within(120).call())

    def open(self) -> Controller:
        """The product's controller over these actors."""
        canary = Canary(self.store.ref(0), np.arange(4, dtype=np.int32))
        publisher = Publisher(self.learner, self.fleet, canary, max_canary_error=1e-6)
        snapshots = Snapshots(self.folder / "checkpoints", self.config.checkpoint)
        # A checkpoint at the end would call the learner's `save`; simulated weights have nothing to save.
        snapshots.is_due = lambda *_, **__: False  # type: ignore[method-assign]
        self.controller = Controller(
            self.config,
            self.store,
            self.fleet,
            publisher,
            None,
            self.learner,
            self._verifiers,
            self._recorder,
            snapshots,
            self.watcher.show,
            print,
        )
        return self.controller

    async def stop(self) -> None:
        """End every process."""
        await asyncio.gather(*(procs.stop() for procs in self._procs))

    async def _spawn_generator(self, rank: int) -> Spawned:
        assert self._hosts is not None
        hosts = self._hosts.slice(procs=rank % self._num_processes)
        # The first actor of a process imports; the others follow, so that their threads do not import the same modules at once.
        async with self._importing:
            actor: Any = hosts.spawn("generator", SimulatedGenerator, self.config, self._verifiers, rank, self._device)
            await actor.ready.call_one()
        self.generators[rank] = actor
        return Spawned(hosts, actor)

    def _wake(self) -> None:
        if self.controller is not None:
            self.controller.wake()


async def _run(schedule: Schedule, stage: _Stage, clock_scale: float, failures: asyncio.Queue[MeshFailure]) -> Measured:
    controller = stage.open()
    running, watching = asyncio.create_task(controller.run()), asyncio.create_task(failures.get())
    skipped = min(schedule.num_unmeasured, schedule.num_versions - 1)
    try:
        while not running.done() and len(stage.watcher.lines) <= skipped:
            await asyncio.wait({running, watching}, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                raise watching.result()
        unmeasured = await _engine_traces(stage)
        while not (running.done() or watching.done()):
            await asyncio.wait({running, watching}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            stage.watcher.look()
        if watching.done():
            raise watching.result()
        running.result()
    finally:
        running.cancel()
        watching.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)
    engines, trainings = await _engine_traces(stage), await stage.learner.take_trace.call_one()
    controller.groups.audit()
    return _summarise(schedule, stage, unmeasured, engines, trainings, clock_scale)


async def _engine_traces(stage: _Stage) -> list[EngineTrace]:
    return list(await asyncio.gather(*(generator.take_trace.call_one() for generator in stage.generators)))


def _summarise(
    schedule: Schedule, stage: _Stage, unmeasured: Sequence[EngineTrace], engines: Sequence[EngineTrace],
    trainings: Sequence[LearnerTrace], clock_scale: float,
) -> Measured:  # fmt: skip
    """Device seconds of the outcome, machine seconds of the overhead; the first versions are left out of both."""
    skipped = min(schedule.num_unmeasured, schedule.num_versions - 1)
    publish_s = schedule.costs.publish_s * clock_scale
    # Version v + 1 is in force one transfer after its training ended: the moment each measured version begins and ends.
    published = [training.ended_at + publish_s for training in trainings]
    elapsed_s = (
        published[-1] - published[skipped - 1] if skipped else published[-1] - trainings[0].began_at
    ) / clock_scale
    num_measured = len(trainings) - skipped
    ended = {t.group_id: t for trace in (*unmeasured, *engines) for t in trace.groups}
    waits, gaps = [], []
    for before, training in zip(trainings[skipped - 1 :], trainings[skipped:], strict=False):
        free_at = before.ended_at + publish_s
        last = max((ended[group_id] for group_id in training.group_ids), key=lambda t: t.ended_at)
        waits.append(max(0.0, last.ended_at - free_at) / clock_scale)
        gap_s = training.began_at - max(free_at, last.ended_at)
        if schedule.mode == "on_policy":
            gap_s += max(0.0, last.arrived_at - free_at)
        gaps.append(gap_s)
    staleness = [value for training in trainings for value in training.staleness]
    lines, cpu_s = stage.watcher.lines, stage.watcher.cpu_s
    engine_s = elapsed_s * schedule.num_engines
    num_tokens = sum(trace.num_tokens for trace in engines)
    full_s = num_tokens * schedule.costs.step_s(schedule.max_sequences) / schedule.max_sequences
    outcome = ScheduleResult(
        step_s=elapsed_s / num_measured,
        generation_s=float(np.mean(waits)),
        engines_busy=min(1.0, sum(trace.busy_s for trace in engines) / engine_s),
        engines_full=full_s / engine_s,
        learner_busy=num_measured * (schedule.training_s + schedule.costs.publish_s) / elapsed_s,
        mean_staleness=float(np.mean(staleness)),
        max_staleness=max(staleness),
        num_groups=len(staleness),
        num_tokens=num_tokens,
    )
    overhead = Overhead(
        critical_s=float(np.median(gaps)), controller_cpu_s=(cpu_s[-1] - cpu_s[-1 - num_measured]) / num_measured
    )
    controller = stage.controller
    assert controller is not None
    return Measured(
        outcome, overhead, int(lines[-1].get("duplicates", 0)), controller.groups.counts(), stage.watcher.peak_bytes
    )


def _config(schedule: Schedule, folder: Path) -> Config:
    return Config(
        run=Run(name="device-time", folder=str(folder), seed=schedule.seed, steps=schedule.num_versions),
        cluster=Cluster(generators=Generators(procs=schedule.num_engines, max_sequences=schedule.max_sequences)),
        data=Data(prompt_pool=False),
        policy=Policy(
            mode=schedule.mode,
            max_staleness=None if schedule.mode == "on_policy" else schedule.max_staleness,
            look_ahead=schedule.look_ahead,
            rollout_batch=schedule.rollout_batch,
            group_size=schedule.group_size,
        ),
        sampling=SamplingSection(max_tokens=schedule.lengths.cap),
        rewards=Rewards(deadline_s=30.0),
        evaluation=Evaluation(every=0, before=False, after=False),
        tracking=Tracking(wandb="off"),
    )


def _build_store(folder: Path) -> Store:
    """Counting questions with a small image each; the answer is the row's number."""
    pixels = io.BytesIO()
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(pixels, "PNG")
    rows = [
        {
            "data_source": "counting",
            "images": [{"bytes": pixels.getvalue(), "path": None}],
            "prompt": [{"role": "user", "content": "<image>How many?"}],
            "ability": "counting",
            "reward_model": {
                "answer": str(row),
                "ground_truth": f"\\boxed{{{row}}}",
                "accuracy_ratio": 1.0,
                "format_ratio": 0.1,
                "verifier": "mathverify",
                "verifier_parm": None,
            },
            "extra_info": {"id": str(row), "image_path": None},
        }
        for row in range(NUM_ROWS)
    ]
    path = folder / "train_counting_rows.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=PARQUET_SCHEMA), path)
    return build_store([path], folder / "stores")
