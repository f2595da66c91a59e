"""The processes of one mesh, shared by its slices: starting, failing, restarting, stopping. Used by `ProcMesh`.

A failure is told once: to pending calls as the error they end in, to other processes that may be calling, and to the
owner, which is the actor that spawned the mesh or else the root process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vtriune.runtime import context
from vtriune.runtime import failure as failures
from vtriune.runtime.bootstrap import Bootstrap, SpawnRequest
from vtriune.runtime.future import Future
from vtriune.runtime.local_launcher import Launch, LocalProcess, WorkerProcess
from vtriune.runtime.node import Node
from vtriune.runtime.shape import Extent
from vtriune.transport.errors import MeshFailure
from vtriune.transport.wire import FailureNote, PeerRef

OnFailure = Callable[[MeshFailure], Any]
_FROZEN_EVERY_S = 0.5


class RestartPolicy(msgspec.Struct, frozen=True):
    """Bring a failed process back, with its actors constructed anew, at most `num_restarts` times in `window_s` over
    the whole mesh; the n-th restart in the window waits `backoff_s * 2^(n-1)`, at most `max_backoff_s`."""

    num_restarts: int = 3
    window_s: float = 3600.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def delay_s(self, earlier: Sequence[float], now: float) -> float | None:
        """Seconds to wait before one more restart, given the times of earlier ones; None when the budget is spent."""
        num_recent = sum(now - when <= self.window_s for when in earlier)
        if num_recent >= self.num_restarts:
            return None
        return float(min(self.max_backoff_s, self.backoff_s * 2**num_recent))


class ProcOptions(msgspec.Struct, frozen=True):
    """How the processes of a mesh are run; see `HostMesh.spawn_procs`."""

    env: dict[str, str]
    log_folder: Path | None
    grace_s: float
    ready_s: float
    frozen_after_s: float
    restart: RestartPolicy | None


class ProcGroup:
    """Owns the worker processes of one mesh. What `Events` asks for runs on the watcher's thread."""

    def __init__(
        self,
        node: Node,
        name: str,
        extent: Extent,
        options: ProcOptions,
        launch: Launch | None,
        on_failure: OnFailure | None,
    ) -> None:
        self.node = node
        self.name = name
        self.extent = extent
        self._options = options
        self._launch = launch or self._launch_locally
        self._owner = context.current_host()
        self._callbacks: list[OnFailure] = [on_failure] if on_failure is not None else []
        self._first_failure: Future[MeshFailure] | None = None
        self._failure: MeshFailure | None = None
        self._processes: list[WorkerProcess] = []
        self._actors: list[list[SpawnRequest]] = [[] for _ in range(extent.nelements)]
        self._restarts: list[float] = []
        self._changed = threading.Condition()
        self._launch_note: FailureNote | None = None
        self._is_up = False
        self._is_stopping = False
        self._stopped: Future[None] = Future(node.reactor)

    def _launch_locally(
        self, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, events: Any
    ) -> WorkerProcess:
        return LocalProcess(self.node.watcher, boot, env, log_path, events)

    # ---- starting

    def start(self) -> list[PeerRef]:
        """Start all processes at once and wait for them.

        Raises:
            MeshFailure: one did not start; the others have been told to stop.
        """
        self.node.watcher.at_close(self._end_now)
        unique = self.node.unique(self.name).replace("#", "-").replace("/", "-")
        sys_path = (os.getcwd(), *(path for path in sys.path if path))
        for rank in range(self.extent.nelements):
            node_name = f"{unique}-{rank}"
            address = self.node.address_for(node_name)
            boot = Bootstrap(
                self.name, rank, node_name, address, self.node.folder, self.node.limits, self.node.keys, sys_path
            )  # fmt: skip
            self.node.on_unreachable[node_name] = self._on_unreachable
            self._processes.append(self._start_one(boot))
        with self._changed:
            is_up = self._changed.wait_for(self._are_all_ready, self._options.ready_s)
        if not is_up or self._launch_note is not None:
            self.stop()
            late = next((process for process in self._processes if process.peer is None), self._processes[0])
            detail = f"not ready within {self._options.ready_s:g} s"
            note = self._launch_note or FailureNote(self.name, late.boot.rank, "", 0, "launch", detail=detail)
            raise MeshFailure(note)
        self._is_up = True
        self.node.watcher.do(self._watch_frozen)
        return [process.peer for process in self._processes if process.peer is not None]

    def _are_all_ready(self) -> bool:
        return self._launch_note is not None or all(process.peer is not None for process in self._processes)

    def _start_one(self, boot: Bootstrap) -> WorkerProcess:
        options = self._options
        log_path = None if options.log_folder is None else Path(options.log_folder) / f"{self.name}-{boot.rank}.log"
        return self._launch(boot, options.env, log_path, self)

    def remember(self, rank: int, request: SpawnRequest) -> None:
        """An actor was spawned on this rank: a restarted process constructs it again."""
        self._actors[rank].append(request)

    def forget(self, actor_id: str) -> None:
        """That actor has been stopped."""
        self._actors = [[request for request in each if request.actor_id != actor_id] for each in self._actors]

    def on_ready(self, process: WorkerProcess) -> None:
        """A process listens, for the first time or again."""
        with self._changed:
            self._changed.notify_all()
        if process.boot.incarnation and process.peer is not None:
            self.node.peer_back(process.peer, tell=True)

    # ---- failing

    def on_exit(self, process: WorkerProcess, note: FailureNote) -> None:
        """A process has ended: expected, at launch, or a failure."""
        if process.is_stopping or self._is_stopping:
            self.node.peer_gone(process.boot.node, MeshFailure(_stopped(note)), tell=True)
        elif not self._is_up:
            with self._changed:
                self._launch_note = self._launch_note or msgspec.structs.replace(
                    note, cause="launch", detail=note.detail or str(MeshFailure(note)).rpartition(") ")[2]
                )
                self._changed.notify_all()
        else:
            self._on_death(process, note)
        self._check_stopped()

    def _on_death(self, process: WorkerProcess, note: FailureNote) -> None:
        delay_s = self._restart_delay_s()
        failure = MeshFailure(note if delay_s is None else msgspec.structs.replace(note, is_restarting=True))
        is_restarting = delay_s is not None
        num_told = self.node.peer_gone(process.boot.node, failure, tell=True, is_restarting=is_restarting)
        if delay_s is not None:
            self.node.watcher.do_later(delay_s, lambda: self._restart(process))
        self.deliver(failure, was_seen=num_told > 0)

    def _restart_delay_s(self) -> float | None:
        """How long to wait before the next restart; None when there is no policy or its budget is spent."""
        policy, now = self._options.restart, time.monotonic()
        delay_s = None if policy is None else policy.delay_s(self._restarts, now)
        if policy is not None and delay_s is not None:
            self._restarts = [*(when for when in self._restarts if now - when <= policy.window_s), now]
        return delay_s

    def _restart(self, old: WorkerProcess) -> None:
        if self._is_stopping:
            return
        rank = old.boot.rank
        boot = msgspec.structs.replace(
            old.boot, incarnation=old.boot.incarnation + 1, actors=tuple(self._actors[rank])
        )  # fmt: skip
        self._processes[rank] = self._start_one(boot)

    def on_report(self, process: WorkerProcess, note: FailureNote) -> None:
        """Something failed inside a living process."""
        self.deliver(MeshFailure(note), was_seen=False)

    def _on_unreachable(self, failure: MeshFailure) -> None:
        """No heartbeat, no connection, yet it has not ended: end it; its end is then told as a freeze."""
        for process in self._processes:
            if process.boot.rank == failure.rank and not process.has_ended and not process.is_stopping:
                process.kill("frozen")

    def _watch_frozen(self) -> None:
        if self._is_stopping:
            return
        for process in self._processes:
            if process.stopped_for_s() > self._options.frozen_after_s:
                process.kill("frozen")
        self.node.watcher.do_later(_FROZEN_EVERY_S, self._watch_frozen)

    def deliver(self, failure: MeshFailure, *, was_seen: bool) -> None:
        """Tell the owner. `was_seen`: an awaited call has ended in this failure, or will.

        A failure that is being repaired goes to the callbacks only; `failure()`, `__supervise__` and the fault hook
        are for those that are not.
        """
        is_final = not failure.is_restarting
        with self.node.reactor.lock:
            if self._failure is None and is_final:
                self._failure = failure
            first, callbacks = self._first_failure, list(self._callbacks)
        for callback in callbacks:
            callback(failure)
        if not is_final:
            return
        if self._owner is not None:
            self._owner.supervise(failure)
        elif first is not None:
            first._settle(failure)
        elif not callbacks and not was_seen:
            threading.Thread(target=lambda: failures.unhandled_fault_hook(failure), name="vtriune-fault").start()

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
                process.stop(self._options.grace_s)
            self.node.watcher.do(self._check_stopped)
        return self._stopped

    def _check_stopped(self) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._is_stopping and self._have_all_ended():
            self._stopped._settle()

    def _have_all_ended(self) -> bool:
        return all(process.has_ended for process in self._processes)

    def _end_now(self) -> None:
        """At exit of this process: the same, waited for."""
        self.stop()
        with self._changed:
            if not self._changed.wait_for(self._have_all_ended, self._options.grace_s + 1.0):
                for process in self._processes:
                    process.kill()
                self._changed.wait_for(self._have_all_ended, 5.0)


def _stopped(note: FailureNote) -> FailureNote:
    return FailureNote(note.mesh, note.rank, note.host, note.pid, "stopped")
