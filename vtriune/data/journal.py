"""Scored groups that wait to be consumed, on disk: appended as they arrive, read back once, forgotten together.

The recorder's memory holds where a group lies, not the group: at the paper's size the groups of one window are half a gigabyte.
The file outlives a kill: what was appended is found again by `recover`, up to a torn tail. One writer, one reader, one process.
"""

import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from vtriune.messages import ScoredGroup

_HEAD = struct.Struct("<cQ")
_GROUP, _FORGOTTEN = b"G", b"F"
_COMPACT_BYTES = 64 * 2**20
"""Dead bytes from which, when they outweigh the living, the file is written anew."""


class Journal:
    """Groups by id, in one append-only file at `path`. Starts empty: whatever is at `path` must have been recovered before.

    A record is a kind, a length and msgpack: a group, or the ids of groups that are forgotten. Methods may be called from
    several threads.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: BinaryIO = path.open("w+b")
        self._places: dict[int, tuple[int, int]] = {}
        self._num_dead_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, group_id: int) -> bool:
        return group_id in self._places

    def append(self, group: ScoredGroup) -> None:
        """Add `group` under its id, which must be new. Handed to the kernel when this returns: it survives this process."""
        group_id = group.group.lease.group_id
        if group_id in self._places:
            raise ValueError(f"group {group_id} is in the journal already")
        data = _encode(group)
        with self._lock:
            self._places[group_id] = (self._write(_GROUP, data), len(data))

    def read(self, group_ids: Iterable[int]) -> Iterator[ScoredGroup]:
        """The groups of those ids, in that order; KeyError for an unknown one."""
        for group_id in group_ids:
            with self._lock:
                start, length = self._places[group_id]
                data = os.pread(self._file.fileno(), length, start)
            yield _decode(data)

    def forget(self, group_ids: Iterable[int]) -> None:
        """Drop groups; their bytes are reclaimed when the journal runs empty, or by rewriting when the dead outweigh the living."""
        ids = list(group_ids)
        with self._lock:
            for group_id in ids:
                self._num_dead_bytes += self._places.pop(group_id)[1]
            if not self._places:
                self._file.truncate(0)
                self._num_dead_bytes = 0
            elif self._num_dead_bytes > max(_COMPACT_BYTES, sum(length for _, length in self._places.values())):
                self._compact()
            else:
                self._write(_FORGOTTEN, msgspec.msgpack.encode(ids))

    def close(self) -> None:
        """Close and remove the file; what is in it must have been read. Idempotent."""
        with self._lock:
            self._file.close()
            self.path.unlink(missing_ok=True)

    def _write(self, kind: bytes, data: bytes) -> int:
        """Append a record; returns where its data start."""
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(_HEAD.pack(kind, len(data)) + data)
        self._file.flush()
        return start + _HEAD.size

    def _compact(self) -> None:
        old, places = self._file, self._places
        temporary = self.path.with_name(f".{self.path.name}.partial")
        self._file, self._places, self._num_dead_bytes = temporary.open("w+b"), {}, 0
        for group_id, (start, length) in places.items():
            self._places[group_id] = (self._write(_GROUP, os.pread(old.fileno(), length, start)), length)
        temporary.replace(self.path)
        old.close()


def recover(path: Path) -> list[ScoredGroup]:
    """Every whole group in a journal that a killed process left and had not forgotten, in order of arrival.

    Empty when there is no file. Memory: all of them, once, at the start of a resumed run.
    """
    groups: dict[int, ScoredGroup] = {}
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
                groups[group.group.lease.group_id] = group
            else:
                for group_id in msgspec.msgpack.decode(data, type=list[int]):
                    groups.pop(group_id, None)
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
