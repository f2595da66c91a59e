"""A call from submission to its end, and the credit that bounds how many there are. Used by links."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from vtriune.transport import wire
from vtriune.transport.codec import Payload
from vtriune.transport.reactor import Timer
from vtriune.transport.wire import Call, Limits


class Outcome(Protocol):
    """Who waits for a call. Both methods are called under the reactor's lock, at most one of them, once."""

    def resolve(self, value: msgspec.Raw | None, frames: Sequence[Any], blobs: Sequence[int]) -> None:
        """The call succeeded; a broadcast was handed to the peer."""
        ...

    def fail(self, error: Exception | wire.ErrorNote) -> None:
        """The call ended otherwise."""
        ...


class Outstanding:
    """A submitted call until its end. `outcome` is None once nobody waits for it any more."""

    __slots__ = ("actor", "endpoint", "frames", "header", "id", "is_oneway", "is_sent", "num_bytes", "outcome", "timer")

    def __init__(self, call: Call, payload: Payload, outcome: Outcome) -> None:
        self.id = call.id
        self.header: bytes = wire.encode(call)
        self.frames: Sequence[Any] = payload.frames
        self.num_bytes = payload.num_bytes
        self.outcome: Outcome | None = outcome
        self.is_oneway = call.oneway
        self.is_sent = False
        self.actor = call.actor
        self.endpoint = call.endpoint
        self.timer: Timer | None = None

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

    def may_send(self, item: Outstanding) -> bool:
        """Whether the peer has room for this one now."""
        fits = self.inflight_bytes + item.num_bytes <= self.num_bytes or self.inflight_bytes == 0
        return fits and self.num_inflight < self.messages

    def may_submit(self, num_bytes: int) -> bool:
        """Whether a call of this size would stay within the credit, counting those that wait."""
        unfinished_bytes = self.inflight_bytes + self.backlog_bytes
        fits = unfinished_bytes + num_bytes <= self.num_bytes or unfinished_bytes == 0
        return fits and self.num_inflight + len(self.backlog) < self.messages

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
        if not self.backlog or not self.may_send(self.backlog[0]):
            return None
        item = self.backlog.popleft()
        self.backlog_bytes -= item.num_bytes
        self.send(item)
        return item

    def send(self, item: Outstanding) -> None:
        """Count it as in flight."""
        item.is_sent = True
        self.num_inflight += 1
        self.inflight_bytes += item.num_bytes

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
