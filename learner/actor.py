"""The learner as an actor: one rank per process. A thin shell around `learner.service`; spawned by `vtriune.crew`.

`deliver` and `saved` are asynchronous and run while a sync endpoint works; the others run one at a time on the actor's own thread, in
the order they were called, so that every rank makes its collective calls in the same order. torch is imported by the
first rank that connects, not by whoever spawns or refers to the actor.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from vtriune.config.tree import Config
from vtriune.messages import Canary, PublishOrder, PublishReport, Rendezvous, ScoredGroup, TrainOrder, TrainReport
from vtriune.runtime import Actor, current_rank, current_size, endpoint, interface_of

if TYPE_CHECKING:
    from learner.service import LearnerService


class LearnerActor(Actor):
    """Endpoints are documented at `LearnerService`; errors of its calls arrive at the caller with their traceback."""

    def __init__(self, config: Config, run_folder: str, store_folders: list[str]) -> None:
        from learner.service import LearnerService

        num_ranks = 1
        for size in current_size().values():
            num_ranks *= size
        self._service: LearnerService = LearnerService(
            config, run_folder, store_folders, current_rank().rank, num_ranks, interface_of()
        )

    @endpoint
    def open_store(self) -> int:
        """Rank 0: port of the ranks' store."""
        return self._service.open_store()

    @endpoint
    def connect(self, host: str, port: int) -> None:
        """All ranks: join, load the model."""
        self._service.connect(host, port)

    @endpoint
    def ready(self) -> dict[str, Any]:
        """Parameters per module and trainable names."""
        return self._service.ready()

    @endpoint
    async def deliver(self, scored: ScoredGroup) -> None:
        """A group for training; every rank gets every group."""
        # In a thread: it takes the lock that `train` waits on, and checks arrays.
        await asyncio.to_thread(self._service.deliver, scored)

    @endpoint
    def train(self, order: TrainOrder) -> TrainReport:
        """All ranks: one rollout batch."""
        return self._service.train(order)

    @endpoint
    def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Rank 0: where a publish meets."""
        return self._service.open_rendezvous(num_members)

    @endpoint
    def publish(self, order: PublishOrder) -> PublishReport:
        """All ranks: send weights."""
        return self._service.publish(order)

    @endpoint
    def canary(self, canary: Canary) -> list[float]:
        """All ranks: the canary's log-probs."""
        return self._service.canary(canary)

    @endpoint
    def save(self, folder: str) -> dict[str, Any]:
        """All ranks: start writing the learner's part of a checkpoint."""
        return self._service.save(folder)

    @endpoint
    async def saved(self) -> dict[str, Any]:
        """All ranks: returns once the last checkpoint's part is written; runs while the learner trains."""
        return await asyncio.to_thread(self._service.saved)

    @endpoint
    def load(self, folder: str) -> None:
        """All ranks: resume."""
        self._service.load(folder)

    @endpoint
    def close(self) -> None:
        """All ranks: leave the group."""
        self._service.close()

    def __cleanup__(self, error: Exception | None) -> None:
        self._service.close()
