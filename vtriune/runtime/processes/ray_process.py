"""One worker process on a Ray node: the seat that runs there inside a Ray actor, and what stands for it here.

    this process                              │  the node
    RayProcess ── start, stop, kill ──────────┼─▶ Seat (Ray actor) ──▶ worker, the seat's child
        ◀──────── next: ready, report, end ───┼──┘

Used by `ray_launcher`. Ray carries msgpack bytes and the calls of the seat; messages go over our own sockets.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vtriune.runtime.bootstrap import Bootstrap, Ended, News, Ready, decode_bootstrap, decode_news
from vtriune.runtime.node import this_node
from vtriune.runtime.processes.local_process import LocalProcess, Tell
from vtriune.runtime.watcher import ProcessWatcher
from vtriune.transport.wire import FailureNote, PeerRef


class Seat:
    """Runs inside a Ray actor: one worker process on that node, as a child of Ray's."""

    def __init__(self) -> None:
        self._watcher = ProcessWatcher(lambda: None)
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._process: LocalProcess | None = None

    def node(self) -> str:
        """The node it runs on; Ray lets it answer once it has found it a place."""
        return f"{node_address()} (Ray node {ray_module().get_runtime_context().get_node_id()})"

    def start(self, bootstrap: bytes, env: dict[str, str], log_path: str) -> None:
        """Start the worker, listening on this node's address."""
        address = node_address()
        boot = msgspec.structs.replace(decode_bootstrap(bootstrap), address=f"tcp://{address}:0", folder="")
        path = Path(log_path) if log_path else None
        env = {**_interface(address), **env}
        self._process = LocalProcess(self._watcher, boot, env, path, lambda _, news: self._news.put(news))

    def next(self) -> bytes:
        """Block until there is news of the worker; as msgpack, since Ray carries bytes only."""
        return msgspec.msgpack.encode(self._news.get())

    def stop(self, grace_s: float) -> None:
        """Have it clean up and end, then SIGKILL."""
        if self._process is not None:
            self._process.stop(grace_s)

    def kill(self, cause: str) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill(cause)


def ray_module() -> Any:
    """Loaded when first used: the extra may not be installed. Untyped, as Ray is in places."""
    import ray

    return ray


def node_address() -> str:
    """The node's address as the cluster's other nodes know it."""
    return str(ray_module().util.get_node_ip_address())


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

    def __init__(self, seat: Any, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, tell: Tell) -> None:
        self.boot = boot
        self.peer: PeerRef | None = None
        self.has_ended = False
        self.is_stopping = False
        self._seat = seat
        self._tell = tell
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
        end = self._until_end(boot, env, log_path)
        # First the seat: the owner, once told of the end, may leave the cluster.
        if_joined(lambda: ray_module().kill(self._seat))
        self.has_ended = True
        self._watcher.do(functools.partial(self._tell, self, end))

    def _until_end(self, boot: bytes, env: dict[str, str], log_path: str) -> Ended:
        try:
            ray_module().get(self._seat.start.remote(boot, env, log_path))
            while True:
                news = decode_news(ray_module().get(self._seat.next.remote()))
                if isinstance(news, Ended):
                    return news
                if isinstance(news, Ready):
                    self.peer = news.peer
                self._watcher.do(functools.partial(self._tell, self, news))
        except Exception as error:
            # A lost node or seat, or this process has left the cluster, which Ray tells by any exception: it is gone.
            host, pid = ("", 0) if self.peer is None else (self.peer.host, self.peer.pid)
            detail = f"Ray lost its node or seat: {type(error).__name__}: {str(error)[:2000]}"
            return Ended(FailureNote(self.boot.mesh, self.boot.rank, host, pid, "unreachable", detail=detail))

    def stop(self, grace_s: float) -> None:
        """Have it clean up and end, and SIGKILL after the grace. Idempotent."""
        if not self.is_stopping:
            self.is_stopping = True
            if_joined(lambda: self._seat.stop.remote(grace_s))

    def kill(self, cause: str = "") -> None:
        """SIGKILL at once."""
        if_joined(lambda: self._seat.kill.remote(cause))

    def stopped_for_s(self) -> float:
        """0: libzmq's heartbeats tell a frozen worker on another host."""
        return 0.0


def if_joined(action: Callable[[], Any]) -> None:
    """Seats end with the connection; and a call after it would make Ray connect anew."""
    if ray_module().is_initialized():
        action()
