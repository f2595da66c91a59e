"""Hosts and meshes of processes: where actors run. `this_host().spawn_procs(...)` is where every run begins."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from vtriune.runtime import context
from vtriune.runtime import failure as failures
from vtriune.runtime.actor import Actor, Signature, class_path
from vtriune.runtime.future import CallFuture, Future
from vtriune.runtime.hosting import SpawnRequest
from vtriune.runtime.local_launcher import LocalProcess, oom_kills
from vtriune.runtime.mesh import ActorMesh
from vtriune.runtime.node import SYSTEM, Node, this_node
from vtriune.runtime.shape import Extent, Shaped
from vtriune.runtime.watcher import exit_note
from vtriune.runtime.worker import Bootstrap
from vtriune.transport import codec
from vtriune.transport.errors import MeshFailure
from vtriune.transport.wire import FailureNote, PeerRef

A = TypeVar("A", bound=Actor)
OnFailure = Callable[[MeshFailure], Any]

_VOID = codec.Schema(("result",), (None,))


class HostMesh(Shaped[str]):
    """Machines that processes can be started on."""

    def spawn_procs(
        self,
        per_host: Mapping[str, int] | None = None,
        *,
        name: str = "procs",
        env: Mapping[str, str] | None = None,
        log_folder: Path | None = None,
        on_failure: OnFailure | None = None,
        grace_s: float = 5.0,
        ready_s: float = 120.0,
    ) -> ProcMesh:
        """Start processes and wait until they can be called, about as long as Python takes to start.

        Args:
            per_host: Dimensions of processes on each host, such as `{"procs": 4}`; one process by default.
            name: The mesh's role in titles, logs and reports.
            env: Variables set in the processes beside this process's own.
            log_folder: Where each process writes its output, as `<name>-<rank>.log`; by default to our own output.
            on_failure: Called, on a thread of the runtime, with each failure. Without it (and without `failure()`)
                failures in the root process that fail no awaited call end the run.
            grace_s: How long `stop()` lets a process end by itself before SIGKILL.
            ready_s: How long a process may take to start.

        Raises:
            MeshFailure: a process did not start.
        """
        dims = dict(per_host or {"procs": 1})
        extent = Extent([*self.extent.labels, *dims], [*self.extent.sizes, *dims.values()])
        group = ProcGroup(this_node(), name, extent, dict(env or {}), log_folder, on_failure, grace_s)
        peers = group.start(ready_s)
        return ProcMesh(extent, peers, group)


def this_host() -> HostMesh:
    """The machine this process runs on."""
    return HostMesh(Extent([], []), [os.uname().nodename])


class ProcGroup:
    """The processes of one mesh, shared by its slices: starting, failing, stopping."""

    def __init__(
        self,
        node: Node,
        name: str,
        extent: Extent,
        env: Mapping[str, str],
        log_folder: Path | None,
        on_failure: OnFailure | None,
        grace_s: float,
    ) -> None:
        self.node = node
        self.name = name
        self.extent = extent
        self._env = env
        self._log_folder = log_folder
        self._owner = context.current_host()
        self._callbacks: list[OnFailure] = [on_failure] if on_failure is not None else []
        self._first_failure: Future[MeshFailure] | None = None
        self._failure: MeshFailure | None = None
        self._grace_s = grace_s
        self._processes: list[LocalProcess] = []
        self._stopped: Future[None] = Future(node.reactor)
        self._is_stopping = False
        self._oom_kills = oom_kills()

    def start(self, ready_s: float) -> list[PeerRef]:
        """Start all processes at once and wait for them."""
        unique = self.node.unique(self.name).replace("#", "-").replace("/", "-")
        sys_path = (os.getcwd(), *(path for path in sys.path if path))
        for rank in range(self.extent.nelements):
            bootstrap = Bootstrap(
                self.name, rank, f"{unique}-{rank}", self.node.folder, self.node.limits, os.getpid(), sys_path
            )
            log_path = None if self._log_folder is None else Path(self._log_folder) / f"{self.name}-{rank}.log"
            self._processes.append(
                LocalProcess(self.node.watcher, bootstrap, self._env, log_path, self._on_exit, self._on_report)
            )
        self.node.watcher.on_close(self._end_now)
        end = time.monotonic() + ready_s
        for process in self._processes:
            process.changed.wait(max(0.0, end - time.monotonic()))
            if process.peer is None:
                note = self._note(process, process.returncode if process.returncode is not None else 0)
                detail = process.error or (
                    f"it ended with code {process.returncode}"
                    if process.returncode is not None
                    else f"not ready in {ready_s} s"
                )
                self.stop().get() if not self.node.reactor.runs_in_this_thread() else self.stop()
                raise MeshFailure(
                    FailureNote(
                        note.mesh, note.rank, note.host, note.pid, "launch", detail=detail, log_tail=note.log_tail
                    )
                )
        return [cast("PeerRef", process.peer) for process in self._processes]

    def _note(self, process: LocalProcess, returncode: int) -> FailureNote:
        is_oom = oom_kills() > self._oom_kills
        host = os.uname().nodename
        rank = process.bootstrap.rank
        return exit_note(self.name, rank, host, process.pid, returncode, is_oom, process.log_tail())

    # ---- failing

    def _on_exit(self, process: LocalProcess, returncode: int) -> None:
        is_expected = process.is_stopping or process.peer is None
        note = self._note(process, returncode)
        if is_expected:
            note = FailureNote(note.mesh, note.rank, note.host, note.pid, "stopped")
        failure = MeshFailure(note)
        num_told = self.node.peer_gone(process.bootstrap.node, failure, tell=not is_expected)
        if not is_expected:
            self.deliver(failure, was_seen=num_told > 0)
        if self._is_stopping and all(each.returncode is not None for each in self._processes):
            self._stopped._settle()

    def _on_report(self, process: LocalProcess, note: FailureNote) -> None:
        self.deliver(MeshFailure(note), was_seen=False)

    def deliver(self, failure: MeshFailure, *, was_seen: bool) -> None:
        """Tell the owner. `was_seen`: an awaited call has already ended in this failure."""
        with self.node.reactor.lock:
            if self._failure is None:
                self._failure = failure
            first, callbacks = self._first_failure, list(self._callbacks)
        if self._owner is not None:
            self._owner.supervise(failure)
            return
        if first is not None:
            first._settle(failure)
        for callback in callbacks:
            callback(failure)
        if first is None and not callbacks and not was_seen:
            failures.unhandled_fault_hook(failure)

    def failure(self) -> Future[MeshFailure]:
        """Done when a process or actor of this mesh fails, or has failed; its value is the first failure."""
        with self.node.reactor.lock:
            if self._first_failure is None:
                self._first_failure = Future(self.node.reactor)
                if self._failure is not None:
                    self._first_failure._settle(self._failure)
            return self._first_failure

    def on_failure(self, callback: OnFailure) -> None:
        """Add a callback for every later failure."""
        with self.node.reactor.lock:
            self._callbacks.append(callback)

    # ---- stopping

    def stop(self) -> Future[None]:
        """End every process: SIGTERM, then SIGKILL after the grace. Idempotent."""
        if not self._is_stopping:
            self._is_stopping = True
            for process in self._processes:
                process.stop(self._grace_s)
            self.node.watcher.do(self._check_stopped)
        return self._stopped

    def _check_stopped(self) -> None:
        if all(process.returncode is not None for process in self._processes):
            self._stopped._settle()

    def _end_now(self) -> None:
        """At exit of this process: the same within a bounded time, without the watcher's help."""
        self.stop()
        end = time.monotonic() + self._grace_s
        for process in self._processes:
            while process.returncode is None and time.monotonic() < end:
                process.changed.clear()
                process.changed.wait(0.02)
            process.kill()


