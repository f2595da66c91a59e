"""The four roles of a run as actors that do next to nothing, in processes of their own, slow where the environment says so.

SLOW="load=3.5 generate=3.5"   those calls take so many seconds, and tell of a step ten times a second meanwhile
HANG="train"                   that call tells of one step and never ends
"""

import os
import time
from pathlib import Path

from tests.run import stage
from verifiers import RewardSpec
from vtriune import roles
from vtriune.config.tree import Config
from vtriune.messages import (
    Canary,
    Group,
    GroupReport,
    Lease,
    PublishOrder,
    PublishReport,
    Rendezvous,
    ScoredGroup,
    StepRecord,
    TrainOrder,
    TrainReport,
)
from vtriune.run.processes import ActorClasses
from vtriune.runtime import Actor, endpoint, report_step

CANARY = [-1.0, -2.0]


def work(call: str) -> None:
    """Take the time that the environment says."""
    seconds = dict(item.split("=") for item in os.environ.get("SLOW", "").split()).get(call, "0")
    end = time.monotonic() + float(seconds)
    if os.environ.get("HANG") == call:
        report_step(call, "step 1 of 2")
        time.sleep(3600)
    while time.monotonic() < end:
        report_step(call, f"{end - time.monotonic():.1f} s are left")
        time.sleep(0.1)


class SlowGenerator(Actor):
    def __init__(self, config: Config, store_folders: list[str], verifiers: roles.VerifierPool, rank: int) -> None:
        pass

    @endpoint
    async def ready(self) -> None:
        pass

    @endpoint
    def generate(self, lease: Lease, others: list[roles.Generator]) -> GroupReport:
        work("generate")
        return GroupReport(lease.group_id, lease.attempt, 4, [0.0, 1.0], 0, 0.0)

    @endpoint
    async def sample(self, lease: Lease) -> Group:
        raise NotImplementedError

    @endpoint
    async def receive(self, order: PublishOrder) -> PublishReport:
        return PublishReport(order.version, 1, 4, "sum", 0.0)

    @endpoint
    async def canary(self, canary: Canary) -> list[float]:
        return CANARY

    @endpoint
    async def stats(self) -> dict[str, float]:
        return {}


class SlowVerifiers(Actor):
    def __init__(self, config: Config, learner: roles.Learner, recorder: roles.Recorder) -> None:
        pass

    @endpoint
    async def ready(self) -> None:
        pass

    @endpoint
    async def score(self, group: Group) -> GroupReport:
        raise NotImplementedError

    @endpoint
    async def metrics(self) -> dict[str, float]:
        return {}


class SlowLearner(Actor):
    def __init__(self, config: Config, store_folders: list[str]) -> None:
        pass

    @endpoint
    def open_store(self) -> int:
        return 1

    @endpoint
    def connect(self, host: str, port: int) -> None:
        work("connect")

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        pass

    @endpoint
    def train(self, order: TrainOrder) -> TrainReport:
        work("train")
        return TrainReport(order.version, {})

    @endpoint
    def open_rendezvous(self, num_members: int) -> Rendezvous:
        return Rendezvous("127.0.0.1", 1, num_members, "gloo")

    @endpoint
    def publish(self, order: PublishOrder) -> PublishReport:
        return PublishReport(order.version, 1, 4, "sum", 0.0)

    @endpoint
    def canary(self, canary: Canary) -> list[float]:
        return CANARY

    @endpoint
    def save(self, folder: str) -> None:
        (Path(folder) / "weights").write_text("none")

    @endpoint
    def saved(self) -> None:
        work("saved")

    @endpoint
    def load(self, folder: str) -> None:
        work("load")


class SlowRecorder(Actor):
    def __init__(self, config: Config, folder: str) -> None:
        self._lines = Path(folder) / "metrics.jsonl"

    @endpoint
    async def record_group(self, group: ScoredGroup) -> None:
        pass

    @endpoint
    def record_step(self, record: StepRecord) -> dict[str, float]:
        work("record_step")
        self._lines.write_text("")
        return {**record.metrics, "version": float(record.version)}

    @endpoint
    async def recorded(self) -> None:
        pass

    @endpoint
    async def truncate_after(self, version: int) -> int:
        return 0

    @endpoint
    async def close(self) -> None:
        pass


CLASSES = ActorClasses(SlowGenerator, SlowVerifiers, SlowLearner, SlowRecorder)  # type: ignore[arg-type]


class Rows(stage.Rows):
    """A store on no disk, whose first row gives the canary its answer."""

    folder = Path("nowhere")
    reward = RewardSpec(ground_truth="1")

    def sample(self, row: int) -> "Rows":
        return self


class Processor:
    """As much of a preprocessor as the canary takes."""

    end_token_ids = (0,)

    def tokenizer(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1]}
