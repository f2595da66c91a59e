"""Files and folders that are whole or not there: written aside, on disk, renamed. Used wherever others rely on what is written.

    .name.partial   being written, beside its place          name   the earlier one until the rename, the whole new one from then on

Whatever moment a kill or a power cut comes, the place holds one or the other. A write that fails leaves nothing aside, and what a
killed one left is removed by the next. Permissions are those that an ordinary open gives.
"""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil


def write(path: Path, data: bytes) -> None:
    """Replace the file at `path` by one that holds `data`; on disk when this returns."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, *, is_shared: bool = False, syncs: bool = True) -> Iterator[Path]:
    """Yields where to write the file or folder that takes its place at `path` once the block ends without an error.

    is_shared  several processes may write it at a time: each has a place of its own, the last to end wins, and a folder that is
               there already stays (OSError)
    syncs      off: whole against a kill, not against a power cut; for what carries a checksum and can be made again
    """
    partial = _own_aside(path) if is_shared else aside(path)
    remove(partial)
    try:
        yield partial
        install(partial, path, syncs=syncs)
    finally:
        remove(partial)


def aside(path: Path) -> Path:
    """Where what is to become `path` is written, by the only process that does."""
    return path.with_name(f".{path.name}.partial")


def install(partial: Path, path: Path, *, syncs: bool = True) -> None:
    """Give what was written aside its name; on disk when this returns. It replaces a file, not a folder: see `set_aside`."""
    if syncs:
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if partial.is_file():
            sync(partial)
    os.replace(partial, path)
    if syncs:
        sync(path.parent)


def set_aside(folder: Path) -> Path:
    """Take a folder's name from it, so that nobody sees it half removed; returns where its content is now, to be removed."""
    doomed = aside(folder.with_name(f"{folder.name}.removed"))
    remove(doomed)
    os.replace(folder, doomed)
    return doomed


def clear(folder: Path) -> None:
    """Remove what killed writers left aside anywhere below `folder`, in which nobody may be writing. Called before a run starts: files
    that nothing would ever overwrite may be what fills the disk.
    """
    for path in [*folder.rglob(".*.partial")]:
        remove(path)


def sync(path: Path) -> None:
    """Return once the file, or the entries of the folder, at `path` are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_aside(path: Path) -> Path:
    """A place named after this process. Those that dead processes of this machine left for the same `path` are removed."""
    host = socket.gethostname()
    named = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(host)}-(\d+)\.partial")
    for left in path.parent.iterdir():
        found = named.fullmatch(left.name)
        if found is not None and not psutil.pid_exists(int(found[1])):
            remove(left)
    return aside(path.with_name(f"{path.name}.{host}-{os.getpid()}"))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
