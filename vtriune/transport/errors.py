"""What a call can end in besides a value. Raised at callers by links; re-exported by `vtriune.runtime`."""

from __future__ import annotations

import signal as signals

from vtriune.transport.wire import FailureNote

# What is said of each cause, beside `exit` (ended by itself), `signal` (killed) and `oom` (killed for memory).
_CAUSES = {
    "frozen": "is frozen: stopped by a signal, neither dead nor answering",
    "unreachable": "cannot be reached",
    "constructor": "failed in its actor's constructor",
    "exception": "failed in an endpoint nobody awaits",
    "stopped": "has been stopped",
    "launch": "did not start",
}


class MeshFailure(RuntimeError):
    """A process or actor of a mesh has failed.

    Raised by every call that was waiting for it and by later ones; passed to its owner's `__supervise__`.

        mesh_name, rank, host    where: the process mesh's name is its role
        pid                      0 when it never started
        cause                    exit, signal, oom, frozen, unreachable, constructor, exception, stopped or launch
        exit_code, signal        of a process that ended by itself; the number of the signal that killed it
        is_restarting            its owner is bringing the process back
        log_tail, stacks         last lines of its log, Python stacks of its threads, where they could be had
    """

    def __init__(self, note: FailureNote) -> None:
        super().__init__(note)
        self.note = note
        self.mesh_name, self.rank, self.host, self.pid = note.mesh, note.rank, note.host, note.pid
        self.cause, self.exit_code, self.signal = note.cause, note.exit_code, note.signal
        self.is_restarting, self.log_tail, self.stacks = note.is_restarting, note.log_tail, note.stacks

    def __str__(self) -> str:
        note = self.note
        return f"{note.mesh} rank {note.rank} (host {note.host}, pid {note.pid}) {self._what()}"

    def _what(self) -> str:
        note = self.note
        if note.cause == "exit":
            what = f"ended with exit code {note.exit_code}"
        elif note.cause in ("signal", "oom"):
            name = signals.Signals(note.signal).name if note.signal in signals.valid_signals() else str(note.signal)
            what = f"was killed by {name}" + (" (out of memory)" if note.cause == "oom" else "")
        else:
            what = _CAUSES.get(note.cause, note.cause)
        if note.is_restarting:
            what += " and is being restarted"
        return f"{what}: {note.detail}" if note.detail else what

    def report(self) -> str:
        """The whole story in one block: what failed, where, how, and its last words."""
        lines = [f"MeshFailure: {self}"]
        if self.note.stacks:
            lines += ["stacks:", *(f"  {line}" for line in self.note.stacks.splitlines())]
        if self.note.log_tail:
            lines += ["last log lines:", *(f"  {line}" for line in self.note.log_tail)]
        return "\n".join(lines)


class ConnectionLost(ConnectionError):
    """The connection to a living process broke while this call was in flight; whether it ran is unknown."""


class DeadlineExceeded(TimeoutError):
    """The call's deadline passed; the callee has been told to stop working on it."""


class BacklogFull(RuntimeError):
    """Too many calls await a slow receiver and the caller cannot be blocked: await some of them first."""


class MessageRefused(TypeError):
    """The receiver could not accept the message: it does not fit the endpoint's annotations or a limit."""
