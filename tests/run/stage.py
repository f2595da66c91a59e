"""A run without processes: handwritten actors behind the same calls, to try the controller in milliseconds."""

import asyncio
import functools
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

import numpy as np

from verifiers import RewardSpec
from vtriune import roles
from vtriune.config.tree import Checkpoint, Config, Evaluation, Policy, Run
from vtriune.messages import (
    Canary,
    Example,
    GroupReport,
    Lease,
    PublishOrder,
    PublishReport,
    Purpose,
    Rendezvous,
    SampleHeader,
    SampleRef,
    StepRecord,
    TrainOrder,
    TrainReport,
)
from vtriune.run.controller import Controller
from vtriune.run.evaluation import HeldOutEvaluation
from vtriune.run.fleet import Fleet, Spawned
from vtriune.run.publisher import Publisher
from vtriune.run.snapshots import Snapshots
from vtriune.runtime import ConnectionLost, DeadlineExceeded, Endpoint, Extent, MeshFailure, ValueMesh
from vtriune.transport.wire import FailureNote

R = TypeVar("R")
Cut = Literal["mid-group", "mid-ack"] | None
"""When the connection to a living generator breaks."""

CANARY = Canary(SampleRef("held-out", 0), np.arange(3, dtype=np.int32))


class Call:
    """`call_one`, `call` and `within` of one method of a fake actor of one rank."""

    def __init__(self, method: Callable[..., Any], deadline_s: float | None = None) -> None:
        self._method, self._deadline_s = method, deadline_s

    def within(self, deadline_s: float) -> "Call":
        return Call(self._method, deadline_s)

    async def call_one(self, *arguments: Any) -> Any:
        deadline = asyncio.timeout(self._deadline_s)
        try:
            async with deadline:
                return await self._method(*arguments)
        except TimeoutError:
            if deadline.expired():
                raise DeadlineExceeded(f"took over {self._deadline_s:g} s") from None
            raise

    async def call(self, *arguments: Any) -> ValueMesh[Any]:
        return ValueMesh(Extent(["procs"], [1]), [await self.call_one(*arguments)])


class Mesh:
    """A fake actor as a mesh of one rank: what the run calls must be an endpoint of the role, and the fake's as the role says."""

    def __init__(self, role: type, fake: object) -> None:
        self._role, self._fake = role, fake

    def __getattr__(self, name: str) -> Call:
        method = getattr(self._fake, name)
        expect_endpoint(self._role, name, getattr(method, "__func__", method), inspect.ismethod(method))
        return Call(method)

    def slice(self, **_: int) -> "Mesh":
        return self


@functools.cache
def expect_endpoint(role: type, name: str, function: Callable[..., Any], is_bound: bool) -> None:
    """Raise AssertionError unless `function` may stand for the role's endpoint `name`."""
    declared = getattr(role, name)
    assert isinstance(declared, Endpoint), f"{name} is no endpoint of {role}"
    expected, hints = get_type_hints(declared.method), get_type_hints(function)
    ours = {key: hints.get(key) for key in (*list(inspect.signature(function).parameters)[is_bound:], "return")}
    assert list(ours.items()) == list(expected.items()), f"{name}: {ours}, not {expected}"


def mesh_of(role: type[R], fake: object) -> R:
    """A mesh of one fake actor, as the run takes one."""
    return cast("R", Mesh(role, fake))


class Rows:
    """A store of `num_rows` rows of two sources."""

    def __init__(self, num_rows: int, fingerprint: str = "train") -> None:
        self.fingerprint = fingerprint
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def ref(self, row: int) -> SampleRef:
        return SampleRef(self.fingerprint, row)

    def source(self, row: int) -> str:
        return ("even", "odd")[row % 2]

    def header(self, row: int) -> SampleHeader:
        return SampleHeader(self.source(row), RewardSpec(ground_truth=str(row)), str(row), "rows.parquet", row)

    def stored(self, row: int) -> int:
        return row

    def rows_by_source(self) -> dict[str, np.ndarray]:
        rows = np.arange(self._num_rows)
        return {
            source: rows[rows % 2 == place] for place, source in enumerate(("even", "odd")) if self._num_rows > place
        }

    def spread(self, num_rows: int | None) -> list[int]:
        return list(range(self._num_rows if num_rows is None else min(num_rows, self._num_rows)))


