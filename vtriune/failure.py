"""One clear account of what ended a run: on the terminal and in `failure.json`. Called by launch, once; the first failure wins."""

import os
import signal as signals
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vtriune.runtime import MeshFailure

NUM_LOG_LINES = 12


class Failure(msgspec.Struct):
    """What `failure.json` holds. `rank`, `exit_code` and `signal` are None where they make no sense."""

    role: str
    rank: int | None
    host: str
    pid: int | None
    exit_code: int | None
    signal: str | None
    error: str
    traceback: str
    log_file: str | None
    last_log_lines: list[str]
    advice: str


def describe(error: BaseException, logs: Path) -> Failure:
    """The account of `error`; of a group of errors, the first that is no mere cancellation."""
    cause = next(_leaves(error), error)
    role, rank, pid, host = "controller", None, os.getpid(), socket.gethostname()
    exit_code: int | None = None
    killed_by: str | None = None
    if isinstance(cause, MeshFailure):
        role, rank, pid, host = cause.mesh_name, cause.rank, cause.pid, cause.host
        exit_code = cause.exit_code
        killed_by = signals.Signals(cause.signal).name if cause.signal else None
    log_file = None if rank is None else logs / f"{role}-{rank}.log"
    has_log = log_file is not None and log_file.is_file()
    return Failure(
        role=role,
        rank=rank,
        host=host,
        pid=pid,
        exit_code=exit_code,
        signal=killed_by,
        error=str(cause).splitlines()[0] if isinstance(cause, MeshFailure) else f"{type(cause).__name__}: {cause}",
        traceback="".join(traceback.format_exception(cause)),
        log_file=str(log_file) if has_log else None,
        last_log_lines=log_file.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
        if log_file and has_log
        else [],
        advice="The same command resumes from the last complete checkpoint, if there is one.",
    )


def write(failure: Failure, run_folder: Path) -> Path:
    """`failure.json` in the run folder."""
    path = run_folder / "failure.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(failure), indent=2))
    return path


def render(failure: Failure, path: Path) -> str:
    """The block for the terminal."""
    place = failure.role + (f" {failure.rank}" if failure.rank is not None else "")
    head = [
        f"RUN FAILED in {place} on {failure.host}" + (f", pid {failure.pid}" if failure.pid else ""),
        failure.error,
    ]
    log = (
        [f"last lines of {failure.log_file}:", *(f"  | {line}" for line in failure.last_log_lines)]
        if failure.log_file
        else []
    )
    return "\n".join([*head, *log, f"full account: {path}", failure.advice])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
