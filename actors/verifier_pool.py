"""The verifier pool's front: takes groups from generators, scores them, sends them on. Spawned by `vtriune.crew`.

    generator ──score(Group)──▶ pool ──ScoredGroup──▶ every learner rank   (training)
         ▲                       │                └─▶ recorder             (training and evaluation)
         └────── GroupReport ────┘   once all of them have taken it

A group is reported only after it was delivered, so a report stands for a group that cannot be lost with this process. A
process that dies in between has the group scored and delivered again; consumers drop duplicates by id.
"""

import asyncio
import time

from verifiers import RewardOptions
from verifiers.pool import VerifierPool
from vtriune.config.rewards import reward_options
from vtriune.config.tree import Config
from vtriune.data.store import StoreSet
from vtriune.messages import Group, GroupReport, Purpose, ScoredGroup
from vtriune.runtime import Actor, ActorMesh, endpoint

_GIB = 2**30


class VerifierPoolActor(Actor):
    """One per verifier process. `learner` and `recorder` are references to their meshes."""

    def __init__(self, config: Config, store_folders: list[str], learner: ActorMesh, recorder: ActorMesh) -> None:  # type: ignore[type-arg]
        self._config = config
        self._stores = StoreSet.open(store_folders)
        self._learner = learner
        self._recorder = recorder
        self._pools: dict[Purpose, VerifierPool] = {}
        self._starting = asyncio.Lock()

    @endpoint
    async def ready(self) -> None:
        """Returns once training groups can be scored: kernels compiled, workers warm and tested on known answers."""
        await self._pool("train")

    @endpoint
    async def score(self, group: Group) -> GroupReport:
        """Score, deliver, report. Raises FaultRateError when a source's verifier keeps failing, DataError for a sample of
        other data."""
        start = time.monotonic()
        lease, ref = group.lease, group.lease.sample
        store = self._stores.store_of(ref)
        source, spec = store.source(ref.row), store.reward(ref.row)
        pool = await self._pool(lease.purpose)
        responses = [trajectory.text for trajectory in group.trajectories]
        verdicts = await pool.score(responses, [spec] * len(responses), lease.progress, [source] * len(responses))
        scored = ScoredGroup(group, source, verdicts, time.monotonic() - start)
        deliveries = [self._recorder.record_group.call(scored)]
        if lease.purpose == "train":
            deliveries.append(self._learner.deliver.call(scored))
        await asyncio.gather(*deliveries)
        return report_of(scored)

    @endpoint
    async def metrics(self) -> dict[str, float]:
        """The pools' figures since the start; those of evaluation under `evaluate/`."""
        figures: dict[str, float] = {}
        for purpose, pool in self._pools.items():
            prefix = "" if purpose == "train" else "evaluate/"
            figures.update({prefix + name: value for name, value in pool.metrics().items()})
        return figures

    @endpoint
    async def close(self) -> None:
        """End the workers. Idempotent."""
        await self._close()

    async def __cleanup__(self, error: Exception | None) -> None:
        await self._close()

    async def _close(self) -> None:
        pools, self._pools = list(self._pools.values()), {}
        await asyncio.gather(*(pool.close() for pool in pools))

    async def _pool(self, purpose: Purpose) -> VerifierPool:
        """The pool with the options of `purpose`, started on first use: evaluation has a threshold of its own."""
        async with self._starting:
            if purpose not in self._pools:
                pool = pool_of(self._config, reward_options(self._config.rewards, is_evaluation=purpose == "evaluate"))
                await pool.start()
                self._pools[purpose] = pool
        return self._pools[purpose]


def pool_of(config: Config, options: RewardOptions) -> VerifierPool:
    """A pool with the configuration's workers and limits."""
    rewards = config.rewards
    return VerifierPool(
        config.cluster.verifiers.workers,
        options,
        rewards.deadline_s,
        int(rewards.memory_gib * _GIB),
        rewards.max_response_chars,
        fault_limit=rewards.max_fault_rate,
    )


def report_of(scored: ScoredGroup) -> GroupReport:
    """What the controller learns of `scored`."""
    group = scored.group
    versions = [span.version for trajectory in group.trajectories for span in trajectory.spans]
    return GroupReport(
        group_id=group.lease.group_id,
        attempt=group.lease.attempt,
        source=scored.source,
        oldest_version=min(versions),
        newest_version=max(versions),
        num_tokens=sum(len(trajectory.token_ids) for trajectory in group.trajectories),
        rewards=[verdict.reward for verdict in scored.verdicts if verdict.status != "fault"],
        num_faults=sum(verdict.status == "fault" for verdict in scored.verdicts),
        generator=group.generator,
        generation_s=group.generation_s,
        verification_s=scored.verification_s,
    )