class ProcMesh(Shaped[PeerRef]):
    """Running processes that actors can be spawned on."""

    def __init__(self, extent: Extent, elements: Sequence[PeerRef], group: ProcGroup) -> None:
        super().__init__(extent, elements)
        self._group = group

    def _with_shape(self, extent: Extent, elements: Sequence[PeerRef]) -> ProcMesh:
        return ProcMesh(extent, elements, self._group)

    @property
    def name(self) -> str:
        """The mesh's role."""
        return self._group.name

    @property
    def peers(self) -> tuple[PeerRef, ...]:
        """Node, address, host and pid of each process, in rank order."""
        return self._elements

    def spawn(self, name: str, actor_class: type[A], *args: Any, **kwargs: Any) -> A:
        """Construct one actor per process. Returns at once: calls made meanwhile wait for the constructor, and end in
        its error should it fail; `mesh.initialized` waits for all constructors.

        The result is a mesh; it is typed as the actor's class so that its endpoints are known to editors.

        Raises:
            TypeError: arguments that do not fit the constructor's annotations, or a class that cannot be imported.
        """
        node = self._group.node
        path = class_path(actor_class)
        actor_id = node.unique(name)
        payload = self._pack_constructor(actor_class, args, kwargs)
        frames = tuple(bytes(frame) for frame in payload.frames)
        spawned = []
        for rank, peer in enumerate(self._elements):
            request = SpawnRequest(
                actor_id, name, path, self._extent.labels, self._extent.sizes, rank,
                payload.body, frames, payload.blobs, len(args), tuple(kwargs),
            )  # fmt: skip
            future = self._system_call(peer, "spawn", (request,))
            future.add_done_callback(functools.partial(self._on_spawned, name, peer))
            spawned.append(future)
        mesh: ActorMesh[A] = ActorMesh(
            self._extent,
            self._elements,
            name=name,
            actor_id=actor_id,
            class_path=path,
            actor_class=actor_class,
            spawned=spawned,
            stop=lambda reason: self._stop_actor(actor_id),
        )
        return cast("A", mesh)

    def _pack_constructor(
        self, actor_class: type[Actor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> codec.Payload:
        values = (*args, *kwargs.values())
        if actor_class.__init__ is object.__init__:
            if values:
                raise TypeError(f"{actor_class.__qualname__}() takes no arguments")
        else:
            try:
                Signature(actor_class.__init__).arguments(len(args), tuple(kwargs)).check(values)
            except TypeError as error:
                raise TypeError(f"{actor_class.__qualname__}: {error}") from None
        return codec.pack(values)

    def _system_call(self, peer: PeerRef, endpoint: str, values: tuple[Any, ...]) -> CallFuture[Any]:
        node = self._group.node
        node.reactor.attach_running_loop()
        link = node.link(peer)
        future: CallFuture[Any] = CallFuture(node.reactor, endpoint, peer, codec.UNTYPED_RESULT)
        future.bind(link, link.submit(SYSTEM, endpoint, codec.pack(values), len(values), (), future))
        return future

    def _on_spawned(self, name: str, peer: PeerRef, done: Future[Any]) -> None:
        error = done._error
        if error is None or isinstance(error, MeshFailure):
            return
        note = FailureNote(peer.mesh, peer.rank, peer.host, peer.pid, "constructor", detail=f"{name}: {error}"[:8192])
        # Calls to the actor end in the constructor's error, so a failure nobody else handles is not unseen.
        self._group.node.watcher.do(lambda: self._group.deliver(MeshFailure(note), was_seen=True))

    def _stop_actor(self, actor_id: str) -> Future[None]:
        from vtriune.runtime.future import GatherFuture

        parts = [self._system_call(peer, "stop", (actor_id,)) for peer in self._elements]
        return cast("Future[None]", GatherFuture(self._group.node.reactor, self._extent, parts))

    def stacks(self) -> Future[Any]:
        """Python stacks of every process, as a ValueMesh of text. A process whose loop is blocked does not answer."""
        from vtriune.runtime.future import GatherFuture

        return GatherFuture(
            self._group.node.reactor, self._extent, [self._system_call(peer, "stacks", ()) for peer in self._elements]
        )

    def failure(self) -> Future[MeshFailure]:
        """Done when a process or actor of this mesh fails; its value is the first failure."""
        return self._group.failure()

    def on_failure(self, callback: OnFailure) -> None:
        """Have `callback(failure)` called, on a thread of the runtime, with every later failure."""
        self._group.on_failure(callback)

    def stop(self, reason: str = "") -> Future[None]:
        """End every process of the mesh: actors' `__cleanup__`, SIGTERM, then SIGKILL. Starts at once; the future is
        done when all have ended. Idempotent."""
        return self._group.stop()
