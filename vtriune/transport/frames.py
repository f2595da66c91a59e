"""Whole messages to and from a ZeroMQ socket without blocking. Used by links and inboxes, under the reactor's lock.

pyzmq's own multipart calls check and wrap every part, which costs more than the message; these use its socket directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq
from zmq.backend import Socket as _Socket

# `send_part(socket, part, flags)`: one part, by copy.
send_part: Any = _Socket.send
_recv: Any = _Socket.recv
_get: Any = _Socket.get
NOBLOCK = int(zmq.NOBLOCK)
NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
# Below this, copying is cheaper than having libzmq's thread give the buffer back.
_COPY_BYTES = 1 << 16


def send(socket: Any, heads: Sequence[bytes], frames: Sequence[Any] = ()) -> None:
    """Send one message: `heads` by copy, then `frames`, large ones without.

    Raises zmq.ZMQError: EAGAIN without a connection, EHOSTUNREACH from a router whose peer is gone. Nothing was sent.
    """
    last_head = NOBLOCK_MORE if frames else NOBLOCK
    for index, head in enumerate(heads, 1):
        send_part(socket, head, last_head if index == len(heads) else NOBLOCK_MORE)
    for index, frame in enumerate(frames, 1):
        view = memoryview(frame)
        send_part(socket, view, NOBLOCK if index == len(frames) else NOBLOCK_MORE, view.nbytes < _COPY_BYTES)


def receive(socket: Any, num_heads: int, max_frames: int, is_likely: bool) -> list[Any] | None:
    """One message, or None when there is none: `num_heads` parts, the rest as zero-copy frames.

    With two heads the first is a router's identity, as bytes, which another part always follows; the last head is a
    frame. Parts beyond `max_frames` are read and dropped; the one extra that is kept tells the caller that the limit
    was passed. `is_likely`: take rather than look first, which is the dearer way to find nothing.
    """
    if is_likely:
        try:
            part = _recv(socket, NOBLOCK, num_heads == 2)
        except zmq.Again:
            return None
    elif _get(socket, _EVENTS) & _POLLIN:
        part = _recv(socket, NOBLOCK, num_heads == 2)
    else:
        return None
    parts: list[Any] = [part]
    if num_heads == 2:
        part = _recv(socket, NOBLOCK, False)
        parts.append(part)
    while part.more:
        part = _recv(socket, NOBLOCK, False)
        if len(parts) <= num_heads + max_frames:
            parts.append(part)
    return parts


def has_input(socket: Any) -> bool:
    """Whether a message waits. To be asked after a send: sending may consume the edge that would have said so."""
    return bool(_get(socket, _EVENTS) & _POLLIN)
