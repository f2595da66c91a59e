"""Python stacks of running processes, also of those whose loop or interpreter lock is stuck.

A worker registers with faulthandler, whose handler runs in C: on SIGUSR1 it writes all stacks to a file beside the
run's sockets. Used by the progress watchdog and by reports of frozen processes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

_WAIT_S = 2.0
_SETTLE_S = 0.05
TITLE = "vtriune "


def register(folder: str) -> None:
    """Answer SIGUSR1 with all stacks, in a file named after this process."""
    # Opened once and kept: the handler may not open files. Removed with the socket folder.
    stream = (Path(folder) / f"{os.getpid()}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)


def own_stacks() -> str:
    """Stacks of all threads of this process, newest call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)


def collect(folder: str) -> dict[str, str]:
    """Stacks of every worker whose sockets are in `folder`, by process title; also written to each one's log.

    A process that is stopped by a signal cannot answer; its entry says so.
    """
    asked: dict[int, tuple[str, Path, int]] = {}
    for path in Path(folder).glob("*.stacks"):
        pid = int(path.stem)
        title = _title(pid)
        if title.startswith(TITLE):
            asked[pid] = (title, path, path.stat().st_size)
            os.kill(pid, signal.SIGUSR1)
    return {f"{title} (pid {pid})": _answer(pid, path, size) for pid, (title, path, size) in asked.items()}


def _answer(pid: int, path: Path, old_size: int) -> str:
    end = time.monotonic() + _WAIT_S
    size = old_size
    while time.monotonic() < end:
        new_size = path.stat().st_size if path.exists() else 0
        if new_size > old_size and new_size == size:
            with path.open() as stream:
                stream.seek(old_size)
                text = stream.read()
            _write_to_log(pid, text)
            return text
        size = new_size
        time.sleep(_SETTLE_S)
    return f"no answer within {_WAIT_S:g} s: the process is {state(pid)}"


def _write_to_log(pid: int, text: str) -> None:
    try:
        with open(f"/proc/{pid}/fd/2", "a") as log:
            log.write(f"\n--- stacks, asked for from outside ---\n{text}\n")
    except OSError:
        # It ended meanwhile, or its output cannot be opened again; the caller has the text.
        return


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def state(pid: int) -> str:
    """The kernel's state in psutil's words: running, sleeping, stopped, tracing-stop, ... or gone."""
    # Here, since no call needs it: every process of a run imports this module.
    import psutil

    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"
