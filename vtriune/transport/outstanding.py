"""A call from submission to its end, and the credit that bounds how many there are. Used by links."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from vtriune.transport import wire
from vtriune.transport.reactor import Timer
from vtriune.transport.wire import Limits


class Promise(Protocol):
    """What a caller holds of a call that has not ended. One of the methods is called, once, under the reactor's lock."""

    def resolve(self, value: msgspec.Raw | None, parts: Sequence[Any], blobs: Sequence[int]) -> None:
        """The call succeeded: its answer's parts, header first; or a broadcast was handed to the peer."""
        ...

    def fail(self, error: Exception | wire.ErrorNote) -> None:
        """The call ended otherwise."""
        ...


class Outstanding(msgspec.Struct, eq=False):
    """A submitted call until its end. `promise` is None once no caller waits for it any more."""

    id: int
    actor: str
    endpoint: str
    num_bytes: int
    promise: Any
    is_oneway: bool
    # What is to be sent, for as long as it may have to be.
    header: bytes
    frames: Sequence[Any]
    is_sent: bool = False
    timer: Timer | None = None

    @property
    def label(self) -> str:
        """What to call it in an error."""
        return f"{self.actor.partition('#')[0]}.{self.endpoint}"


class Credit:
    """The calls unfinished at a peer and those waiting to go, within the peer's bounds.

    At most `messages` calls of at most `num_bytes` together are in flight; one larger than that may go alone.
    """

    def __init__(self, limits: Limits) -> None:
        self.messages = limits.credit_messages
        self.num_bytes = limits.credit_bytes
        self.num_inflight = 0
        self.inflight_bytes = 0
        self.backlog: deque[Outstanding] = deque()
        self.backlog_bytes = 0
        self.by_id: dict[int, Outstanding] = {}

    def take(self, num_bytes: int) -> bool:
        """Count a call of this size as in flight; False when the peer has no room for it now."""
        unfinished_bytes = self.inflight_bytes
        if self.num_inflight >= self.messages or (unfinished_bytes and unfinished_bytes + num_bytes > self.num_bytes):
            return False
        self.num_inflight += 1
        self.inflight_bytes = unfinished_bytes + num_bytes
        return True

    def queue(self, item: Outstanding) -> None:
        """Let it wait."""
        self.backlog.append(item)
        self.backlog_bytes += item.num_bytes

    def unqueue(self, item: Outstanding) -> None:
        """It waits no longer and was not sent."""
        self.backlog.remove(item)
        self.backlog_bytes -= item.num_bytes
        del self.by_id[item.id]

    def next(self) -> Outstanding | None:
        """The first that waits, if the peer has room for it; it counts as in flight from now on."""
        if not self.backlog or not self.take(self.backlog[0].num_bytes):
            return None
        item = self.backlog.popleft()
        self.backlog_bytes -= item.num_bytes
        item.is_sent = True
        return item

    def end(self, call_id: int) -> Outstanding | None:
        """It has finished: its credit is free. None for an id that is not outstanding."""
        item = self.by_id.pop(call_id, None)
        if item is not None:
            if item.is_sent:
                self.num_inflight -= 1
                self.inflight_bytes -= item.num_bytes
            if item.timer is not None:
                item.timer.cancel()
        return item

    def clear(self) -> Iterable[Outstanding]:
        """End everything; returns what was outstanding, oldest first."""
        items, self.by_id = self.by_id, {}
        self.backlog.clear()
        self.num_inflight = self.inflight_bytes = self.backlog_bytes = 0
        for item in items.values():
            if item.timer is not None:
                item.timer.cancel()
        return items.values()
