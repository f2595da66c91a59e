"""The actors whose accelerator is simulated: real processes, sockets and messages; decoding, training and transfer are slept.

Several generators share one process here, because 64 interpreters do not fit on two cores; each is still an actor of its own, with
its own address, queue and calls. `clock_scale` machine seconds pass for one second of the device.
"""

import asyncio
import time

import msgspec
import numpy as np

from actors.rollouts.single_turn import sample_shared
from actors.verifier_pool import VerifierPoolActor
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
    TrainOrder,
    TrainReport,
    Trajectory,
    VersionSpan,
)
from vtriune.plan.simulated_device import Costs, Decoder, Finished, Lengths, SimulatedCompletion
from vtriune.runtime import Actor, ActorMesh, endpoint

PROMPT_TOKENS = 64


class Device(msgspec.Struct, frozen=True):
    """What is simulated, and how fast."""

    lengths: Lengths
    costs: Costs
    training_s: float
    clock_scale: float
    seed: int = 0


class GenerationTrace(msgspec.Struct, frozen=True, array_like=True):
    """One group on one engine, in machine seconds of the monotonic clock, which all processes of a machine share."""

    group_id: int
    arrived_at: float
    ended_at: float


class EngineTrace(msgspec.Struct, frozen=True):
    """What one engine did since the last call, device seconds."""

    groups: list[GenerationTrace]
    busy_s: float
    num_tokens: int


class LearnerTrace(msgspec.Struct, frozen=True):
    """One training, machine seconds of the monotonic clock."""

    version: int
    began_at: float
    ended_at: float
    group_ids: list[int]
    staleness: list[int]


class BatchRefused(RuntimeError):
    """A consumed group breaks a promise: too stale, consumed twice, or never delivered."""


class SimulatedGenerator(Actor):
    """Decodes by the clock. In-flight sequences go on over a publish, with exact version spans."""

    def __init__(self, config: Config, verifiers: VerifierPoolActor, rank: int, device: Device) -> None:
        self._verifiers, self._rank, self._device = verifiers, rank, device
        self._scale = device.clock_scale
        self._epoch = time.monotonic()
        self._decoder = Decoder(device.costs, config.cluster.generators.max_sequences)
        self._pending: dict[int, tuple[asyncio.Future[None], dict[int, Finished], int]] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._traces: list[GenerationTrace] = []
        self._reported = (0.0, 0)
        self._counted = (0.0, 0.0, 0)
        self._group_size = config.policy.group_size

    @endpoint
    async def ready(self) -> None:
        """Returns once the actor exists."""

    @endpoint
    async def generate(self, lease: Lease, others: list[ActorMesh]) -> GroupReport:  # type: ignore[type-arg]
        """One group, scored and delivered."""
        return await self._verifiers.score.choose(await sample_shared(lease, others, self._sample))

    @endpoint
    async def sample(self, lease: Lease) -> Group:
        """A share of a group, unscored."""
        return await self._sample(lease)

    async def _sample(self, lease: Lease) -> Group:
        arrived_at = time.monotonic()
        lengths = self._device.lengths.draw(self._device.seed, lease.group_id, self._group_size)
        indices = range(lease.first_completion, lease.first_completion + lease.num_completions)
        # Each engine computes the prompt once.
        completions = [
            SimulatedCompletion(lease.group_id, index, int(lengths[index]), index == indices[0]) for index in indices
        ]
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        finished: dict[int, Finished] = {}
        self._pending[lease.group_id] = (ended, finished, len(completions))
        self._settle(self._decoder.submit(completions, self._now_s()))
        await ended
        last_s = max(item.at_s for item in finished.values())
        ended_at = self._epoch + last_s * self._scale
        self._traces.append(GenerationTrace(lease.group_id, arrived_at, ended_at))
        trajectories = [_trajectory(lease, finished[index]) for index in indices]
        prompt_ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
        return Group(lease, prompt_ids, trajectories, self._rank, time.monotonic() - arrived_at)

    @endpoint
    async def receive(self, order: PublishOrder) -> PublishReport:
        """Pause, sleep for the transfer, go on with the new version."""
        self._settle(self._decoder.pause(self._now_s()))
        pause_s = self._device.costs.publish_s * self._scale
        await asyncio.sleep(pause_s)
        self._decoder.resume(order.version, self._now_s())
        self._settle([])
        return PublishReport(order.version, 1, 0, f"version-{order.version}", pause_s, pause_s)

    @endpoint
    async def canary(self, canary: Canary) -> list[float]:
        """The same on both sides."""
        return [0.0] * len(canary.response_ids)

    @endpoint
    async def stats(self) -> dict[str, float]:
        """Shares and rates since the last call, in the device's time."""
        now_s, busy_s, num_tokens = self._now_s(), self._decoder.busy_s, self._decoder.num_tokens
        before, self._counted = self._counted, (now_s, busy_s, num_tokens)
        elapsed_s = max(now_s - before[0], 1e-9)
        return {
            "idle_share": max(1.0 - (busy_s - before[1]) / elapsed_s, 0.0),
            "tokens_per_s": (num_tokens - before[2]) / elapsed_s,
        }

    @endpoint
    async def take_trace(self) -> EngineTrace:
        """What happened since the last call."""
        self._settle(self._decoder.advance(self._now_s()))
        traces, self._traces = self._traces, []
        before, self._reported = self._reported, (self._decoder.busy_s, self._decoder.num_tokens)
        return EngineTrace(traces, self._reported[0] - before[0], self._reported[1] - before[1])

    def _now_s(self) -> float:
        return (time.monotonic() - self._epoch) / self._scale

    def _settle(self, finished: list[Finished]) -> None:
        """Hand out what ended, and set the alarm for what ends next."""
        for item in finished:
            ended, done, num_expected = self._pending[item.completion.group_id]
            done[item.completion.index] = item
            if len(done) == num_expected:
                del self._pending[item.completion.group_id]
                # The caller may be gone: at the end of a run its calls are cancelled, while the device decodes on.
                if not ended.done():
                    ended.set_result(None)
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        next_s = self._decoder.next_end_s()
        if next_s < float("inf"):
            delay_s = max(0.0, (next_s - self._now_s()) * self._scale)
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._settle(self._decoder.advance(self._now_s()))


