"""One clear account of what ended a run: on the terminal and in `failure.json`. Called by launch, once; the first failure wins.
Nothing here raises: what ended the run may be a full disk, and the account of it must come out all the same.
"""

import errno
import os
import shutil
import signal as signals
import socket
import tempfile
import traceback
from pathlib import Path

import msgspec

from vtriune import whole_files
from vtriune.runtime import MeshFailure

NUM_LOG_LINES = 12
RESUMES = "The same command resumes from the last complete checkpoint, if there is one."
DISK_IS_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


class Failure(msgspec.Struct, kw_only=True):
    """What `failure.json` holds. `rank`, `exit_code` and `signal` are None where they make no sense."""

    role: str
    rank: int | None = None
    host: str
    pid: int | None
    exit_code: int | None = None
    signal: str | None = None
    error: str
    traceback: str
    log_file: str | None = None
    last_log_lines: list[str] = []
    advice: str = RESUMES


def describe(error: BaseException, run_folder: Path) -> Failure:
    """The account of `error`; of a group of errors, the first."""
    cause = error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    shown = "".join(traceback.format_exception(cause))
    if not isinstance(cause, MeshFailure):
        # Of another process's error the first lines: the rest is its traceback.
        text = "".join(traceback.format_exception_only(cause)).partition("\n\nRemote traceback:")[0].strip()
        here = socket.gethostname(), os.getpid()
        return Failure(
            role="controller", host=here[0], pid=here[1], error=text, traceback=shown, advice=_advice(shown, run_folder)
        )
    log = run_folder / "logs" / f"{cause.mesh_name}-{cause.rank}.log"
    last_lines = _last_lines(log)
    return Failure(
        role=cause.mesh_name,
        rank=cause.rank,
        host=cause.host,
        pid=cause.pid,
        exit_code=cause.exit_code,
        signal=signals.Signals(cause.signal).name if cause.signal else None,
        error=str(cause).splitlines()[0],
        traceback=shown,
        log_file=str(log) if last_lines else None,
        last_log_lines=last_lines,
        advice=_advice("\n".join([shown, *last_lines]), run_folder),
    )


def write(failure: Failure, run_folder: Path) -> str:
    """Put it into `failure.json` in the run folder; returns where it is, or why it is not, in a sentence for the terminal."""
    path = run_folder / "failure.json"
    try:
        whole_files.write(path, msgspec.json.format(msgspec.json.encode(failure), indent=2))
    except Exception as error:
        # Any: a full or read-only disk, a text that is no Unicode; the terminal has the account already.
        end = "\n".join(failure.traceback.rstrip().splitlines()[-NUM_LOG_LINES:])
        return f"the full account could not be written to {path}: {error}; the end of its traceback:\n{end}"
    return f"full account: {path}"


def render(failure: Failure) -> str:
    """The block for the terminal."""
    place = failure.role + (f" {failure.rank}" if failure.rank is not None else "")
    pid = f", pid {failure.pid}" if failure.pid else ""
    log = [f"last lines of {failure.log_file}:"] if failure.log_file else []
    lines = [f"  | {line}" for line in failure.last_log_lines]
    head = [f"RUN FAILED in {place} on {failure.host}{pid}", failure.error]
    return "\n".join([*head, *log, *lines, failure.advice])


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LOG_LINES:]
    except OSError:
        return []


def _advice(shown: str, run_folder: Path) -> str:
    """What to do about it. A full disk may be that of the run or that of temporary files: the error seldom says."""
    found = next((text for text in DISK_IS_FULL if text in shown), None)
    if found is None:
        return RESUMES
    places = {"the run folder": run_folder, "temporary files": Path(tempfile.gettempdir())}
    told = "; ".join(f"{name} on the disk {_disk(place)}" for name, place in places.items())
    return f"{found}: {told}. Make room on the full one. {RESUMES}"


def _disk(path: Path) -> str:
    path = path.resolve()
    mounted = next(place for place in (path, *path.parents) if place.is_mount() or place == place.parent)
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return f"{mounted} ({error.strerror})"
    return f"{mounted} ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB free)"
