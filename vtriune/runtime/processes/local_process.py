"""Starts worker processes on this machine and watches them. Used by `spawn_procs`; runs on the watcher's thread.

A `WorkerProcess` is what a launcher gives a mesh: another launcher (such as Ray's) gives the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec

from vtriune.runtime import bootstrap as control_channel
from vtriune.runtime import stacks
from vtriune.runtime.bootstrap import CONTROL_FD, Bootstrap, Ended, News, Ready, Stop
from vtriune.runtime.watcher import ProcessWatcher
from vtriune.transport.wire import FailureNote, PeerRef

_TAIL_LINES = 30
_TAIL_BYTES = 16384
# Logs, and files that libraries open without a word on their encoding (torch does), are UTF-8 whatever the terminal is.
_TEXT = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:replace"}
# The kernel counts a kill before it happens; freeing what a large process held can take seconds.
_OOM_WITHIN_S = 10.0


class WorkerProcess(Protocol):
    """A worker process, wherever it runs."""

    boot: Bootstrap
    peer: PeerRef | None
    has_ended: bool
    is_stopping: bool

    def stop(self, grace_s: float) -> None:
        """Have it clean up and end, and SIGKILL after the grace. Idempotent."""
        ...

    def kill(self, cause: str = "") -> None:
        """SIGKILL at once; `cause` is then reported in place of the signal."""
        ...

    def stopped_for_s(self) -> float:
        """How long it has been in the stopped state (SIGSTOP); 0 when it is not, or where that cannot be seen."""
        ...


Tell: TypeAlias = Callable[[WorkerProcess, News], None]
"""How the owner of a worker process gets its news, on the watcher's thread; `WorkerProcess.peer` is set before it is told `Ready`."""
Launch: TypeAlias = Callable[[Bootstrap, Mapping[str, str], Path | None, Tell], WorkerProcess]


class LocalProcess:
    """One worker process on this machine."""

    def __init__(
        self, watcher: ProcessWatcher, boot: Bootstrap, env: Mapping[str, str], log_path: Path | None, tell: Tell
    ) -> None:
        self.boot = msgspec.structs.replace(boot, parent_pid=os.getpid())
        self.peer: PeerRef | None = None
        self.has_ended = False
        self.is_stopping = False
        self._pid = 0
        self._watcher = watcher
        self._env = env
        self._log_path = log_path
        self._tell = tell
        self._kill_cause = ""
        self._stopped_since = 0.0
        watcher.do(self._start)

    def _start(self) -> None:
        try:
            self._launch()
        except OSError as error:
            self._end(self._note("launch", detail=f"cannot start a process: {error}"))

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        env = {**os.environ, **_TEXT, **self._env, CONTROL_FD: str(theirs.fileno())}
        log = None
        if self._log_path is not None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            log = self._log_path.open("ab")
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
        self._pid = self._process.pid
        self._control = ours
        self._pidfd = os.pidfd_open(self._pid)
        self._watcher.memory_kills.watch(self._pid)
        self._watcher.watch(self._pidfd, self._on_pidfd)
        self._watcher.watch(ours.fileno(), self._on_control)
        try:
            control_channel.send(ours, self.boot)
        except BrokenPipeError:
            # It died already; the pidfd tells the rest.
            return
        if self.is_stopping:
            self.kill()

    # ---- what it says, and its end

    def _on_control(self) -> None:
        body = control_channel.receive(self._control)
        if body is None:
            self._watcher.unwatch(self._control.fileno())
            return
        message = control_channel.decode_news(body)
        if isinstance(message, Ready):
            self.peer = message.peer
        self._tell(self, message)

    def _on_pidfd(self) -> None:
        returncode = self._process.wait()
        self._watcher.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._watcher.unwatch(self._control.fileno())
        self._control.close()
        self._end_session()
        self._remove_files()
        if self._kill_cause:
            note = self._note(self._kill_cause, signal_number=-returncode if returncode < 0 else None)
        elif returncode >= 0:
            note = self._note("exit", exit_code=returncode)
        else:
            is_oom = -returncode == signal.SIGKILL and self._watcher.memory_kills.has_risen(self._pid, _OOM_WITHIN_S)
            note = self._note("oom" if is_oom else "signal", signal_number=-returncode)
        self._watcher.memory_kills.forget(self._pid)
        self._end(note)

    def _end(self, note: FailureNote) -> None:
        self.has_ended = True
        self._tell(self, Ended(note))

    def _remove_files(self) -> None:
        """What a killed process could not remove itself: its socket, its stacks."""
        if self.boot.address.startswith("ipc://"):
            Path(self.boot.address.removeprefix("ipc://")).unlink(missing_ok=True)
        if self.boot.folder:
            (Path(self.boot.folder) / f"{self._pid}.stacks").unlink(missing_ok=True)

    def _end_session(self) -> None:
        """End helpers the worker left behind in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def _note(
        self, cause: str, detail: str = "", exit_code: int | None = None, signal_number: int | None = None
    ) -> FailureNote:
        where = self.boot.mesh, self.boot.rank, os.uname().nodename, self._pid
        return FailureNote(*where, cause, exit_code, signal_number, detail, self.log_tail())

    # ---- what is done to it

    def stop(self, grace_s: float) -> None:
        """Have it clean up and end, and SIGKILL after `grace_s`; at once while it has no actor yet. Idempotent."""
        if not self.is_stopping:
            self.is_stopping = True
            self._watcher.do(lambda: self._terminate(grace_s))

    def _terminate(self, grace_s: float) -> None:
        if not self.has_ended and self._pid:
            if self.peer is None:
                self.kill()
            with contextlib.suppress(OSError):  # It may just have ended; its pidfd has said so or will.
                control_channel.send(self._control, Stop())
            # One stopped by a signal hears of it only once it is continued.
            self._signal(signal.SIGCONT)
            self._watcher.do_later(grace_s, self.kill)

    def kill(self, cause: str = "") -> None:
        """SIGKILL, at once."""
        if not self.has_ended and self._pid:
            self._kill_cause = self._kill_cause or cause
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # It may just have ended; its pidfd has said so or will.
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, number)

    def stopped_for_s(self) -> float:
        """Seconds in the stopped state, as far as the calls of this method have seen it."""
        if self.has_ended or not self._pid or stacks.state(self._pid) not in ("stopped", "tracing-stop"):
            self._stopped_since = 0.0
            return 0.0
        self._stopped_since = self._stopped_since or time.monotonic()
        return time.monotonic() - self._stopped_since

    def log_tail(self) -> tuple[str, ...]:
        """Last lines of its log; empty when it writes to our own output."""
        if self._log_path is None or not self._log_path.exists():
            return ()
        with self._log_path.open("rb") as log:
            log.seek(max(0, self._log_path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        return tuple(deque(text.splitlines(), _TAIL_LINES))
