"""One process at a time runs in a run's folder. Held by launch for the life of the process.

The kernel's lock on `<run.folder>/.<run.name>.lock` ends with the process that took it, however that one ends; what the file says is
for people. It lies beside the run's folder, which `--fresh` renames, and is never removed: whoever removed it while another is about
to lock it would let two in.
"""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vtriune.config import ConfigError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Keeps every other process from running in `folder` meanwhile. Raises ConfigError, which says who does, or why nobody can.

    Children do not inherit the lock: Python opens files so that they are closed in a program that is started.
    """
    path = _path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    except OSError as error:
        raise ConfigError(f"run.folder: {path} cannot be written ({error.strerror}); name a folder that can") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{_running(folder)}; wait for its end, stop it by `python -m vtriune.control {folder} stop`, or give this "
                "run another run.name"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked here (%s): nothing keeps a second start away", path, error.strerror)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        file.flush()
        yield


def holder(folder: Path) -> str | None:
    """A sentence on who runs in `folder` now; None when nobody does. Changes nothing."""
    path = _path(folder)
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _running(folder)
    return None


def _path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _running(folder: Path) -> str:
    """The file is empty for a moment while its holder writes it."""
    return f"{folder} is being run by {_path(folder).read_text() or 'another process'}"
