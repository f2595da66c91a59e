"""What travels: the protocol's messages, its version and its limits. Used by links, inboxes and the fuzz targets.

A message is one header frame (msgpack, one of the structs below) and the payload's large arrays and byte strings as
frames of their own. Decoding builds only the types named here; a header that fits none of them raises `WireError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec

PROTOCOL = 1
# Levels of lists and dicts in a value whose annotation does not bound them by itself.
MAX_NESTING = 64
# Room for what a header holds beside the arguments: names, ids, blob positions.
HEADER_ROOM = 1 << 16
# A payload of at most this size, without frames, is within any limits.
PLAIN_BYTES = 1 << 16

# Ids count up per sender; 2^53 keeps them exact in every msgpack implementation.
_Id: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=256)]
_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1 << 20)]
Buffer: TypeAlias = bytes | bytearray | memoryview


class WireError(ValueError):
    """A message that is not of this protocol or exceeds its limits; it was refused, the connection lives on."""


class Payload(msgspec.Struct, gc=False):
    """An encoded argument list or result: a msgpack array, the frames beside it, and which items are whole frames."""

    body: bytes
    frames: Sequence[Buffer]
    blobs: tuple[int, ...]
    num_bytes: int


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what a process accepts and what it has in flight to one peer.

    `frame_bytes` is also enforced by libzmq, which drops a peer that exceeds it; senders check first and raise.
    `credit_messages` and `credit_bytes` bound the messages (calls and broadcasts) one sender may have unfinished at
    one receiver. `backlog_messages` bounds what waits at the sender for credit when it cannot block.
    """

    frame_bytes: int = 1 << 30
    header_bytes: int = 64 << 20
    frames: int = 4096
    credit_messages: int = 4096
    credit_bytes: int = 256 << 20
    backlog_messages: int = 1 << 16

    def __post_init__(self) -> None:
        smallest = PLAIN_BYTES + HEADER_ROOM
        if min(self.frame_bytes, self.header_bytes) < smallest:
            raise ValueError(f"frame_bytes and header_bytes must be at least {smallest}: {self}")

    def check(self, payload: Payload) -> None:
        """Raise WireError when a payload exceeds what one message may hold."""
        largest = max((memoryview(frame).nbytes for frame in payload.frames), default=0)
        if largest > self.frame_bytes:
            raise WireError(f"an array of {largest} bytes exceeds the limit of {self.frame_bytes}")
        if len(payload.frames) > self.frames:
            raise WireError(f"{len(payload.frames)} large arrays exceed the limit of {self.frames}")
        num_bytes = len(payload.body) + HEADER_ROOM
        if num_bytes > min(self.frame_bytes, self.header_bytes):
            raise WireError(f"{num_bytes} bytes beside large arrays exceed the limit of {self.header_bytes}")


class PeerRef(msgspec.Struct, frozen=True, array_like=True):
    """Where a process is reached and what to call it in reports."""

    node: _Name
    address: _Name
    mesh: _Name
    rank: int
    host: _Name
    pid: int

    def __str__(self) -> str:
        return f"{self.mesh} rank {self.rank} (host {self.host}, pid {self.pid})"


class FailureNote(msgspec.Struct, frozen=True, array_like=True):
    """A process or actor failure, as told to peers and owners. `cause`: see `vtriune.transport.errors.MeshFailure`."""

    mesh: _Name
    rank: int
    host: _Name
    pid: int
    cause: _Name
    exit_code: int | None = None
    signal: int | None = None
    detail: _Text = ""
    log_tail: tuple[_Text, ...] = ()
    stacks: _Text = ""
    is_restarting: bool = False

    @classmethod
    def of(cls, peer: PeerRef, cause: str, detail: str = "", stacks: str = "") -> FailureNote:
        """The failure of a process that is known, or of an actor in it."""
        return cls(peer.mesh, peer.rank, peer.host, peer.pid, cause, detail=detail, stacks=stacks)


class ErrorNote(msgspec.Struct, frozen=True, array_like=True):
    """An exception on the far side: its type's full name, its text, its traceback.

    `outcome` says how the call ended: `raised`, `refused`, `deadline` or `cancelled`; `kind` what the error declares to have
    broken (`vtriune.runtime.failure`).
    """

    outcome: _Name
    type_name: _Name
    text: _Text
    traceback: _Text
    kind: _Name = ""


def refusal(text: str) -> ErrorNote:
    """The answer to a call that cannot be accepted."""
    return ErrorNote("refused", "vtriune.transport.errors.MessageRefused", text, "")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message of a connection. `link` names the sender's link, which outlives connections."""

    protocol: int
    sender: PeerRef
    link: _Id


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Answer to Hello: the receiver's process, how often it has been restarted, the last call it has had from this
    link, and the credit it grants."""

    protocol: int
    pid: int
    incarnation: _Id
    last_id: _Id
    credit_messages: int
    credit_bytes: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The connection is not wanted, or one message could not be read: the reason."""

    reason: _Text


class Call(msgspec.Struct, array_like=True, tag=4, gc=False):
    """Run an endpoint. `args` is a msgpack array: `num_positional` arguments, then one per name in `names`.

    `id` is set by the link that sends it.
    `blobs` lists the positions in `args` that are byte strings sent as the leading frames, in this order.
    `deadline_s` is the time left when sent. A `oneway` call is answered by Done (or by a fault report), never by a value.
    """

    id: _Id
    actor: _Name
    endpoint: _Name
    args: msgspec.Raw
    num_positional: Annotated[int, msgspec.Meta(ge=0, le=256)]
    names: tuple[_Name, ...] = ()
    blobs: tuple[int, ...] = ()
    oneway: bool = False
    deadline_s: float | None = None


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """The value of a call, as an array of one. `blobs` as in Call."""

    id: _Id
    value: msgspec.Raw
    blobs: tuple[int, ...] = ()


class Fault(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The call ended in an exception."""

    id: _Id
    error: ErrorNote


class Done(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """One-way calls that have finished: their credit returns."""

    ids: tuple[_Id, ...]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The caller no longer wants this call's value."""

    id: _Id


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A process is known to have failed."""

    node: _Name
    failure: FailureNote


class Back(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """A process that had gone runs again, perhaps at another address."""

    peer: PeerRef


Message: TypeAlias = Hello | Welcome | Refused | Call | Reply | Fault | Done | Cancel | Gone | Back

encode = msgspec.msgpack.Encoder().encode
_read = msgspec.msgpack.Decoder(Message).decode


def decode(header: bytes | memoryview) -> Message:
    """Read a header frame. Raises WireError: the bytes are no message of this protocol."""
    try:
        message: Message = _read(header)
        return message
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a message of protocol {PROTOCOL}: {error}") from None
