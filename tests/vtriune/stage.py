"""A run without processes: handwritten actors behind the same calls, to try the controller in milliseconds."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vtriune.config.tree import Checkpoint, Config, Evaluation, Policy, Run
from vtriune.controller import Controller
from vtriune.evaluation import Evaluation as HeldOut
from vtriune.fleet import Fleet, Spawned
from vtriune.messages import (
    Canary,
    GroupReport,
    Lease,
    PublishOrder,
    PublishReport,
    Rendezvous,
    SampleRef,
    StepRecord,
    TrainOrder,
    TrainReport,
)
from vtriune.publisher import Publisher
from vtriune.run_state import Snapshots
from vtriune.runtime import ConnectionLost, MeshFailure
from vtriune.transport.wire import FailureNote

Cut = Literal["mid-group", "mid-ack"] | None
"""When the connection to a living generator breaks."""

CANARY = Canary(SampleRef("held-out", 0), np.arange(3, dtype=np.int32))


class Endpoint:
    """`call_one` and `call` of one method of a fake actor of one rank."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    async def call_one(self, *arguments: Any) -> Any:
        return await self._method(*arguments)

    async def call(self, *arguments: Any) -> dict[int, Any]:
        return {0: await self._method(*arguments)}


class Mesh:
    """A fake actor as its mesh of one rank."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Endpoint:
        return Endpoint(getattr(self._actor, name))

    def slice(self, **_: int) -> "Mesh":
        return self


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

    async def generate(self, lease: Lease, others: list[Any]) -> GroupReport:
        self.check_alive()
        self.stage.shares.append(1 + len(others))
        stage, first = self.stage, self.version
        if lease.purpose == "train":
            assert first >= stage.controller.window.version, "a lease was given to an engine that holds an old version"
        await asyncio.sleep(stage.generation_s(lease))
        self.check_alive()
        cut = stage.cut(lease)
        if cut == "mid-group":
            raise ConnectionLost("the connection broke while it sampled")
        rewards = stage.rewards(lease)
        if lease.purpose == "train":
            stage.delivered.setdefault((lease.group_id, lease.attempt), first)
        if cut == "mid-ack":
            raise ConnectionLost("the connection broke after it delivered")
        source = stage.store.source(lease.sample.row)
        return GroupReport(
            lease.group_id, lease.attempt, source, first, self.version, 10 * lease.num_completions, rewards,
            lease.num_completions - len(rewards), self.rank, 0.0, 0.0,
        )  # fmt: skip

    async def receive(self, order: PublishOrder) -> PublishReport:
        self.check_alive()
        await asyncio.sleep(0)
        self.version = order.version
        return PublishReport(order.version, 1, 4, f"sum-{order.version}", 0.0)

    async def canary(self, _: Canary) -> list[float]:
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

    async def canary(self, _: Canary) -> list[float]:
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
        pass

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

    async def truncate_after(self, version: int) -> None:
        self.stage.records = [record for record in self.stage.records if record.version <= version]


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
                 epochs: int | None = None, evaluate_every: int = 0) -> None:  # fmt: skip
        self.config = Config(
            run=Run(steps=steps, epochs=epochs),
            policy=policy,
            evaluation=Evaluation(every=evaluate_every, before=False, after=False, sampling=["sampled", "greedy"]),
            checkpoint=Checkpoint(every=checkpoint_every),
        )
        self.random = random.Random(seed)
        self.store = Rows(num_rows)
        self.training_s = training_s
        self.delivered: dict[tuple[int, int], int] = {}
        """Group id and attempt → oldest version"""
        self.consumed: dict[int, int] = {}
        self.orders: list[TrainOrder] = []
        self.records: list[StepRecord] = []
        self.reported_lost: list[tuple[int, str]] = []
        """Members whose end the publisher told the others"""
        self.shares: list[int] = []
        """Generators that sampled each lease"""
        self.generators: list[FakeGenerator] = []
        self.slow: set[int] = set()
        self.equal_rewards: Callable[[Lease], bool] = lambda lease: False
        self.cut: Callable[[Lease], Cut] = lambda lease: None
        self.controller: Controller
        self._folder = folder
        self._fleet_size, self._room, self._restarts = num_generators, room, restarts

    def generation_s(self, lease: Lease) -> float:
        return 0.05 if lease.group_id in self.slow else self.random.random() * 0.002

    def rewards(self, lease: Lease) -> list[float]:
        size = lease.num_completions
        return [1.0] * size if self.equal_rewards(lease) else [float(i % 2) for i in range(size)]

    async def _spawn(self, rank: int) -> Spawned:
        generator = FakeGenerator(self, rank)
        self.generators.append(generator)
        return Spawned(FakeProcs(generator), Mesh(generator))

    def _report_lost(self, rendezvous: Rendezvous, member: int, reason: str) -> None:
        self.reported_lost.append((member, reason))

    def _ring(self) -> None:
        if hasattr(self, "controller"):
            self.controller.ring()

    async def open(self) -> Controller:
        """A controller over fresh fakes; the stage's record of what happened goes on."""
        learner, recorder = Mesh(FakeLearner(self)), Mesh(FakeRecorder(self))
        fleet = Fleet(self._fleet_size, self._room, self._restarts, self._spawn, self._ring)
        await fleet.start()
        publisher = Publisher(learner, fleet, CANARY, max_canary_error=1e-3, report_lost=self._report_lost)
        snapshots = Snapshots(self._folder / "checkpoints", self.config.checkpoint)
        controller = Controller(
            self.config, self.store, fleet, publisher, HeldOut(self.config, Rows(4, "held-out"), fleet), learner, recorder,
            snapshots, Silent(),
        )  # fmt: skip
        self.controller = controller
        return controller

    async def run(self) -> Controller:
        """Open and run to the end, within seconds."""
        controller = await self.open()
        async with asyncio.timeout(60):
            await controller.run()
        return controller


class Silent:
    """A console that shows nothing."""

    def show(self, metrics: dict[str, float]) -> None:
        pass
