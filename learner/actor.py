"""The learner as an actor: one rank per process. A thin shell around `learner.rank`; spawned by `vtriune.run.processes`.

`deliver` and `saved` are asynchronous and run while a sync endpoint works; the others run one at a time on the actor's own thread, in
the order they were called, so that every rank makes its collective calls in the same order. torch is imported by the
first rank that connects, not by whoever spawns or refers to the actor.
"""

from __future__ import annotations

import asyncio
import math

from vtriune.config.tree import Config
from vtriune.messages import Canary, PublishOrder, PublishReport, Rendezvous, ScoredGroup, TrainOrder, TrainReport
from vtriune.runtime import Actor, current_rank, current_size, endpoint, interface_of


class LearnerActor(Actor):
    """Endpoints are documented at `LearnerRank`; errors of its calls arrive at the caller with their traceback."""

    def __init__(self, config: Config, store_folders: list[str]) -> None:
        from learner.rank import LearnerRank

        rank, num_ranks = current_rank().rank, math.prod(current_size().values())
        self._rank = LearnerRank(config, store_folders, rank, num_ranks, interface_of())

    @endpoint
    def open_store(self) -> int:
        """Rank 0: port of the ranks' store."""
        return self._rank.open_store()

    @endpoint
    def connect(self, host: str, port: int) -> None:
        """All ranks: join, load the model."""
        self._rank.connect(host, port)

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        """A group for training; every rank gets every group."""
        # In a thread: it takes the lock that `train` waits on, and checks arrays.
        await asyncio.to_thread(self._rank.deliver, scored)

    @endpoint
    def train(self, order: TrainOrder) -> TrainReport:
        """All ranks: one rollout batch."""
        return self._rank.train(order)

    @endpoint
    def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Rank 0: where a publish meets."""
        return self._rank.open_rendezvous(num_members)

    @endpoint
    def publish(self, order: PublishOrder) -> PublishReport:
        """All ranks: send weights."""
        return self._rank.publish(order)

    @endpoint
    def canary(self, canary: Canary) -> list[float]:
        """All ranks: the canary's log-probs."""
        return self._rank.canary(canary)

    @endpoint
    def save(self, folder: str) -> None:
        """All ranks: start writing the learner's part of a checkpoint."""
        self._rank.save(folder)

    @endpoint
    async def saved(self) -> None:
        """All ranks: returns once the last checkpoint's part is written; runs while the learner trains."""
        await asyncio.to_thread(self._rank.saved)

    @endpoint
    def load(self, folder: str) -> None:
        """All ranks: resume."""
        self._rank.load(folder)

    @endpoint
    def close(self) -> None:
        """All ranks: leave the group."""
        self._rank.close()

    def __cleanup__(self, error: Exception | None) -> None:
        self._rank.close()