class SimulatedLearner(Actor):
    """Trains by the clock, and refuses what no real learner should be given."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._delivered: dict[int, ScoredGroup] = {}
        self._consumed: set[int] = set()
        self._num_duplicates = 0
        self._traces: list[LearnerTrace] = []
        self._version = 0

    @endpoint
    async def ready(self) -> None:
        """Returns once the actor exists."""

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        """Take a scored group; a second arrival of an id is dropped and counted."""
        group_id = scored.group.lease.group_id
        if group_id in self._delivered or group_id in self._consumed:
            self._num_duplicates += 1
            return
        for trajectory in scored.group.trajectories:
            if sum(span.num_tokens for span in trajectory.spans) != len(trajectory.token_ids):
                raise BatchRefused(
                    f"group {group_id}: its version spans do not cover its {len(trajectory.token_ids)} tokens"
                )
        self._delivered[group_id] = scored

    @endpoint
    async def train(self, order: TrainOrder) -> TrainReport:
        """Check every group, then sleep. Raises BatchRefused."""
        began_at = time.monotonic()
        group_ids = [group_id for update in order.updates for group_id in update]
        staleness = [self._consume(group_id, order) for group_id in group_ids]
        await asyncio.sleep(self._device.training_s * self._device.clock_scale - (time.monotonic() - began_at))
        self._traces.append(LearnerTrace(order.version, began_at, time.monotonic(), group_ids, staleness))
        return TrainReport(
            order.version,
            {"staleness/max": float(max(staleness, default=0)), "duplicates": float(self._num_duplicates)},
        )

    def _consume(self, group_id: int, order: TrainOrder) -> int:
        if group_id in self._consumed:
            raise BatchRefused(f"group {group_id} is ordered a second time, at version {order.version}")
        if group_id not in self._delivered:
            raise BatchRefused(f"group {group_id} is ordered at version {order.version}, but was never delivered")
        trajectories = self._delivered.pop(group_id).group.trajectories
        staleness = order.version - min(trajectory.oldest_version for trajectory in trajectories)
        if not 0 <= staleness <= order.max_staleness:
            raise BatchRefused(f"group {group_id}: staleness {staleness}, the bound is {order.max_staleness}")
        self._consumed.add(group_id)
        return staleness

    @endpoint
    async def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Nothing meets there: the transfer is slept."""
        return Rendezvous("127.0.0.1", 1, num_members, "gloo")

    @endpoint
    async def publish(self, order: PublishOrder) -> PublishReport:
        """Sleep for the transfer."""
        await asyncio.sleep(self._device.costs.publish_s * self._device.clock_scale)
        self._version = order.version
        return PublishReport(order.version, 1, 0, f"version-{order.version}", 0.0)

    @endpoint
    async def canary(self, canary: Canary) -> list[float]:
        """The same on both sides."""
        return [0.0] * len(canary.response_ids)

    @endpoint
    async def take_trace(self) -> list[LearnerTrace]:
        """Every training so far."""
        return self._traces


def _trajectory(lease: Lease, finished: Finished) -> Trajectory:
    """Tokens and text of the drawn length; about half of the answers are right."""
    completion = finished.completion
    length = completion.length
    is_right = (lease.group_id + completion.index) % 2 == 0
    answer = lease.sample.row if is_right else lease.sample.row + 1
    spans = [VersionSpan(version, num_tokens) for version, num_tokens in finished.spans]
    is_cut = length >= lease.sampling.max_tokens
    text = f"<think>{'so ' * (length // 4)}</think><answer>\\boxed{{{answer}}}</answer>"
    return Trajectory(
        np.full(length, 7, np.int32), np.full(length, -0.5, np.float32), spans, "length" if is_cut else "stop", text
    )
