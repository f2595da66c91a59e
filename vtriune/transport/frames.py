"""Whole messages to and from a ZeroMQ socket without blocking. Used by links and inboxes, under the reactor's lock.

pyzmq's own multipart calls check and wrap every part, which costs more than the message; these use its socket directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq
from zmq.backend import Socket as _Socket

_send: Any = _Socket.send
_recv: Any = _Socket.recv
_get: Any = _Socket.get
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_RCVMORE = int(zmq.RCVMORE)
_POLLIN = int(zmq.POLLIN)
# Below this, copying is cheaper than having libzmq's thread give the buffer back.
_COPY_BYTES = 1 << 16


def send(socket: Any, heads: Sequence[bytes], frames: Sequence[Any] = ()) -> None:
    """Send one message: `heads` by copy, then `frames`, large ones without.

    Raises:
        zmq.ZMQError: EAGAIN without a connection, EHOSTUNREACH from a router whose peer is gone. Nothing was sent.
    """
    if frames:
        for head in heads:
            _send(socket, head, _NOBLOCK_MORE)
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            view = memoryview(frame)
            _send(socket, view, _NOBLOCK if index == last else _NOBLOCK_MORE, view.nbytes < _COPY_BYTES)
    elif len(heads) == 1:
        _send(socket, heads[0], _NOBLOCK)
    else:
        _send(socket, heads[0], _NOBLOCK_MORE)
        _send(socket, heads[1], _NOBLOCK)


def receive(socket: Any, num_heads: int, max_frames: int) -> list[Any] | None:
    """One message, or None when there is none: `num_heads` parts as bytes, the rest as zero-copy frames.

    With two heads the first is a router's identity, which another part always follows. Parts beyond `max_frames` are
    read and dropped; the one extra that is kept tells the caller that the limit was passed.
    """
    if not _get(socket, _EVENTS) & _POLLIN:
        return None
    parts: list[Any] = [_recv(socket, _NOBLOCK)]
    if num_heads == 2:
        parts.append(_recv(socket, _NOBLOCK))
    has_more = _get(socket, _RCVMORE)
    while has_more:
        frame = _recv(socket, _NOBLOCK, False)
        has_more = frame.more
        if len(parts) <= num_heads + max_frames:
            parts.append(frame)
    return parts


def has_input(socket: Any) -> bool:
    """Whether a message waits. To be asked after a send: sending may consume the edge that would have said so."""
    return bool(_get(socket, _EVENTS) & _POLLIN)
