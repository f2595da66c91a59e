"""Hosts and meshes of processes: where actors run. `this_host().spawn_procs(...)` is where every run begins."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from vtriune.runtime.actor import ActorReference
from vtriune.runtime.bootstrap import Bootstrap, SpawnRequest
from vtriune.runtime.class_path import class_path
from vtriune.runtime.future import CallFuture, Future, GatherFuture
from vtriune.runtime.mesh import ActorMesh, MeshRef
from vtriune.runtime.node import SYSTEM, this_node
from vtriune.runtime.processes.local_process import LocalProcess, Tell, WorkerProcess
from vtriune.runtime.processes.proc_group import OnFailure, ProcGroup, ProcOptions, RestartPolicy
from vtriune.runtime.shape import Extent, Shaped, ValueMesh
from vtriune.runtime.signature import Signature
from vtriune.transport import codec
from vtriune.transport.errors import MeshFailure
from vtriune.transport.wire import Call, FailureNote, Payload, PeerRef

A = TypeVar("A", bound=ActorReference)


class HostMesh(Shaped[str]):
    """Machines that processes can be started on: this one, unless a subclass launches them elsewhere."""

    def launch(self, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, tell: Tell) -> WorkerProcess:
        """Start one process."""
        return LocalProcess(this_node().watcher, boot, env, log_path, tell)

    def spawn_procs(
        self,
        per_host: Mapping[str, int] | None = None,
        *,
        name: str = "procs",
        env: Mapping[str, str] | None = None,
        log_folder: Path | None = None,
        on_failure: OnFailure | None = None,
        restart: RestartPolicy | None = None,
        frozen_after_s: float = 30.0,
        grace_s: float = 5.0,
        ready_s: float = 120.0,
    ) -> ProcMesh:
        """Start processes and wait until they can be called, about as long as Python takes to start.

        Args:
            per_host: Dimensions of processes on each host, such as `{"procs": 4}`; one process by default.
            name: The mesh's role in titles, logs and reports.
            env: Variables set in the processes beside this process's own.
            log_folder: Where each process writes its output, as `<name>-<rank>.log`; by default to our own output.
            on_failure: Called, on a thread of the runtime, with each failure, also of those being restarted
                (`MeshFailure.is_restarting`). Without it, a failure in the root process that ends no awaited call ends the
                run.
            restart: Bring failed processes back; by default none is.
            frozen_after_s: How long a process may be stopped (SIGSTOP) before it counts as failed and is killed.
            grace_s: How long `stop()` lets a process end by itself before SIGKILL.
            ready_s: How long the processes may take to start.

        Raises:
            MeshFailure: a process did not start.
        """
        dims = dict(per_host or {"procs": 1})
        extent = Extent([*self.extent.labels, *dims], [*self.extent.sizes, *dims.values()])
        options = ProcOptions(dict(env or {}), log_folder, grace_s, ready_s, frozen_after_s, restart, on_failure)
        group = ProcGroup(this_node(), name, extent, options, self.launch)
        return ProcMesh(extent, group.start(), group)


def this_host() -> HostMesh:
    """The machine this process runs on."""
    return HostMesh(Extent([], []), [os.uname().nodename])


class ProcMesh(Shaped[PeerRef]):
    """Running processes that actors can be spawned on."""

    def __init__(self, extent: Extent, elements: Sequence[PeerRef], group: ProcGroup) -> None:
        super().__init__(extent, elements)
        self._group = group

    @property
    def peers(self) -> tuple[PeerRef, ...]:
        """Node, address, host and pid of each process, in rank order."""
        return tuple(self._group.node.link(peer).peer for peer in self._elements)

    def spawn(self, name: str, actor_class: type[A], *args: Any, **kwargs: Any) -> A:
        """Construct one actor per process. Returns at once: calls made meanwhile wait for the constructor, and end in
        its error should it fail; `ActorMesh.initialized` waits for all constructors.

        The result is a mesh; it is typed as the actor's class so that its endpoints are known to editors.

        Raises TypeError: arguments that do not fit the constructor's annotations, or a class that cannot be imported.
        """
        path = class_path(actor_class)
        actor_id = self._group.node.unique(name)
        payload = _pack_constructor(actor_class, args, kwargs)
        frames = tuple(bytes(frame) for frame in payload.frames)
        spawned = []
        for rank, peer in enumerate(self._elements):
            request = SpawnRequest(
                actor_id, name, path, self._extent.labels, self._extent.sizes, rank,
                payload.body, frames, payload.blobs, len(args), tuple(kwargs),
            )  # fmt: skip
            self._group.remember(peer.rank, request)
            future = self._system_call(peer, "spawn", (request,))
            future.add_done_callback(functools.partial(self._on_spawned, name, peer))
            spawned.append(future)
        ref = MeshRef(name, actor_id, path, self._extent.labels, self._extent.sizes, self._elements)
        return cast("A", ActorMesh(ref, actor_class, spawned, lambda: self._stop_actor(actor_id)))

    def _system_call(self, peer: PeerRef, endpoint: str, values: tuple[Any, ...]) -> CallFuture[Any]:
        node = self._group.node
        node.reactor.attach_running_loop()
        link = node.link(peer)
        future: CallFuture[Any] = CallFuture(node.reactor, endpoint, peer, codec.UNTYPED_RESULT, link)
        payload = codec.pack(values)
        call = Call(0, SYSTEM, endpoint, msgspec.Raw(payload.body), len(values), (), payload.blobs)
        future.call_id = link.submit(call, payload, future)
        return future

    def _on_spawned(self, name: str, peer: PeerRef, done: Future[Any]) -> None:
        done.mark_seen()
        error = done._error
        if error is None or isinstance(error, MeshFailure):
            return
        note = FailureNote.of(peer, "constructor", f"{name}: {error}"[:8192])
        # Calls to the actor end in the constructor's error, so a failure nobody else handles is not unseen.
        self._group.node.watcher.do(lambda: self._group.deliver(MeshFailure(note), was_seen=True))

    def _stop_actor(self, actor_id: str) -> Future[None]:
        self._group.forget(actor_id)
        parts = [self._system_call(peer, "stop", (actor_id,)) for peer in self._elements]
        return cast("Future[None]", GatherFuture(self._group.node.reactor, self._extent, parts))

    def stacks(self) -> Future[ValueMesh[str]]:
        """Python stacks of every process, on whichever host. A process whose loop is blocked does not answer; on this
        host `vtriune.runtime.stacks.collect` gets those too."""
        parts: list[CallFuture[str]] = [self._system_call(peer, "stacks", ()) for peer in self._elements]
        return GatherFuture(self._group.node.reactor, self._extent, parts)

    def stop(self) -> Future[None]:
        """End every process of the mesh: actors' `__cleanup__`, then SIGKILL. Starts at once; the future is
        done when all have ended. Idempotent."""
        return self._group.stop()


def _pack_constructor(actor_class: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
    try:
        return Signature(actor_class.__init__).arguments(len(args), tuple(kwargs)).pack((*args, *kwargs.values()))
    except TypeError as error:
        raise TypeError(f"{actor_class.__qualname__}: {error}") from None
