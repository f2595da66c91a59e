"""Starts worker processes on a Ray cluster (extra `ray`): Ray places and watches them, messages stay on our sockets.

    hosts = ray_hosts(num_hosts=2, strategy="SPREAD", gpus_per_proc=1.0)
    procs = hosts.spawn_procs(per_host={"procs": 4}, name="generators", restart=RestartPolicy())

One placement group per mesh: a bundle per host, as many CPUs and GPUs in it as its processes ask for. In each bundle a
Ray actor, the seat, starts our worker as its child on that node and reports its end. Ray accounts for the GPUs and
sets their visibility for the seat, which the worker inherits. Workers listen on their node's address with the run's
CURVE keys: call `configure(bind=...)` before the first spawn. A lost node is a `MeshFailure`; a mesh with a restart
policy shrinks by that rank, and the rank is back once Ray has found its bundle another place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
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

_START_S = 300.0


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

    def start(self, bootstrap: bytes, env: dict[str, str], log_path: str) -> None:
        """Start the worker, listening on this node's address."""
        import ray

        boot = msgspec.msgpack.decode(bootstrap, type=Bootstrap)
        node_ip: Any = ray.util.get_node_ip_address
        address = f"tcp://{node_ip()}:0"
        boot = msgspec.structs.replace(boot, address=address, folder="")
        path = Path(log_path) if log_path else None
        self._process = LocalProcess(self._watcher, boot, env, path, self)

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

    def stopped_for_s(self) -> float:
        """How long the worker has been in the stopped state."""
        return 0.0 if self._process is None else self._process.stopped_for_s()

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
        self._stopped_s = 0.0
        self._thread = threading.Thread(
            target=self._follow,
            args=(msgspec.msgpack.encode(boot), dict(env), "" if log_path is None else str(log_path.absolute())),
            name=f"ray-{boot.mesh}-{boot.rank}",
            daemon=True,
        )
        self._thread.start()

    def _follow(self, boot: bytes, env: dict[str, str], log_path: str) -> None:
        """Pass on the seat's news until the worker or its node has ended."""
        import ray

        try:
            ray.get(self._seat.start.remote(boot, env, log_path))
            while not self.has_ended:
                self._handle(msgspec.msgpack.decode(ray.get(self._seat.next.remote()), type=_SeatReply))
        except ray.exceptions.RayError as error:
            if not self.has_ended:
                self._end(self._lost_note(error))
        finally:
            ray.kill(self._seat)

    def _handle(self, news: _SeatReply) -> None:
        if news.peer is not None:
            self.peer = news.peer
            self._watcher.do(lambda: self._events.on_ready(self))
        elif news.report is not None:
            report = news.report
            self._watcher.do(lambda: self._events.on_report(self, report))
        elif news.end is not None:
            self._end(news.end)

    def _end(self, note: FailureNote) -> None:
        self.has_ended = True
        self._watcher.do(lambda: self._events.on_exit(self, note))

    def _lost_note(self, error: Exception) -> FailureNote:
        peer = self.peer
        host, pid = ("", 0) if peer is None else (peer.host, peer.pid)
        detail = f"Ray lost its node or seat: {type(error).__name__}: {str(error)[:2000]}"
        return FailureNote(self.boot.mesh, self.boot.rank, host, pid, "unreachable", detail=detail)

    def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace. Idempotent."""
        if not self.is_stopping:
            self.is_stopping = True
            self._seat.stop.remote(grace_s)

    def kill(self, cause: str = "") -> None:
        """SIGKILL at once."""
        self._seat.kill.remote(cause)

    def stopped_for_s(self) -> float:
        """0: libzmq's heartbeats tell a frozen worker on another host."""
        return self._stopped_s


class RayHosts:
    """Bundles of one placement group, and the launcher that seats processes in them."""

    def __init__(self, num_hosts: int, strategy: Strategy, cpus_per_proc: float, gpus_per_proc: float) -> None:
        self.num_hosts = num_hosts
        self._strategy = strategy
        self._cpus_per_proc = cpus_per_proc
        self._gpus_per_proc = gpus_per_proc
        self._groups: dict[str, Any] = {}
        self._lock = threading.Lock()

    def launch(self, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, events: Events) -> RayProcess:
        """Seat one process: rank r of n goes to bundle r·num_hosts//n."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        num_procs = events.extent.nelements  # type: ignore[attr-defined]
        group = self._group(boot.mesh + boot.node.rpartition("-")[0], num_procs // self.num_hosts)
        bundle = boot.rank * self.num_hosts // num_procs
        seat = (
            ray.remote(Seat)
            .options(
                num_cpus=self._cpus_per_proc,
                num_gpus=self._gpus_per_proc,
                # `next` blocks; `stop` and `kill` must get through beside it.
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            )
            .remote()
        )
        return RayProcess(seat, boot, env, log_path, events)

    def _group(self, key: str, procs_per_host: int) -> Any:
        import ray

        with self._lock:
            if key not in self._groups:
                bundle = {"CPU": self._cpus_per_proc * procs_per_host}
                if self._gpus_per_proc:
                    bundle["GPU"] = self._gpus_per_proc * procs_per_host
                group = ray.util.placement_group([bundle] * self.num_hosts, strategy=self._strategy)
                end = time.monotonic() + _START_S
                if not group.wait(timeout_seconds=max(1.0, end - time.monotonic())):
                    ray.util.remove_placement_group(group)
                    raise RuntimeError(f"Ray has no room for {self.num_hosts} x {bundle} ({self._strategy})")
                self._groups[key] = group
            return self._groups[key]

    def release(self) -> None:
        """Give the placement groups back. Call after their meshes have stopped."""
        import ray

        with self._lock:
            for group in self._groups.values():
                ray.util.remove_placement_group(group)
            self._groups.clear()


def ray_hosts(
    num_hosts: int = 1,
    *,
    strategy: Strategy = "SPREAD",
    cpus_per_proc: float = 1.0,
    gpus_per_proc: float = 0.0,
    address: str | None = None,
) -> tuple[HostMesh, RayHosts]:
    """Hosts of a Ray cluster.

    Args:
        num_hosts: Bundles per mesh; with the strategy STRICT_SPREAD as many nodes.
        strategy: Ray's placement strategy: STRICT_PACK keeps a mesh on one node, SPREAD distributes it.
        address: Of a running cluster; by default the one this process is connected to, or else a local one.

    Returns:
        The hosts, with the dimension `hosts` when there is more than one, and the handle that releases their places.

    Raises:
        RuntimeError: the runtime listens on `ipc://`, where no other host can reach it.
    """
    import ray

    if not this_node().me.address.startswith("tcp://"):
        raise RuntimeError("call vtriune.runtime.configure(bind=<this host's address>) before using Ray")
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    places = RayHosts(num_hosts, strategy, cpus_per_proc, gpus_per_proc)
    extent = Extent([], []) if num_hosts == 1 else Extent(["hosts"], [num_hosts])
    return HostMesh(extent, ["ray"] * num_hosts, places.launch), places
