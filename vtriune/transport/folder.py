"""The run's socket folder: mode 0700, named after its owner, gone when the owner is, however it ended.

Made by the root process; every process of the run binds its `ipc://` sockets in it. A small shell process holds a pipe
from the root: when that closes, even on `kill -9`, it removes the folder. Folders whose owner died together with its
shell are swept when the next run starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_PREFIX = "vtriune-"
_MAX_SOCKET_PATH = 107
# Waits until its stdin closes, then removes the folder. Its own session keeps it clear of a terminal's Ctrl-C.
_REAPER = 'trap "" INT TERM HUP; read -r _; rm -rf -- "$1"'


class SocketFolder:
    """A private folder for the sockets of one run."""

    def __init__(self, parent: Path | None = None) -> None:
        """Create it under `parent`, by default the system's temporary folder."""
        base = parent or Path(tempfile.gettempdir())
        sweep(base)
        self.path = Path(
            tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getuid()}-{os.getpid()}-{_start_ticks(os.getpid())}-", dir=base)
        )
        self._owner_pid = os.getpid()
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", _REAPER, "vtriune-folder-reaper", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def remove(self) -> None:
        """Remove the folder and end its reaper. Idempotent; a forked copy of the owner does nothing."""
        if os.getpid() != self._owner_pid:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._reaper.stdin is not None and not self._reaper.stdin.closed:
            self._reaper.stdin.close()
        self._reaper.wait()


def socket_address(folder: str | Path, name: str) -> str:
    """An `ipc://` address in a socket folder. Raises ValueError where the path exceeds what a Unix socket can have."""
    path = f"{folder}/{name}"
    if len(path.encode()) > _MAX_SOCKET_PATH:
        raise ValueError(f"{path} is too long for a Unix socket: set TMPDIR to a shorter path, or use a shorter name")
    return f"ipc://{path}"


def sweep(base: Path) -> None:
    """Remove this user's folders whose owner is no longer alive."""
    for path in base.glob(f"{_PREFIX}{os.getuid()}-*-*-*"):
        pid, ticks = path.name.split("-")[2:4]
        if pid.isdigit() and ticks.isdigit() and _start_ticks(int(pid)) != int(ticks):
            shutil.rmtree(path, ignore_errors=True)


def _start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 when there is none. Tells a reused pid apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
