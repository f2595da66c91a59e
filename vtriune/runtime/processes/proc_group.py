"""The processes of one mesh, shared by its slices: starting, failing, restarting, stopping. Used by `ProcMesh`.

A failure is told once: to pending calls as the error they end in, to other processes that may be calling, and to the
owner, which is the actor that spawned the mesh or else the root process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from vtriune.runtime import context, steps
from vtriune.runtime.bootstrap import Bootstrap, Ended, Moved, News, Ready, Report, SpawnRequest
from vtriune.runtime.future import Future
from vtriune.runtime.node import Node, shutdown
from vtriune.runtime.processes.local_process import Launch, WorkerProcess
from vtriune.runtime.shape import Extent
from vtriune.transport.errors import MeshFailure
from vtriune.transport.wire import Back, FailureNote, Gone, PeerRef

OnFailure = Callable[[MeshFailure], Any]
_FROZEN_EVERY_S = 0.5
_CLOSING_S = 10.0


def _end_the_run(failure: MeshFailure) -> None:
    """Report, close, end: whatever closing runs into. The children end with this process in any case."""
    last_resort = threading.Timer(_CLOSING_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    try:
        sys.stderr.write(f"\n{failure.report()}\nNobody handled this failure: the run ends.\n")
        sys.stderr.flush()
        shutdown()
    finally:
        os._exit(1)


FaultHook: TypeAlias = Callable[[MeshFailure], object]
_unhandled_fault_hook: FaultHook = _end_the_run


def set_unhandled_fault_hook(hook: FaultHook) -> None:
    """Replace what happens in the root process to a failure that no owner handles; by default it is reported and the run
    ends."""
    global _unhandled_fault_hook
    _unhandled_fault_hook = hook


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
    on_failure: OnFailure | None


class ProcGroup:
    """Owns the worker processes of one mesh. What it does on their news runs on the watcher's thread."""

    def __init__(self, node: Node, name: str, extent: Extent, options: ProcOptions, launch: Launch) -> None:
        self.node = node
        self.name = name
        self.extent = extent
        self._options = options
        self._launch = launch
        self._owner = context.current_actor()
        self._processes: list[WorkerProcess] = []
        self._actors: list[list[SpawnRequest]] = [[] for _ in range(extent.nelements)]
        self._restarts: list[float] = []
        self._changed = threading.Condition()
        self._launch_note: FailureNote | None = None
        self._is_up = False
        self._is_stopping = False
        self._stopped: Future[None] = Future(node.reactor)

    # ---- starting

    def start(self) -> list[PeerRef]:
        """Start all processes at once and wait for them.

        Raises MeshFailure: one did not start; the others have been told to stop.
        """
        self.node.watcher.at_close(self._end_now)
        unique = self.node.unique(self.name).replace("#", "-").replace("/", "-")
        sys_path = (os.getcwd(), *(path for path in sys.path if path))
        for rank in range(self.extent.nelements):
            node_name = f"{unique}-{rank}"
            address = self.node.address_for(node_name)
            where = self.name, rank, node_name, address, self.node.folder
            boot = Bootstrap(*where, self.node.limits, self.node.keys, sys_path)
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
        return self._launch(boot, options.env, log_path, self.on_news)

    def remember(self, rank: int, request: SpawnRequest) -> None:
        """An actor was spawned on this rank: a restarted process constructs it again."""
        self._actors[rank].append(request)

    def forget(self, actor_id: str) -> None:
        """That actor has been stopped."""
        self._actors = [[request for request in each if request.actor_id != actor_id] for each in self._actors]

    def on_news(self, process: WorkerProcess, news: News) -> None:
        """A process listens (for the first time or again), its work got further, something failed inside it, or it has ended."""
        title = f"{self.name}-{process.boot.rank}"
        match news:
            case Moved():
                steps.heard(title, news)
            case Report(note):
                self.deliver(MeshFailure(note), was_seen=False)
            case Ended(note):
                steps.ended(title)
                self._on_end(process, note)
            case Ready(peer):
                steps.heard(title, Moved("", "process", "has started", 0.0))
                with self._changed:
                    self._changed.notify_all()
                if process.boot.incarnation:
                    self.node.announce(Back(peer))

    # ---- failing

    def _on_end(self, process: WorkerProcess, note: FailureNote) -> None:
        """A process has ended: expected, at launch, or a failure."""
        if process.is_stopping or self._is_stopping:
            stopped = FailureNote(note.mesh, note.rank, note.host, note.pid, "stopped")
            self.node.announce(Gone(process.boot.node, stopped))
        elif not self._is_up:
            detail = note.detail or str(MeshFailure(note)).rpartition(") ")[2]
            self._launch_note = self._launch_note or msgspec.structs.replace(note, cause="launch", detail=detail)
        else:
            self._on_death(process, note)
        self._check_stopped()

    def _on_death(self, process: WorkerProcess, note: FailureNote) -> None:
        policy, now = self._options.restart, time.monotonic()
        delay_s = None if policy is None else policy.delay_s(self._restarts, now)
        note = msgspec.structs.replace(note, is_restarting=delay_s is not None)
        num_told = self.node.announce(Gone(process.boot.node, note))
        if delay_s is not None:
            self._restarts.append(now)
            self.node.watcher.do_later(delay_s, lambda: self._restart(process))
        self.deliver(MeshFailure(note), was_seen=num_told > 0)

    def _restart(self, old: WorkerProcess) -> None:
        if self._is_stopping:
            return
        rank, again = old.boot.rank, old.boot.incarnation + 1
        boot = msgspec.structs.replace(old.boot, incarnation=again, actors=tuple(self._actors[rank]))
        self._processes[rank] = self._start_one(boot)

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

        A failure that is being repaired goes to `on_failure` only; `__supervise__` and the fault hook are for those that are
        not.
        """
        on_failure = self._options.on_failure
        if on_failure is not None:
            on_failure(failure)
        if failure.is_restarting:
            return
        if self._owner is not None:
            self._owner.supervise(failure)
        elif on_failure is None and not was_seen:
            threading.Thread(target=lambda: _unhandled_fault_hook(failure), name="vtriune-fault").start()

    # ---- stopping

    def stop(self) -> Future[None]:
        """End every process: told to, then SIGKILL after the grace. Idempotent."""
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
