"""What a worker is told before it does anything, and how: length-prefixed messages over an inherited socket.

The socket also carries the worker's readiness, its progress and its failure reports to its parent, and by its end of file
tells either side that the other is gone. Nothing of it shows on a command line or in the environment.
"""

from __future__ import annotations

import signal
import socket
import struct
import threading
from typing import TypeAlias

import msgspec

from vtriune.transport.security import RunKeys
from vtriune.transport.wire import FailureNote, Limits, PeerRef

CONTROL_FD = "VTRIUNE_CONTROL_FD"
LEFT_TO_ROOT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that workers ignore, from their first instruction on: who ends a job sends them to all of its processes, and only the root
knows what is to be saved first. Workers are told to stop by their parent, and killed when it dies."""
_MAX_BYTES = 256 << 20


class SpawnRequest(msgspec.Struct, frozen=True, array_like=True):
    """Construct an actor: its class by import path, its place, its encoded constructor arguments."""

    actor_id: str
    name: str
    class_path: str
    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    rank: int
    args: bytes
    frames: tuple[bytes, ...]
    blobs: tuple[int, ...]
    num_positional: int
    names: tuple[str, ...]


class Bootstrap(msgspec.Struct, frozen=True):
    """Who a worker is, where it listens, and the actors it has at birth (those it had before a restart)."""

    mesh: str
    rank: int
    node: str
    address: str
    folder: str
    limits: Limits
    keys: RunKeys | None
    sys_path: tuple[str, ...]
    parent_pid: int = 0
    incarnation: int = 0
    actors: tuple[SpawnRequest, ...] = ()


class Stop(msgspec.Struct, frozen=True):
    """To a worker, the one thing it is told after its bootstrap: clean up and end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker listens."""

    peer: PeerRef


class Report(msgspec.Struct, frozen=True, tag=True):
    """A failure inside the worker that its owner must learn of."""

    note: FailureNote


class Moved(msgspec.Struct, frozen=True, tag=True):
    """Work of the worker, or of the process `who` below it, has come to `step`; see `vtriune.runtime.steps`."""

    who: str
    work: str
    step: str
    within_s: float


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The worker has ended, with this last word; said by what started it."""

    note: FailureNote


News: TypeAlias = Ready | Report | Moved | Ended

# Built here and not in the threads that read: msgspec's decoders must be built by one thread at a time.
decode_bootstrap = msgspec.msgpack.Decoder(Bootstrap).decode
decode_news = msgspec.msgpack.Decoder(News).decode


_sending = threading.Lock()
"""Several threads of a worker tell its parent something."""


def send(control: socket.socket, message: msgspec.Struct) -> None:
    """Write one message. Raises OSError when the other side is gone."""
    body = msgspec.msgpack.encode(message)
    with _sending:
        control.sendall(struct.pack("<I", len(body)) + body)


def receive(control: socket.socket) -> bytes | None:
    """Read one message's bytes; None at end of file."""
    head = _read(control, 4)
    if head is None:
        return None
    (size,) = struct.unpack("<I", head)
    if size > _MAX_BYTES:
        raise ValueError(f"a control message of {size} bytes exceeds {_MAX_BYTES}")
    return _read(control, size)


def _read(control: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = control.recv(size - len(parts))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
