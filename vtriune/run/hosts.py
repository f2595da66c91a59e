"""Where a run's processes start: this machine, or a Ray cluster (`cluster.launcher`). Opened and closed by `RunProcesses`.

The recorder runs beside the controller in either case: it writes the run folder that the controller reads.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from vtriune.config.sections.cluster import Cluster, Strategy
from vtriune.runtime import HostMesh, configure, this_host
from vtriune.runtime.processes import ray_launcher
from vtriune.runtime.processes.ray_launcher import RayPlaces

log = logging.getLogger(__name__)

Role = Literal["recorder", "learner", "generators", "verifiers"]
T = TypeVar("T")

ROOM_S = 300.0
"""For nodes that are just starting; a cluster that scales itself takes minutes."""
FIRST_ROOM_S = 15.0
"""The same for all generators: after it, the run starts with those that have room."""
_PROMPT_S = 10.0
"""Waiting for longer than this is told; Ray takes seconds to start a process where there is room."""


class Hosts:
    """Hosts for the processes of each role: this machine for all of them."""

    num_generators: int
    """How many generators have room at the start, those of lowest rank; the others may get it later."""

    def __init__(self, cluster: Cluster) -> None:
        self.num_generators = cluster.generators.procs
        self._num_procs = {"recorder": 1, "learner": cluster.learner.procs, "verifiers": cluster.verifiers.procs}

    def hosts(self, role: Role) -> tuple[HostMesh, int]:
        """Hosts of a role and how many processes to start on each."""
        return this_host(), self._num_procs[role]

    async def generator_host(self, rank: int) -> HostMesh:
        """A host for one process; waits for room, as long as it takes."""
        return this_host()

    def close(self) -> None:
        """Give every place back. Idempotent; to be called when the processes have ended."""


async def open_hosts(cluster: Cluster, say: Callable[[str], None]) -> Hosts:
    """Settle the run's network and its places, before the first process starts. Call in the main thread, which Ray wants.

    Raises `vtriune.runtime.processes.ray_launcher.NoRoom`, or ConnectionError when no cluster answers.
    """
    if cluster.launcher == "ray":
        return await _RayCluster.open(cluster, say)
    if cluster.bind != "ipc":
        configure(bind=cluster.bind)
    return Hosts(cluster)


class _RayCluster(Hosts):
    """One placement group per role."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None]) -> None:
        super().__init__(cluster)
        self._say = say
        self._places: dict[Role, RayPlaces] = {}

    @classmethod
    async def open(cls, cluster: Cluster, say: Callable[[str], None]) -> "_RayCluster":
        """Join the cluster and set the places aside."""
        address = ray_launcher.join(cluster.address)
        configure(bind=address if cluster.bind == "ipc" else cluster.bind)
        opened = cls(cluster, say)
        try:
            await opened._reserve(cluster)
        except BaseException:  # Whatever stopped it, the places already set aside go back.
            opened.close()
            raise
        return opened

    async def _reserve(self, cluster: Cluster) -> None:
        """The learner first, which fits in the fewest ways; generators last, which can do with less than they ask for."""
        learner, verifiers, generators = cluster.learner, cluster.verifiers, cluster.generators
        layout = cluster.placement
        await self._add("learner", learner.procs, layout.learner, learner.threads, learner.gpus)
        # Each worker is a process of its own, one busy core; perception and messages take one more.
        await self._add("verifiers", verifiers.procs, layout.verifiers, 1 + verifiers.workers, 0)
        self.num_generators = await self._add(
            "generators", generators.procs, layout.generators, generators.threads, generators.gpus,
            is_elastic=layout.generators == "SPREAD",
        )  # fmt: skip
        if self.num_generators < generators.procs:
            self._say(
                f"Ray has room for {self.num_generators} of {generators.procs} generators; the others join when it has"
            )

    async def _add(
        self, role: Role, num_procs: int, strategy: Strategy, num_cpus: int, num_gpus: int, *, is_elastic: bool = False
    ) -> int:
        places = self._places[role] = RayPlaces(role, num_procs, strategy=strategy, cpus=num_cpus, gpus=num_gpus)
        reserving = places.reserve(FIRST_ROOM_S if is_elastic else ROOM_S, is_elastic=is_elastic)
        return await self._announced(reserving, role)

    def hosts(self, role: Role) -> tuple[HostMesh, int]:
        return (this_host() if role == "recorder" else self._places[role].hosts()), 1

    async def generator_host(self, rank: int) -> HostMesh:
        places = self._places["generators"]
        log.info("generator %d is placed on %s", rank, await self._announced(places.room(rank), f"generator {rank}"))
        return places.hosts().slice(hosts=rank)

    async def _announced(self, room: Awaitable[T], who: str) -> T:
        """`room`'s outcome; says who waits for it, unless it is there at once."""
        finding = asyncio.ensure_future(room)
        try:
            await asyncio.wait([finding], timeout=_PROMPT_S)
            if not finding.done():
                self._say(f"waiting for room on the Ray cluster: {who}")
            return await finding
        finally:
            finding.cancel()

    def close(self) -> None:
        for places in self._places.values():
            places.release()
        self._places.clear()
        ray_launcher.leave()