class FakeGenerator:
    """Takes a random time for a group; its tokens carry the versions it held meanwhile."""

    def __init__(self, stage: "Stage", rank: int) -> None:
        self.stage = stage
        self.rank = rank
        self.version = -1
        self.is_dead = False
        self.num_dead_after: int | None = None

    async def generate(self, lease: Lease, others: list[roles.Generator]) -> GroupReport:
        self.check_alive()
        self.stage.shares.append(1 + len(others))
        self.stage.leases.append(lease)
        stage, first = self.stage, self.version
        if lease.purpose == "train":
            assert first >= stage.controller.groups.version, "a lease was given to an engine that holds an old version"
        await asyncio.sleep(stage.generation_s(lease))
        self.check_alive()
        cut = stage.cut(lease)
        if cut == "mid-group":
            raise ConnectionLost("the connection broke while it sampled")
        rewards = stage.rewards(lease)
        if lease.purpose == "train":
            stage.delivered.setdefault((lease.group_id, lease.attempt), first)
        await stage.on_scored(lease)
        if cut == "mid-ack":
            raise ConnectionLost("the connection broke after it delivered")
        size = lease.num_completions
        return GroupReport(lease.group_id, lease.attempt, 10 * size, rewards, size - len(rewards), 0.0)

    async def receive(self, order: PublishOrder) -> PublishReport:
        self.check_alive()
        await asyncio.sleep(0)
        self.version = order.version
        return PublishReport(order.version, 1, 4, f"sum-{order.version}", 0.0)

    async def canary(self, canary: Canary) -> list[float]:
        return [-1.0, -2.0, -3.0]

    async def stats(self) -> dict[str, float]:
        self.check_alive()
        return {"idle_share": 0.25, "tokens_per_s": 1.0, "tokens_per_step": 1.0}

    def check_alive(self) -> None:
        if self.is_dead:
            raise MeshFailure(FailureNote("generator", self.rank, "here", 1, "signal", signal=9))


class FakeLearner:
    """Consumes what was delivered, and refuses what is too stale or comes twice."""

    def __init__(self, stage: "Stage") -> None:
        self.stage = stage
        self.version = 0

    async def open_rendezvous(self, num_members: int) -> Rendezvous:
        return Rendezvous("127.0.0.1", 1, num_members, "gloo")

    async def publish(self, order: PublishOrder) -> PublishReport:
        assert order.version == self.version
        return PublishReport(order.version, 1, 4, f"sum-{order.version}", 0.0)

    async def canary(self, canary: Canary) -> list[float]:
        return [-1.0, -2.0, -3.0]

    async def train(self, order: TrainOrder) -> TrainReport:
        stage = self.stage
        assert order.version == self.version
        await asyncio.sleep(stage.training_s)
        for group_id in (g for update in order.updates for g in update):
            staleness = order.version - stage.delivered[group_id, order.attempts.get(group_id, 0)]
            assert 0 <= staleness <= order.max_staleness
            assert group_id not in stage.consumed
            stage.consumed[group_id] = staleness
        stage.orders.append(order)
        self.version += 1
        return TrainReport(order.version, {"loss": 0.0})

    async def save(self, folder: str) -> None:
        (Path(folder) / "weights").write_text(str(self.version))

    async def saved(self) -> None:
        await asyncio.sleep(self.stage.saving_s)

    async def load(self, folder: str) -> None:
        self.version = int((Path(folder) / "weights").read_text())
        self.stage.delivered.clear()


class FakeRecorder:
    """Keeps the records."""

    def __init__(self, stage: "Stage") -> None:
        self.stage = stage

    async def record_step(self, record: StepRecord) -> dict[str, float]:
        self.stage.records.append(record)
        return {**record.metrics, "version": float(record.version)}

    async def example(self, purpose: Purpose) -> Example | None:
        return Example(self.stage.store.header(1), f"a response to {purpose}")

    async def recorded(self) -> None:
        pass

    async def truncate_after(self, version: int) -> int:
        self.stage.records = [record for record in self.stage.records if record.version <= version]
        return 0


class FakeVerifiers:
    """One verifier process: how many samples it has scored since it was asked last, and whether it is there to answer."""

    def __init__(self) -> None:
        self.is_dead = False
        self.num_asked = 0
        self.on_asked: Callable[[], object] = lambda: None

    async def metrics(self) -> dict[str, float]:
        self.num_asked += 1
        self.on_asked()
        if self.is_dead:
            raise MeshFailure(FailureNote("verifiers", 0, "here", 1, "signal", signal=9))
        return {
            "pool/num_restarts": 1.0, "verifier/mathverify/num_samples": 4.0, "verifier/mathverify/fault_rate": 0.25,
            "verifier/mathverify/latency_p99_s": 0.5, "verifier/mathverify/samples_per_s": 8.0, "source/even/num_samples": 4.0,
        }  # fmt: skip


