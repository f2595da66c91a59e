"""What the pool, its fork server and its workers say to each other: msgspec structs in frames, a 4-byte big-endian length first.

A socket pair joins the pool with its fork server, another with each worker. Frames arrive in order; a frame over the limit or of
another type is a FrameError, which ends that worker. Nothing in a frame can run code.
"""

import asyncio
import socket
import struct
from typing import TypeVar

import msgspec

from verifiers.registry import Outcome
from verifiers.types import ImageSizes, RewardOptions, RewardSpec

MAX_FRAME_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct(">I")
T = TypeVar("T")


class FrameError(ConnectionError):
    """The other side sent what it must not, or hung up."""


class Setup(msgspec.Struct, frozen=True):
    """Pool → fork server, first. `preload` names the verifiers its workers will be asked for."""

    options: RewardOptions
    memory_limit_bytes: int
    preload: tuple[str, ...]


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Pool → fork server: fork a worker. Two file descriptors travel with it: the worker's socket and its standard error."""


class End(msgspec.Struct, frozen=True, tag=True):
    """Pool → fork server: kill a worker with everything it started, and collect it.

    `has_hung_up`: it is ending by itself, so its exit status is moments away and worth waiting for.
    """

    pid: int
    has_hung_up: bool = False


class Ack(msgspec.Struct, frozen=True):
    """Fork server → pool, after Setup (its own pid), Spawn (the worker's) and End.

    `status`: the exit status of a worker that had ended by itself, negative for a signal; None where it was killed here.
    """

    pid: int
    status: int | None = None


class Job(msgspec.Struct, frozen=True):
    """Pool → worker: one response to score; `progress` None means evaluation."""

    number: int
    response: str
    spec: RewardSpec
    progress: float | None
    image_sizes: ImageSizes = ()


class Result(msgspec.Struct, frozen=True):
    """Worker → pool: the outcome of a job, or what the verifier raised; `is_bad_row` where it blames row or gold answer.

    `is_spent`: the worker is not to be used again.
    """

    number: int
    outcome: Outcome | None
    error: str = ""
    is_bad_row: bool = False
    is_spent: bool = False


def encode(message: msgspec.Struct) -> bytes:
    """A frame; FrameError where it is over the limit."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(
            f"a {type(message).__name__} of {len(body)} bytes is over the frame limit of {MAX_FRAME_BYTES}"
        )
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes, kind: type[T]) -> T:
    """The struct in a frame's body; FrameError where it is none of that kind."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(f"a frame that is no {kind}: {error}") from error


def body_length(header: bytes) -> int:
    """The length in a frame's header; FrameError over the limit."""
    length: int = _LENGTH.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return length


async def receive(reader: asyncio.StreamReader, kind: type[T]) -> T:
    """The next frame from a worker; FrameError where it hung up."""
    try:
        return decode(await reader.readexactly(body_length(await reader.readexactly(_LENGTH.size))), kind)
    except asyncio.IncompleteReadError as error:
        raise FrameError("hung up") from error


def receive_blocking(connection: socket.socket, kind: type[T]) -> T | None:
    """The next frame of a blocking socket; None where the other side hung up."""
    header = _read_exactly(connection, _LENGTH.size)
    body = None if header is None else _read_exactly(connection, body_length(header))
    return None if body is None else decode(body, kind)


def receive_with_files(connection: socket.socket, max_files: int) -> tuple[Spawn | End | None, list[int]]:
    """The next order to the fork server and the files that came with it. The two sides take turns: a read holds one frame."""
    data, files, _, _ = socket.recv_fds(connection, _LENGTH.size + MAX_FRAME_BYTES, max_files)
    if not data:
        return None, files
    return msgspec.msgpack.decode(data[_LENGTH.size :], type=Spawn | End), files


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(num_bytes - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
