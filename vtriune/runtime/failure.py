"""Errors of the runtime: a remote exception as `ActorError`, a dead or broken process as `MeshFailure`.

Re-exported by `vtriune.runtime`. `unhandled_fault_hook` is what happens to a failure no owner handles.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeAlias

from vtriune.transport.errors import (
    CAUSES,
    BacklogFull,
    ConnectionLost,
    DeadlineExceeded,
    MeshFailure,
    MessageRefused,
)
from vtriune.transport.wire import ErrorNote, PeerRef

__all__ = [
    "CAUSES",
    "ActorError",
    "BacklogFull",
    "ConnectionLost",
    "DeadlineExceeded",
    "MeshFailure",
    "MessageRefused",
    "error_from_note",
    "note_from_error",
    "unhandled_fault_hook",
]

logger = logging.getLogger("vtriune.runtime")

_KIND_ACTOR, _KIND_REFUSED, _KIND_DEADLINE, _KIND_CANCELLED = "actor", "refused", "deadline", "cancelled"
_TRACEBACK_CHARACTERS = 1 << 16


class ActorError(Exception):
    """An endpoint (or an actor's constructor) raised. Its traceback is part of this error's text.

    `type_name` is the exception's full name, such as `builtins.ValueError`; `text` its message.
    """

    def __init__(self, where: str, type_name: str, text: str, remote_traceback: str) -> None:
        super().__init__(where, type_name, text, remote_traceback)
        self.where = where
        self.type_name = type_name
        self.text = text
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        name = self.type_name.removeprefix("builtins.")
        return f"{self.where} raised {name}: {self.text}\n\nRemote traceback:\n{self.remote_traceback}"


def note_from_error(error: BaseException) -> ErrorNote:
    """An exception as it travels."""
    if isinstance(error, asyncio.CancelledError):
        return ErrorNote(_KIND_CANCELLED, "asyncio.CancelledError", "cancelled", "")
    if isinstance(error, DeadlineExceeded):
        return ErrorNote(_KIND_DEADLINE, "vtriune.transport.errors.DeadlineExceeded", str(error)[:8192], "")
    if isinstance(error, MessageRefused):
        return ErrorNote(_KIND_REFUSED, "vtriune.transport.errors.MessageRefused", str(error)[:8192], "")
    name = f"{type(error).__module__}.{type(error).__qualname__}"[:256]
    lines = "".join(traceback.format_exception(error))
    if len(lines) > _TRACEBACK_CHARACTERS:
        lines = f"{lines[: _TRACEBACK_CHARACTERS // 2]}\n[...]\n{lines[-_TRACEBACK_CHARACTERS // 2 :]}"
    return ErrorNote(_KIND_ACTOR, name, str(error)[:8192], lines)


def error_from_note(note: ErrorNote, endpoint: str, peer: PeerRef) -> Exception:
    """The exception a caller sees for one that happened at `peer`."""
    where = f"{endpoint} at {peer}"
    if note.kind == _KIND_REFUSED:
        return MessageRefused(f"{where} refused the message: {note.text}")
    if note.kind == _KIND_DEADLINE:
        return DeadlineExceeded(f"{where}: {note.text}")
    if note.kind == _KIND_CANCELLED:
        return ActorError(where, note.type_name, "the endpoint's task was cancelled over there", note.traceback)
    return ActorError(where, note.type_name, note.text, note.traceback)


def _end_the_run(failure: MeshFailure) -> None:
    sys.stderr.write(f"\n{failure.report()}\nNobody handled this failure: the run ends.\n")
    sys.stderr.flush()
    from vtriune.runtime.node import shutdown

    shutdown()
    os._exit(1)


# Called in the root process with a failure that no owner handled. The default reports it and ends the run; assign
# another function to do otherwise.
FaultHook: TypeAlias = Callable[[MeshFailure], object]
unhandled_fault_hook: FaultHook = _end_the_run
