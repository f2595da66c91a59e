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
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from vtriune.runtime.bootstrap import Bootstrap
from vtriune.runtime.local_launcher import Events, LocalProcess
from vtriune.runtime.node import this_node
from vtriune.runtime.proc_mesh import HostMesh
from vtriune.runtime.shape import Extent
from vtriune.runtime.watcher import Watcher
from vtriune.transport.wire import FailureNote, PeerRef

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]

log = logging.getLogger("vtriune.runtime")

_FEWER_S = 5.0
"""How long Ray may take over a smaller group when the whole one had no room: nothing is waited for, only placed."""
_CONCURRENCY = 4
"""A seat's `next` blocks; `stop` and `kill` must get through beside it."""


class NoRoom(RuntimeError):
    """The cluster cannot hold a role."""


class _SeatReply(msgspec.Struct, frozen=True):
    """What a seat says about its worker, as msgpack: Ray carries bytes only."""

    peer: PeerRef | None = None
    end: FailureNote | None = None
    report: FailureNote | None = None


class Seat:
    """Runs inside a Ray actor: one worker process on that node, as a child of Ray's."""

    def __init__(self) -> None:
        self._watcher = Watcher(lambda: None)
        self._changed = threading.Condition()
        self._news: list[_SeatReply] = []
        self._process: LocalProcess | None = None

    def node(self) -> str:
        """Where this is; answered once the seat is taken."""
        return f"{_node_address()} (Ray node {_ray().get_runtime_context().get_node_id()})"

    def start(self, bootstrap: bytes, env: dict[str, str], log_path: str) -> None:
        """Start the worker, listening on this node's address."""
        boot = msgspec.msgpack.decode(bootstrap, type=Bootstrap)
        address = _node_address()
        boot = msgspec.structs.replace(boot, address=f"tcp://{address}:0", folder="")
        path = Path(log_path) if log_path else None
        self._process = LocalProcess(self._watcher, boot, {**_interface(address), **env}, path, self)

    def next(self) -> bytes:
        """Block until there is news of the worker."""
        with self._changed:
            self._changed.wait_for(lambda: self._news)
            return msgspec.msgpack.encode(self._news.pop(0))

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL."""
        if self._process is not None:
            self._process.stop(grace_s)

    def kill(self, cause: str) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill(cause)

    def _tell(self, reply: _SeatReply) -> None:
        with self._changed:
            self._news.append(reply)
            self._changed.notify_all()

    def on_ready(self, process: Any) -> None:
        """The worker listens."""
        self._tell(_SeatReply(peer=process.peer))

    def on_exit(self, process: Any, note: FailureNote) -> None:
        """It has ended."""
        self._tell(_SeatReply(end=note))

    def on_report(self, process: Any, note: FailureNote) -> None:
        """Something failed inside it."""
        self._tell(_SeatReply(report=note))


def _ray() -> Any:
    """Loaded when first used: the extra may not be installed. Untyped, as Ray is in places."""
    import ray

    return ray


def _node_address() -> str:
    return str(_ray().util.get_node_ip_address())


def _interface(address: str) -> dict[str, str]:
    """Tells gloo and NCCL to meet where the other nodes reach this one; both would ask the host's name. A node's own
    settings come first."""
    import psutil

    names = [
        name for name, addresses in psutil.net_if_addrs().items() if address in {each.address for each in addresses}
    ]
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {variable: names[0] for variable in variables if names and variable not in os.environ}


class RayProcess:
    """One worker process in a seat; a `WorkerProcess` like a local one."""

    def __init__(
        self, seat: Any, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, events: Events
    ) -> None:
        self.boot = boot
        self.peer: PeerRef | None = None
        self.has_ended = False
        self.is_stopping = False
        self._seat = seat
        self._events = events
        self._watcher = this_node().watcher
        self._thread = threading.Thread(
            target=self._follow,
            args=(msgspec.msgpack.encode(boot), dict(env), "" if log_path is None else str(log_path.absolute())),
            name=f"ray-{boot.mesh}-{boot.rank}",
            daemon=True,
        )
        self._thread.start()

    def _follow(self, boot: bytes, env: dict[str, str], log_path: str) -> None:
        """Pass on the seat's news until the worker or its node has ended."""
        note = self._until_end(boot, env, log_path)
        # First the seat: whoever hears of the end may leave the cluster.
        _if_joined(lambda: _ray().kill(self._seat))
        self.has_ended = True
        self._watcher.do(lambda: self._events.on_exit(self, note))

    def _until_end(self, boot: bytes, env: dict[str, str], log_path: str) -> FailureNote:
        try:
            _ray().get(self._seat.start.remote(boot, env, log_path))
            while True:
                news = msgspec.msgpack.decode(_ray().get(self._seat.next.remote()), type=_SeatReply)
                if news.end is not None:
                    return news.end
                self._handle(news)
        except Exception as error:
            # A lost node or seat, or this process has left the cluster, which Ray tells by any exception: it is gone.
            return self._lost_note(error)

    def _handle(self, news: _SeatReply) -> None:
        if news.peer is not None:
            self.peer = news.peer
            self._watcher.do(lambda: self._events.on_ready(self))
        elif news.report is not None:
            report = news.report
            self._watcher.do(lambda: self._events.on_report(self, report))

    def _lost_note(self, error: Exception) -> FailureNote:
        peer = self.peer
        host, pid = ("", 0) if peer is None else (peer.host, peer.pid)
        detail = f"Ray lost its node or seat: {type(error).__name__}: {str(error)[:2000]}"
        return FailureNote(self.boot.mesh, self.boot.rank, host, pid, "unreachable", detail=detail)

    def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace. Idempotent."""
        if not self.is_stopping:
            self.is_stopping = True
            _if_joined(lambda: self._seat.stop.remote(grace_s))

    def kill(self, cause: str = "") -> None:
        """SIGKILL at once."""
        _if_joined(lambda: self._seat.kill.remote(cause))

    def stopped_for_s(self) -> float:
        """0: libzmq's heartbeats tell a frozen worker on another host."""
        return 0.0


