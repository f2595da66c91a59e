"""Scored groups that wait to be consumed, on disk: appended as they arrive, read back once, forgotten together.

The recorder's memory holds where a group lies, not the group: at the paper's size the groups of one window are half a gigabyte.
The file outlives a kill: what was appended is found again by `recover`, up to a torn tail. One writer, one reader, one process.
"""

import os
import struct
import threading
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from vtriune import whole_files
from vtriune.messages import Lease, ScoredGroup

_HEAD = struct.Struct("<cQ")
_GROUP, _FORGOTTEN = b"G", b"F"
_COMPACT_BYTES = 64 * 2**20
"""Dead bytes from which, when they outweigh the living, the file is written anew."""


class DeliveryKey(NamedTuple):
    """What tells deliveries apart: a group that was leased twice may be delivered twice, and the two differ."""

    group_id: int
    attempt: int


def key_of(lease: Lease) -> DeliveryKey:
    """Of what a lease brought."""
    return DeliveryKey(lease.group_id, lease.attempt)


class Journal:
    """Groups by key, in one append-only file at `path`. Starts empty: whatever is at `path` must have been recovered before.

    A record is a kind, a length and msgpack: a group, or the keys of groups that are forgotten. Methods may be called from
    several threads.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: FileIO = path.open("w+b", buffering=0)
        self._places: dict[DeliveryKey, tuple[int, int]] = {}
        self._num_dead_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: DeliveryKey) -> bool:
        return key in self._places

    def append(self, group: ScoredGroup) -> None:
        """Add `group` under its key, which must be new. Handed to the kernel when this returns: it survives this process."""
        key = key_of(group.group.lease)
        if key in self._places:
            raise ValueError(f"group {key.group_id}, attempt {key.attempt}, is in the journal already")
        data = _encode(group)
        with self._lock:
            self._places[key] = (_append(self._file, _GROUP, data), len(data))

    def read(self, keys: Iterable[DeliveryKey]) -> Iterator[ScoredGroup]:
        """The groups of those keys, in that order; KeyError for an unknown one."""
        for key in keys:
            with self._lock:
                start, length = self._places[key]
                data = os.pread(self._file.fileno(), length, start)
            yield _decode(data)

    def forget(self, keys: Iterable[DeliveryKey]) -> None:
        """Drop groups; their bytes are reclaimed when the journal runs empty, or by rewriting when the dead outweigh the living."""
        gone = list(keys)
        with self._lock:
            for key in gone:
                self._num_dead_bytes += self._places.pop(key)[1]
            if not self._places:
                self._file.truncate(0)
                self._num_dead_bytes = 0
            elif self._num_dead_bytes > max(_COMPACT_BYTES, sum(length for _, length in self._places.values())):
                self._compact()
            else:
                _append(self._file, _FORGOTTEN, msgspec.msgpack.encode(gone))

    def close(self) -> None:
        """Close and remove the file; what is in it must have been read. Idempotent."""
        with self._lock:
            self._file.close()
            self.path.unlink(missing_ok=True)

    def _compact(self) -> None:
        """Go on in a new file that holds the living alone; like what was appended, it outlives this process, not the machine."""
        places: dict[DeliveryKey, tuple[int, int]] = {}
        with whole_files.replacing(self.path, syncs=False) as partial:
            file = partial.open("w+b", buffering=0)
            for key, (start, length) in self._places.items():
                places[key] = (_append(file, _GROUP, os.pread(self._file.fileno(), length, start)), length)
        self._file.close()
        self._file, self._places, self._num_dead_bytes = file, places, 0


def _append(file: FileIO, kind: bytes, data: bytes) -> int:
    """Add a record at the end, whole or not at all; returns where its data start."""
    start = file.seek(0, os.SEEK_END)
    left = memoryview(_HEAD.pack(kind, len(data)) + data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        # On a full disk the next, smaller one may find room: behind half a record nobody would find it.
        file.truncate(start)
        raise
    return start + _HEAD.size


def recover(path: Path) -> list[ScoredGroup]:
    """Every whole group in a journal that a killed process left and had not forgotten, in order of arrival.

    Empty when there is no file. Memory: all of them, once, at the start of a resumed run.
    """
    groups: dict[DeliveryKey, ScoredGroup] = {}
    if not path.is_file():
        return []
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            kind, length = _HEAD.unpack(head)
            data = file.read(length)
            if len(data) < length:
                break
            if kind == _GROUP:
                group = _decode(data)
                groups[key_of(group.group.lease)] = group
            else:
                for key in msgspec.msgpack.decode(data, type=list[DeliveryKey]):
                    groups.pop(key, None)
    return list(groups.values())


def _encode(group: ScoredGroup) -> bytes:
    return msgspec.msgpack.encode(group, enc_hook=_array_to_bytes)


def _decode(data: bytes) -> ScoredGroup:
    return msgspec.msgpack.decode(data, type=ScoredGroup, dec_hook=_array_from_bytes)


def _array_to_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    raise NotImplementedError(f"a journal holds no {type(value)}")


def _array_from_bytes(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.frombuffer(value[1], np.dtype(value[0]))
    raise NotImplementedError(f"a journal holds no {kind}")
