"""The verifier pool's front: takes groups from generators, scores them, sends them on. Spawned by `vtriune.run.processes`.

    generator ──score(Group)──▶ pool ──ScoredGroup──▶ every learner rank   (training)
         ▲                       │                └─▶ recorder             (training and evaluation)
         └────── GroupReport ────┘   once all of them have taken it

Memory: a group stays here from its arrival until all have taken it, so at most what generators have leased is here, and of each
generator no more than the transport's credit in bytes.

A group is reported only after it was delivered, so a report stands for a group that cannot be lost with this process. A
process that dies in between has the group scored and delivered again; consumers drop duplicates by id.
"""

import asyncio
import time
from statistics import fmean

from msgspec.structs import replace

from verifiers.pool.pool import VerifierPool
from vtriune import roles
from vtriune.config.tree import Config
from vtriune.messages import Group, GroupReport, ScoredGroup
from vtriune.runtime import Actor, endpoint


class VerifierPoolActor(Actor):
    """One per verifier process. `learner` and `recorder` are references to their meshes."""

    def __init__(self, config: Config, learner: roles.Learner, recorder: roles.Recorder) -> None:
        self._learner = learner
        self._recorder = recorder
        rewards = config.rewards
        self._pool = VerifierPool(
            config.cluster.verifiers.workers,
            rewards.options,
            memory_limit_bytes=int(rewards.memory_gib * 2**30),
            fault_limit=rewards.max_fault_rate,
        )
        self._starting: asyncio.Task[None] | None = None

    @endpoint
    async def ready(self) -> None:
        """Returns once groups can be scored: kernels compiled, workers warm and tested on known answers."""
        await self._started()

    @endpoint
    async def score(self, group: Group) -> GroupReport:
        """Score, deliver, report. Raises FaultRateError when a source's verifier keeps failing."""
        start = time.monotonic()
        await self._started()
        lease, responses = group.lease, [trajectory.text for trajectory in group.trajectories]
        specs, sources = [lease.header.reward] * len(responses), [lease.header.source] * len(responses)
        sizes = [group.image_sizes] * len(responses)
        verdicts = await self._pool.score(responses, specs, lease.progress, sources, sizes)
        scored = ScoredGroup(group, verdicts, time.monotonic() - start)
        deliveries = [self._recorder.record_group.call(scored)]
        if lease.purpose == "train":
            deliveries.append(self._learner.deliver.call(without_texts(scored)))
        await asyncio.gather(*deliveries)
        return report_of(scored)

    @endpoint
    async def metrics(self) -> dict[str, float]:
        """The pool's figures since the last call: see `verifiers.pool.figures`."""
        return self._pool.take_metrics()

    async def __cleanup__(self, error: Exception | None) -> None:
        await self._pool.close()

    async def _started(self) -> None:
        """Start the pool, once for all who ask: nobody calls `ready` of a process that replaces a dead one."""
        self._starting = self._starting or asyncio.create_task(self._pool.start())
        await asyncio.shield(self._starting)


def without_texts(scored: ScoredGroup) -> ScoredGroup:
    """What is trained on: 8 bytes a token, at every rank, for as long as the window holds the group."""
    trajectories = [replace(trajectory, text="") for trajectory in scored.group.trajectories]
    return replace(scored, group=replace(scored.group, trajectories=trajectories))


def report_of(scored: ScoredGroup) -> GroupReport:
    """What the controller learns of `scored`."""
    group, judged = scored.group, [verdict for verdict in scored.verdicts if verdict.status != "fault"]
    return GroupReport(
        group_id=group.lease.group_id,
        attempt=group.lease.attempt,
        num_tokens=sum(len(trajectory.token_ids) for trajectory in group.trajectories),
        rewards=[verdict.reward for verdict in judged],
        num_faults=len(scored.verdicts) - len(judged),
        verification_s=scored.verification_s,
        solve_rate=fmean(verdict.accuracy for verdict in judged) if judged else None,
    )
