"""A generator: samples leased groups with its engine and hands them to the verifier pool. Spawned by `vtriune.run.processes`.

    controller ──Lease──▶ generate ──Group──▶ a verifier process ──▶ learner, recorder
         ▲                                        │
         └───────────── GroupReport ◀─────────────┘

Many leases are in flight at once; the engine batches their completions. The engine is built in `ready`, so that spawning is
quick and a failure to start has its own error.
"""

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from actors.rollouts.single_turn import sample_shared
from vtriune import roles
from vtriune.config.tree import Config
from vtriune.data.processing import Preprocessor
from vtriune.data.store import StoreSet
from vtriune.messages import SCORED_AGAIN, Canary, Group, GroupReport, Lease, PublishOrder, PublishReport
from vtriune.runtime import Actor, ConnectionLost, MeshFailure, endpoint

if TYPE_CHECKING:
    from actors.engine import Engine

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 2.0


class NotReady(RuntimeError):
    """A call before `ready`."""


class Generator(Actor):
    """One engine per process. `verifiers` is a reference to the pool's mesh; `rank` numbers the generator in the run."""

    def __init__(self, config: Config, store_folders: list[str], verifiers: roles.VerifierPool, rank: int) -> None:
        self._config = config
        self._store_folders = store_folders
        self._verifiers = verifiers
        self._rank = rank
        self._engine: Engine | None = None
        self._starting = asyncio.Lock()

    @endpoint
    async def ready(self) -> None:
        """Build the engine on the first call."""
        async with self._starting:
            if self._engine is None:
                self._engine = await asyncio.to_thread(self._build)

    @endpoint
    async def generate(self, lease: Lease, others: list[roles.Generator]) -> GroupReport:
        """Sample, have scored and delivered, report. `others` are generators that take a share of the completions.

        Raises EngineError or DataError when it cannot be sampled.
        """
        group = await sample_shared(lease, others, self._running.generate)
        return await self._scored(group)

    @endpoint
    async def sample(self, lease: Lease) -> Group:
        """A share of a group, unscored, for the generator that holds the group's lease."""
        return await self._running.generate(lease)

    @endpoint
    async def receive(self, order: PublishOrder) -> PublishReport:
        """Take part in a publish as `order.member`; sampled from its version afterwards.

        Raises PublishFailure: a PeerFailure when this engine is unharmed and goes on with the version it had.
        """
        return await self._running.receive(order)

    @endpoint
    async def canary(self, canary: Canary) -> list[float]:
        """Log-prob of each of the canary's response tokens at the current version."""
        return await self._running.score(canary)

    @endpoint
    async def stats(self) -> dict[str, float]:
        """Shares and rates since the last call, and what is in flight."""
        return self._running.stats()

    async def __cleanup__(self, error: Exception | None) -> None:
        """End the engine; groups in flight fail."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    @property
    def _running(self) -> "Engine":
        if self._engine is None:
            raise NotReady(f"generator {self._rank} has no engine; call ready() first, or it was closed")
        return self._engine

    def _build(self) -> "Engine":
        from actors.engine import Engine, environment

        environment.settle(self._config.cluster.generators)
        data, path = self._config.data, self._config.model.path
        preprocessor = Preprocessor(path, data.min_pixels, data.max_pixels, data.max_prompt_tokens)
        return Engine(self._config, preprocessor, StoreSet.open(self._store_folders), self._rank)

    async def _scored(self, group: Group) -> GroupReport:
        """Have some verifier process score the group. One that dies or is cut off loses nothing: the group goes to another, or to
        the one that replaces it, for as long as the lease lasts, under a name of its own."""
        pause, deadline = _FIRST_PAUSE_S, asyncio.get_running_loop().time() + self._config.policy.lease_s
        while True:
            try:
                return await self._verifiers.score.choose(group)
            except (MeshFailure, ConnectionLost) as failure:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                if pause == _FIRST_PAUSE_S:
                    log.warning("group %d is scored again: %s", group.lease.group_id, str(failure).splitlines()[0])
                group = _named_anew(group)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_S)


def _named_anew(group: Group) -> Group:
    """The group as another delivery than the one that may have reached some learner ranks already: an answer that met its deadline
    at one verifier may miss it at another, and all ranks must train on the same verdicts. Evaluations go to the recorder alone,
    which counts a row once by its name."""
    lease = group.lease
    if lease.purpose == "evaluate":
        return group
    return msgspec.structs.replace(group, lease=msgspec.structs.replace(lease, attempt=lease.attempt + SCORED_AGAIN))