class RayHosts(HostMesh):
    """Places as hosts: sliced like any others; each holds one process. An element is the number of its place."""

    def __init__(self, places: RayPlaces, extent: Extent, elements: Sequence[str]) -> None:
        super().__init__(extent, elements, self._start)
        self._places = places

    def _with_shape(self, extent: Extent, elements: Sequence[str]) -> RayHosts:
        return RayHosts(self._places, extent, elements)

    def _start(self, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, events: Events) -> RayProcess:
        if boot.rank >= len(self._elements):
            raise ValueError(
                f"{boot.mesh}: a place holds one process; ask for a place per process and leave per_host 1"
            )
        return self._places.launch(int(self._elements[boot.rank]), boot, env, log_path, events)


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
        group = _ray().util.placement_group([self._bundle] * num_bundles, strategy=self._strategy)
        self._groups.append(group)
        return group

    def _drop(self, group: Any) -> None:
        self._groups.remove(group)
        _ray().util.remove_placement_group(group)

    def _num_fitting(self) -> int:
        """How many places the cluster has the resources for; fragments of several nodes count, so perhaps too many."""
        free = _ray().available_resources()
        return int(min(free.get(name, 0.0) // amount for name, amount in self._bundle.items()))

    def _complaint(self) -> str:
        total, free = _ray().cluster_resources(), _ray().available_resources()
        has = ", ".join(f"{name} {total.get(name, 0.0):g} ({free.get(name, 0.0):g} free)" for name in self._bundle)
        asked = ", ".join(f"{name} {amount:g}" for name, amount in self._bundle.items())
        return (
            f"Ray has no room for {self.role}: {self.num_places} places of {asked} each, {self._strategy}; the cluster's "
            f"{len([node for node in _ray().nodes() if node['Alive']])} nodes have {has}: add nodes, or ask for less in "
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
            _if_joined(lambda: _ray().kill(seat))
            raise
        self._seats[place] = seat
        return node

    def launch(
        self, place: int, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, events: Events
    ) -> RayProcess:
        """Start one process at a place. Does not block: it may take until Ray has room there."""
        seat = self._seats.pop(place, None) or self._new_seat(place)
        return RayProcess(seat, boot, env, log_path, events)

    def _new_seat(self, place: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group, bundle = self._where[place]
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        asked = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0.0)}
        return _ray().remote(Seat).options(**asked, max_concurrency=_CONCURRENCY, scheduling_strategy=where).remote()

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


def _if_joined(action: Callable[[], Any]) -> None:
    """Seats end with the connection; and a call after it would make Ray connect anew."""
    if _ray().is_initialized():
        action()


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
    if not _ray().is_initialized():
        # For a cluster started here; by default Ray's workers, and ours below them, come last on a busy machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            _ray().init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error
    return _node_address()


def leave() -> None:
    """Disconnect, and end the cluster if `join` started it. Idempotent."""
    _ray().shutdown()
