"""Starts worker processes on a Ray cluster (extra `ray`): Ray places and watches them, messages stay on our sockets.

    configure(bind=join("10.0.0.1:6379"))
    places = RayPlaces("generators", 4, strategy="SPREAD", cpus=2, gpus=1)
    await places.reserve(60.0)
    procs = places.hosts().spawn_procs(name="generators", restart=RestartPolicy())

A role has one placement group, a bundle for each of its processes with the CPUs and GPUs it asks for. In a bundle a Ray
actor, the seat, starts our worker as its child on that node and reports its end. Ray accounts for the GPUs and sets their
visibility for the seat, which the worker inherits. Workers listen on their node's address with the run's CURVE keys. A lost
node is a `MeshFailure`; what ran there can start again once Ray has found its bundle another place, for which `room` waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vtriune.runtime.bootstrap import Bootstrap
from vtriune.runtime.processes.local_process import Tell
from vtriune.runtime.processes.proc_mesh import HostMesh
from vtriune.runtime.processes.ray_process import RayProcess, Seat, if_joined, node_address, ray_module
from vtriune.runtime.shape import Extent

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]

_FEWER_S = 5.0
"""How long Ray may take over a smaller group when the whole one had no room: nothing is waited for, only placed."""
_KNOCK_S = 10.0
_CONCURRENCY = 4
"""A seat's `next` blocks; `stop` and `kill` must get through beside it."""


class NoRoom(RuntimeError):
    """The cluster cannot hold a role."""


class RayHosts(HostMesh):
    """Places as hosts: sliced like any others; each holds one process. An element is the number of its place."""

    def __init__(self, places: RayPlaces, extent: Extent, elements: Sequence[str]) -> None:
        super().__init__(extent, elements)
        self._places = places

    def launch(self, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, tell: Tell) -> RayProcess:
        """Start one process at its place."""
        if boot.rank >= len(self._elements):
            raise ValueError(
                f"{boot.mesh}: a place holds one process; ask for a place per process and leave per_host 1"
            )
        return self._places.launch(int(self._elements[boot.rank]), boot, env, log_path, tell)


class RayPlaces:
    """The places of one role on the cluster.

    Args:
        role: Names it in logs and errors.
        num_places: One per process.
        strategy: Ray's: STRICT_PACK keeps all places on one node, SPREAD distributes them as far as it can.
        cpus: Of each place.
        gpus: Of each place.
    """

    def __init__(self, role: str, num_places: int, *, strategy: Strategy, cpus: float, gpus: float = 0.0) -> None:
        self.role = role
        self.num_places = num_places
        self._strategy = strategy
        self._bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self._groups: list[Any] = []
        self._where: list[tuple[Any, int]] = []
        self._seats: dict[int, Any] = {}

    async def reserve(self, patience_s: float, *, is_elastic: bool = False) -> int:
        """Have Ray set every place aside, in one placement group.

        Elastic: where not all have room, as many as have are taken, places 0, 1, …; each of the others gets a group of its
        own, which Ray fills when the cluster grows, or never.

        Args:
            patience_s: How long the whole group may wait, for nodes that are just starting.

        Returns:
            How many places there are now.

        Raises:
            NoRoom: not even one, or not all where that is asked.
        """
        num_found = self.num_places
        while num_found:
            group = self._ask(num_found)
            if await _is_ready(group, patience_s):
                self._where = [(group, bundle) for bundle in range(num_found)]
                break
            num_fitting = self._num_fitting() if is_elastic else 0
            self._drop(group)
            num_found, patience_s = min(num_found - 1, num_fitting), min(patience_s, _FEWER_S)
        if not num_found:
            raise NoRoom(self._complaint())
        self._where += [(self._ask(1), 0) for _ in range(num_found, self.num_places)]
        return num_found

    def _ask(self, num_bundles: int) -> Any:
        group = ray_module().util.placement_group([self._bundle] * num_bundles, strategy=self._strategy)
        self._groups.append(group)
        return group

    def _drop(self, group: Any) -> None:
        self._groups.remove(group)
        ray_module().util.remove_placement_group(group)

    def _num_fitting(self) -> int:
        """How many places are worth asking for: fragments of several nodes count, so perhaps too many; and always one, because
        what has just been given back elsewhere does not show yet."""
        free = ray_module().available_resources()
        return max(1, int(min(free.get(name, 0.0) // amount for name, amount in self._bundle.items())))

    def _complaint(self) -> str:
        total, free = ray_module().cluster_resources(), ray_module().available_resources()
        has = ", ".join(f"{name} {total.get(name, 0.0):g} ({free.get(name, 0.0):g} free)" for name in self._bundle)
        asked = ", ".join(f"{name} {amount:g}" for name, amount in self._bundle.items())
        return (
            f"Ray has no room for {self.role}: {self.num_places} places of {asked} each, {self._strategy}; the cluster's "
            f"{len([node for node in ray_module().nodes() if node['Alive']])} nodes have {has}: add nodes, or ask for less in "
            f"cluster.{self.role}"
        )

    def hosts(self) -> RayHosts:
        """Every place, along the dimension `hosts`."""
        return RayHosts(self, Extent(["hosts"], [self.num_places]), [str(place) for place in range(self.num_places)])

    async def room(self, place: int) -> str:
        """Returns when Ray has room for a process at `place`, which the next launch there takes: at once, or when a node
        joins the cluster. Waits as long as that takes.

        Returns:
            The node, in words.
        """
        seat = self._new_seat(place)
        try:
            node: str = await asyncio.wrap_future(seat.node.remote().future())
        except BaseException:  # Also when nobody waits any longer: the seat would stay taken.
            if_joined(lambda: ray_module().kill(seat))
            raise
        self._seats[place] = seat
        return node

    def launch(
        self, place: int, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, tell: Tell
    ) -> RayProcess:
        """Start one process at a place. Does not block: it may take until Ray has room there."""
        seat = self._seats.pop(place, None) or self._new_seat(place)
        return RayProcess(seat, boot, env, log_path, tell)

    def _new_seat(self, place: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group, bundle = self._where[place]
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        asked = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0.0)}
        return (
            ray_module().remote(Seat).options(**asked, max_concurrency=_CONCURRENCY, scheduling_strategy=where).remote()
        )

    def release(self) -> None:
        """Give the places back, whatever still runs there. Idempotent."""
        for group in list(self._groups):
            self._drop(group)
        self._seats.clear()


async def _is_ready(group: Any, patience_s: float) -> bool:
    try:
        async with asyncio.timeout(patience_s):
            await asyncio.wrap_future(group.ready().future())
    except TimeoutError:
        return False
    return True


def join(address: str | None = None) -> str:
    """Connect this process to a Ray cluster, unless it is connected already.

    Args:
        address: Of its head, `host:port`. None: what RAY_ADDRESS says, or a cluster that runs on this machine, or else one
            that is started here and ends with this process or with `leave`.

    Returns:
        This machine's address as the cluster's other nodes know it, for `configure(bind=...)`.

    Raises:
        ConnectionError: no cluster answers there.
    """
    if not ray_module().is_initialized():
        if address is not None:
            _knock(address)
        # For a cluster started here; by default Ray's workers, and ours below them, come last on a busy machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray_module().init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    return node_address()


def _knock(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}): start one there, `ray start --head`"
        ) from error


def leave() -> None:
    """Disconnect, and end the cluster if `join` started it. Idempotent."""
    ray_module().shutdown()
