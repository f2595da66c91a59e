"""A stage with a real recorder: every delivered group is a scored one with tokens, text, spans and verdicts, archived as in a run."""

import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from actors.recorder import Recorder
from tests.run.stage import Rows, Stage
from verifiers import ImageSize, RewardSpec, Verdict
from vtriune.config.tree import Policy, Tracking
from vtriune.messages import Group, Lease, SampleHeader, ScoredGroup, StepRecord, Trajectory, VersionSpan
from vtriune.run.controller import Controller

WORDS = (
    "so",
    "Wait",
    "let me verify it",
    "re-think",
    "check  again",
    "waiting",
    "the area",
    "yet",
    "\n",
    "therefore",
    "RECHECK",
)
MAX_TOKENS = 20


class TwoVerifiers(Rows):
    """Even rows are answered in words, odd ones with boxes."""

    def header(self, row: int) -> SampleHeader:
        spec = RewardSpec(ground_truth=str(row), verifier="detection" if row % 2 else "mathverify")
        return msgspec.structs.replace(super().header(row), reward=spec)


class NotingRecorder(Recorder):
    """The product's, which notes what the controller gave it."""

    records: list[StepRecord]

    async def record_step(self, record: StepRecord) -> dict[str, float]:
        self.records.append(record)
        return await super().record_step(record)


class RecordedStage(Stage):
    """Each `open` has a recorder of its own, as each start of a run has; `close` ends the last one.

    What is scored follows from the lease alone: about one verdict in six is a fault, and one group in five all equal.
    """

    def __init__(self, folder: Path, policy: Policy, **options: Any) -> None:
        super().__init__(folder, policy, **options)
        self.store = TwoVerifiers(len(self.store))

    async def open(self) -> Controller:
        config = msgspec.structs.replace(self.config, tracking=Tracking(wandb="off"))
        self.recorder = NotingRecorder(config, str(self.folder))
        self.recorder.records = self.records
        return await super().open()

    async def close(self) -> None:
        """End the recorder, as the end of a run does."""
        await self.recorder.close()

    def rewards(self, lease: Lease) -> list[float]:
        return [verdict.reward for verdict in self.verdicts(lease) if verdict.status != "fault"]

    def verdicts(self, lease: Lease) -> list[Verdict]:
        """One per completion."""
        rng = _rng(lease, "verdicts")
        if self.equal_rewards(lease) or rng.random() < 0.2:
            return [_verdict(rng, lease, rng.choice([0.0, 1.0]))] * lease.num_completions
        return [_verdict(rng, lease, None) for _ in range(lease.num_completions)]

    async def on_scored(self, lease: Lease) -> None:
        version = self.delivered.get((lease.group_id, lease.attempt), self.controller.groups.version)
        rng = _rng(lease, "tokens")
        trajectories = [_trajectory(rng, version) for _ in range(lease.num_completions)]
        prompt, sizes = np.arange(lease.sample.row % 5 + 1, dtype=np.int32), [ImageSize((640, 480), (616, 476))]
        group = Group(lease, prompt, trajectories, 0, rng.random(), sizes)
        await self.recorder.record_group(ScoredGroup(group, self.verdicts(lease), rng.random()))


def _rng(lease: Lease, what: str) -> random.Random:
    return random.Random(f"{what} of group {lease.group_id}, attempt {lease.attempt}")


def _verdict(rng: random.Random, lease: Lease, reward: float | None) -> Verdict:
    if reward is None and rng.random() < 1 / 6:
        return Verdict("fault", 0.0, 0.0, 0.0, {}, "timeout")
    accuracy = rng.choice([0.0, 0.25, 1.0]) if reward is None else reward
    is_boxes = lease.header.reward.verifier == "detection"
    components = {"label_first_iou@50": rng.random(), "map": accuracy} if is_boxes else {"answer": accuracy}
    form = rng.choice([0.0, 1.0])
    status = "bad_answer" if accuracy == 0.0 and rng.random() < 0.5 else "ok"
    return Verdict(status, 0.9 * accuracy + 0.1 * form if reward is None else reward, accuracy, form, components, "")


def _trajectory(rng: random.Random, version: int) -> Trajectory:
    length = rng.randint(2, MAX_TOKENS)
    first = rng.randint(1, length - 1)
    return Trajectory(
        np.asarray([rng.randrange(1000) for _ in range(length)], np.int32),
        np.asarray([-rng.expovariate(2) for _ in range(length)], np.float32),
        [VersionSpan(version, first), VersionSpan(version + 1, length - first)],
        "length" if length == MAX_TOKENS else "stop",
        " ".join(rng.choices(WORDS, k=rng.randint(0, 6))),
    )
