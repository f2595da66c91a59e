"""What a call can end in besides a value. Raised at callers by links; re-exported by `vtriune.runtime`."""

from __future__ import annotations

import signal as signals

from vtriune.transport.wire import FailureNote

# exit: ended by itself. signal: killed. oom: killed for memory. frozen: stopped, not dead. unreachable: no connection.
# constructor, exception: the process lives, its actor failed. stopped: ended by its owner. stalled: no progress.
CAUSES = ("exit", "signal", "oom", "frozen", "unreachable", "constructor", "exception", "stopped", "stalled", "launch")


class MeshFailure(RuntimeError):
    """A process or actor of a mesh has failed.

    Raised by every call that was waiting for it and by later ones; passed to its owner's `__supervise__`.
    """

    def __init__(self, note: FailureNote) -> None:
        super().__init__(note)
        self.note = note

    @property
    def mesh_name(self) -> str:
        """Name of the process mesh, which is its role."""
        return self.note.mesh

    @property
    def rank(self) -> int:
        """Rank within the mesh."""
        return self.note.rank

    @property
    def host(self) -> str:
        """Host the process ran on."""
        return self.note.host

    @property
    def pid(self) -> int:
        """Process id; 0 when it never started."""
        return self.note.pid

    @property
    def cause(self) -> str:
        """One of CAUSES."""
        return self.note.cause

    @property
    def exit_code(self) -> int | None:
        """Exit code, when it ended by itself."""
        return self.note.exit_code

    @property
    def signal(self) -> int | None:
        """Number of the signal that killed it."""
        return self.note.signal

    @property
    def log_tail(self) -> tuple[str, ...]:
        """Last lines of its log."""
        return self.note.log_tail

    @property
    def is_restarting(self) -> bool:
        """Whether its owner is bringing the process back."""
        return self.note.is_restarting

    @property
    def stacks(self) -> str:
        """Python stacks of its threads, where they could be had."""
        return self.note.stacks

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
            what = {
                "frozen": "is frozen: stopped by a signal, neither dead nor answering",
                "unreachable": "cannot be reached",
                "constructor": "failed in its actor's constructor",
                "exception": "failed in an endpoint nobody awaits",
                "stopped": "has been stopped",
                "stalled": "makes no progress",
                "launch": "did not start",
            }.get(note.cause, note.cause)
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