class FakeProcs:
    """A process that can be stopped."""

    def __init__(self, generator: FakeGenerator) -> None:
        self._generator = generator

    async def stop(self) -> None:
        self._generator.is_dead = True


class Stage:
    """Everything a controller needs, faked; reads as what happened afterwards."""

    def __init__(self, folder: Path, policy: Policy, *, steps: int | None = 6, num_rows: int = 1000, num_generators: int = 2,
                 room: int = 6, restarts: int = 0, training_s: float = 0.0, seed: int = 0, checkpoint_every: int = 0,
                 epochs: int | None = None, evaluate_every: int = 0, evaluate_before: bool = False,
                 evaluate_after: bool = False) -> None:  # fmt: skip
        self.config = Config(
            run=Run(steps=steps, epochs=epochs),
            policy=policy,
            evaluation=Evaluation(
                every=evaluate_every,
                before=evaluate_before,
                after=evaluate_after,
                sampling=["sampled", "greedy"],
                top_p=0.9,
                top_k=20,
            ),
            checkpoint=Checkpoint(every=checkpoint_every),
        )
        self.random = random.Random(seed)
        self.store = Rows(num_rows)
        self.training_s = training_s
        self.saving_s = 0.0
        """A checkpoint's, beside the run."""
        self.delivered: dict[tuple[int, int], int] = {}
        """Group id and attempt → oldest version"""
        self.consumed: dict[int, int] = {}
        self.orders: list[TrainOrder] = []
        self.records: list[StepRecord] = []
        self.lines: list[dict[str, float]] = []
        """As a person saw them, and what else there"""
        self.said: list[str] = []
        self.reported_lost: list[tuple[int, str]] = []
        """Members whose end the publisher told the others"""
        self.shares: list[int] = []
        """Generators that sampled each lease"""
        self.leases: list[Lease] = []
        """As generators got them, in order"""
        self.generators: list[FakeGenerator] = []
        self.verifiers = FakeVerifiers()
        self.slow: set[int] = set()
        self.equal_rewards: Callable[[Lease], bool] = lambda lease: False
        self.cut: Callable[[Lease], Cut] = lambda lease: None
        self.recorder: Any = FakeRecorder(self)
        self.controller: Controller
        self.folder = folder
        self._fleet_size, self._room, self._restarts = num_generators, room, restarts

    async def stopped_at(self, version: int) -> Controller:
        """Train until `version` is there, and stop: the checkpoint is written."""
        controller = await self.open()
        running = asyncio.create_task(controller.run())
        while controller.groups.version < version:
            await asyncio.sleep(0.001)
        controller.stop()
        async with asyncio.timeout(30):
            await running
        return controller

    def generation_s(self, lease: Lease) -> float:
        return 0.05 if lease.group_id in self.slow else self.random.random() * 0.002

    def rewards(self, lease: Lease) -> list[float]:
        size = lease.num_completions
        return [1.0] * size if self.equal_rewards(lease) else [float(i % 2) for i in range(size)]

    async def on_scored(self, lease: Lease) -> None:
        """What the verifier pool does with a scored group before it is reported."""

    async def _spawn(self, rank: int) -> Spawned:
        generator = FakeGenerator(self, rank)
        self.generators.append(generator)
        return Spawned(FakeProcs(generator), mesh_of(roles.Generator, generator))

    def _report_lost(self, rendezvous: Rendezvous, member: int, reason: str) -> None:
        self.reported_lost.append((member, reason))

    def _wake(self) -> None:
        if hasattr(self, "controller"):
            self.controller.wake()

    async def open(self) -> Controller:
        """A controller over fresh fakes; the stage's record of what happened goes on."""
        learner, recorder = mesh_of(roles.Learner, FakeLearner(self)), mesh_of(roles.Recorder, self.recorder)
        fleet = Fleet(self._fleet_size, self._room, self._restarts, self._spawn, self._wake)
        await fleet.start()
        publisher = Publisher(learner, fleet, CANARY, max_canary_error=1e-3, report_lost=self._report_lost)
        snapshots = Snapshots(self.folder / "checkpoints", self.config.checkpoint)
        evaluation = HeldOutEvaluation(self.config, Rows(4, "held-out"), fleet, self.said.append)
        controller = Controller(
            self.config, self.store, fleet, publisher, evaluation, learner, mesh_of(roles.VerifierPool, self.verifiers),
            recorder, snapshots, self.lines.append, self.said.append,
        )  # fmt: skip
        self.controller = controller
        return controller

    async def run(self) -> Controller:
        """Open and run to the end, within seconds."""
        controller = await self.open()
        async with asyncio.timeout(60):
            await controller.run()
        return controller


def silent(metrics: dict[str, float]) -> None:
    """A console that shows nothing."""
