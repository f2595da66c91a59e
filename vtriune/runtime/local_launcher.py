"""Starts worker processes on this machine and watches them. Used by `spawn_procs`; runs on the watcher's thread."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from vtriune.runtime.watcher import Watcher, receive_note, send_note
from vtriune.runtime.worker import CONTROL_FD, Bootstrap, read_ready
from vtriune.transport.wire import FailureNote, PeerRef

_TAIL_LINES = 30
_TAIL_BYTES = 16384


class LocalProcess:
    """One worker process. Callbacks run on the watcher's thread."""

    def __init__(
        self,
        watcher: Watcher,
        bootstrap: Bootstrap,
        env: Mapping[str, str],
        log_path: Path | None,
        on_exit: Callable[[LocalProcess, int], None],
        on_report: Callable[[LocalProcess, FailureNote], None],
    ) -> None:
        self.bootstrap = bootstrap
        self.log_path = log_path
        self.peer: PeerRef | None = None
        self.pid = 0
        self.returncode: int | None = None
        self.is_stopping = False
        self.error = ""
        self.changed = threading.Event()
        self._watcher = watcher
        self._env = env
        self._on_exit = on_exit
        self._on_report = on_report
        watcher.do(self._start)

    def _start(self) -> None:
        try:
            self._launch()
        except OSError as error:
            self.error = f"cannot start a process: {error}"
            self.returncode = 127
            self.changed.set()
            self._on_exit(self, 127)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **self._env, CONTROL_FD: str(theirs.fileno())}
        log = None
        if self.log_path is not None:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            log = self.log_path.open("ab")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vtriune.runtime"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        finally:
            theirs.close()
            if log is not None:
                log.close()
        self.pid = self._process.pid
        self._control = ours
        self._pidfd = os.pidfd_open(self.pid)
        self._watcher.watch(self._pidfd, self._on_pidfd)
        self._watcher.watch(ours.fileno(), self._on_control)
        try:
            send_note(ours, self.bootstrap)
        except BrokenPipeError:
            # It died already; the pidfd tells the rest.
            return
        if self.is_stopping:
            self._signal(signal.SIGTERM)

    def _on_control(self) -> None:
        body = receive_note(self._control)
        if body is None:
            self._watcher.unwatch(self._control.fileno())
        elif self.peer is None:
            self.peer = read_ready(body)
            self.changed.set()
        else:
            self._on_report(self, msgspec.msgpack.decode(body, type=FailureNote))

    def _on_pidfd(self) -> None:
        returncode = self._process.wait()
        self._watcher.unwatch(self._pidfd)
        os.close(self._pidfd)
        try:
            self._watcher.unwatch(self._control.fileno())
        except KeyError:
            # Its end of file came first.
            self._drop_group()
        else:
            self._drop_group()
        self._control.close()
        self.returncode = returncode
        self.changed.set()
        self._on_exit(self, returncode)

    def _drop_group(self) -> None:
        """End helpers the worker left behind in its session."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. Idempotent."""
        if not self.is_stopping:
            self.is_stopping = True
            self._watcher.do(lambda: self._terminate(grace_s))

    def _terminate(self, grace_s: float) -> None:
        if self.returncode is None and self.pid:
            self._signal(signal.SIGTERM)
            # A stopped process receives SIGTERM only once it is continued.
            self._signal(signal.SIGCONT)
            self._watcher.do_later(grace_s, self.kill)

    def kill(self) -> None:
        """SIGKILL, at once."""
        if self.returncode is None and self.pid:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            # It has just ended; its pidfd will say so.
            return

    def log_tail(self) -> tuple[str, ...]:
        """Last lines of its log; empty when it writes to our own output."""
        if self.log_path is None or not self.log_path.exists():
            return ()
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        return tuple(deque(text.splitlines(), _TAIL_LINES))


def oom_kills() -> int:
    """How many processes the kernel has killed for memory since boot, on this machine, cgroups included."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        return 0
    return 0
