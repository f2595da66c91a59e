"""The sending half of a connection: calls to one peer, their credit, and what becomes of them. Used by `vtriune.runtime`.

Guarantees:
- Calls and broadcasts of one link reach the peer's inbox in the order they were submitted.
- At most `credit_messages` of them, and `credit_bytes` of payload, are unfinished at the peer (one larger message may
  go alone). Further ones wait here; a thread that may block does so, others raise `BacklogFull` at a bound.
- Each ends exactly once: in a reply, a fault, a deadline, `ConnectionLost`, or the peer's `MeshFailure`.
- A dropped connection is opened again at once. Calls in flight then fail with `ConnectionLost` (whether they ran is
  unknown); broadcasts are sent again and the peer drops those it already had, so each runs once.
- A peer that is being restarted at its address is reached again without a new link.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import msgspec

from vtriune.transport import wire
from vtriune.transport.connection import Connection
from vtriune.transport.errors import BacklogFull, ConnectionLost, DeadlineExceeded, MeshFailure
from vtriune.transport.outstanding import Credit, Outstanding, Promise
from vtriune.transport.reactor import Reactor
from vtriune.transport.security import Security
from vtriune.transport.wire import Call, Done, FailureNote, Fault, Limits, Payload, PeerRef, Reply

RECONNECT_S = 1.0
CONNECT_S = 20.0
RETRY_S = 0.05
RESTART_RETRY_S = 0.2


class Link:
    """Calls to one peer over one connection at a time."""

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        me: PeerRef,
        peer: PeerRef,
        link_id: int,
        security: Security | None,
        on_failure: Callable[[Link, MeshFailure], None] | None = None,
        on_open: Callable[[Link], None] | None = None,
    ) -> None:
        self.peer = peer
        self.failure: MeshFailure | None = None
        self._reactor = reactor
        self._limits = limits
        self._me = me
        self._link_id = link_id
        self._security = security
        self._on_failure = on_failure
        self._on_open = on_open
        self._next_id = 1
        self.credit = Credit(limits)
        self._incarnation: int | None = None
        self._is_open = False
        self._is_closed = False
        self._is_restarting = False
        with reactor.lock:
            self._give_up = reactor.call_later(CONNECT_S, self._unreachable)
            self._connect()

    # ---- sending

    @property
    def num_outstanding(self) -> int:
        """Calls submitted and not ended; `choose` balances by it."""
        return len(self.credit.by_id)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a message of this size may go, or wait its turn, within the credit."""
        credit = self.credit
        unfinished_bytes = credit.inflight_bytes + credit.backlog_bytes
        fits = not unfinished_bytes or unfinished_bytes + num_bytes <= credit.num_bytes
        return (fits and credit.num_inflight + len(credit.backlog) < credit.messages) or self.failure is not None

    def wait_for_room(self, num_bytes: int, timeout_s: float | None = None) -> None:
        """Block a plain thread until there is credit; on an asyncio thread only check the backlog's bound.

        Raises:
            BacklogFull: on an asyncio thread, with `backlog_messages` or four times `credit_bytes` waiting.
            DeadlineExceeded: no credit within `timeout_s`.
        """
        if self.has_room(num_bytes):
            return
        if asyncio._get_running_loop() is not None:
            num_waiting, waiting_bytes = len(self.credit.backlog), self.credit.backlog_bytes
            if num_waiting >= self._limits.backlog_messages or waiting_bytes > 4 * self._limits.credit_bytes:
                raise BacklogFull(
                    f"{num_waiting} messages ({waiting_bytes} bytes) wait for {self.peer}: "
                    "await earlier calls before making more"
                )
        elif not self._reactor.wait(functools.partial(self.has_room, num_bytes), timeout_s):
            raise DeadlineExceeded(f"no credit from {self.peer} within {timeout_s} s: it is too slow or frozen")

    def submit(self, call: Call, payload: Payload, promise: Promise) -> int:
        """Give the call its id and send it, or queue it for credit. A link that has failed fails the promise at once.

        Returns the id.
        """
        with self._reactor.lock:
            call.id = call_id = self._next_id
            self._next_id = call_id + 1
            if self.failure is not None:
                promise.fail(self.failure)
                return call_id
            header, size = wire.encode(call), payload.num_bytes
            item = Outstanding(call_id, call.actor, call.endpoint, size, promise, call.oneway, header, payload.frames)
            credit = self.credit
            credit.by_id[call_id] = item
            deadline_s = call.deadline_s
            if deadline_s is not None:
                item.timer = self._reactor.call_later(deadline_s, functools.partial(self._expire, item, deadline_s))
            if self._is_open and not credit.backlog and credit.take(item.num_bytes):
                item.is_sent = True
                self._transmit(item)
                if credit.num_inflight > 1:
                    # The others' answers may have arrived unseen: sending can consume what tells of them.
                    self._connection.check_input(True)
            else:
                credit.queue(item)
            return call_id

    def cancel(self, call_id: int) -> None:
        """Forget a call's promise and tell the callee to stop working on it."""
        with self._reactor.lock:
            item = self.credit.by_id.get(call_id)
            if item is not None and item.promise is not None:
                item.promise = None
                self._abandon(item)

    def tell(self, message: wire.Message) -> None:
        """Send a message that needs no credit and no answer; dropped when there is no connection."""
        with self._reactor.lock:
            if self._is_open:
                self._connection.send(wire.encode(message))
                self._connection.check_input(False)

    def _transmit(self, item: Outstanding) -> None:
        self._connection.send(item.header, item.frames)
        if item.is_oneway:
            # Kept whole until it is known to have run: a broken connection must not lose it.
            promise, item.promise = item.promise, None
            if promise is not None:
                promise.resolve(None, (), ())
        else:
            item.frames, item.header = (), b""

    def _flush(self) -> None:
        has_sent = False
        while self._is_open and (item := self.credit.next()) is not None:
            self._transmit(item)
            has_sent = True
        if has_sent and self._is_open:
            self._connection.check_input(True)

    def _expire(self, item: Outstanding, deadline_s: float) -> None:
        promise, item.promise = item.promise, None
        if promise is None:
            return
        where = "at" if item.is_sent else "waiting to be sent to"
        self._abandon(item)
        promise.fail(DeadlineExceeded(f"{item.label} took over {deadline_s:g} s {where} {self.peer}"))

    def _abandon(self, item: Outstanding) -> None:
        """An unsent call is forgotten; a sent one keeps its credit until the callee has answered the cancellation."""
        if item.is_sent:
            self.tell(wire.Cancel(item.id))
        else:
            self.credit.unqueue(item)

    # ---- receiving

    def _on_message(self, parts: list[Any]) -> None:
        try:
            message = wire.decode(parts[0])
        except wire.WireError as error:
            self._unreachable_because(f"its answer is {error}")
            return
        if type(message) is Reply:
            promise = self._end(message.id)
            if promise is not None:
                promise.resolve(message.value, parts, message.blobs)
        elif isinstance(message, Fault):
            promise = self._end(message.id)
            if promise is not None:
                promise.fail(message.error)
        elif isinstance(message, Done):
            for call_id in message.ids:
                self._end(call_id)
        elif isinstance(message, wire.Welcome):
            self._welcome(message)
        elif isinstance(message, wire.Refused):
            self._unreachable_because(f"it refused the connection: {message.reason}")
        else:
            self._unreachable_because(f"it sent {type(message).__name__}, which only callers send")

    def _end(self, call_id: int) -> Promise | None:
        """The promise of the call that has just ended; keeping it wakes those who wait for it. Where there is none, threads
        are woken here: the credit that has come free may be what one waits for."""
        item = self.credit.end(call_id)
        if self.credit.backlog:
            self._flush()
        promise: Promise | None = None if item is None else item.promise
        if promise is None:
            self._reactor.notify()
        return promise

    # ---- the connection

    def _connect(self) -> None:
        self._connection = Connection(
            self._reactor, self._limits, self.peer.address, self._security, self._on_message, self._lost
        )
        self._connection.send(wire.encode(wire.Hello(wire.PROTOCOL, self._me, self._link_id)))

    def move(self, peer: PeerRef) -> None:
        """The peer is back, perhaps elsewhere: connect to it there, also when it had been given up."""
        with self._reactor.lock:
            self.peer = peer
            if not self._is_open and not self._is_closed:
                self._is_restarting = True
                self._connection.close()
                self._connect()

    def _lost(self, is_rejected: bool) -> None:
        """The connection broke, or an attempt to open it failed: try again until `_unreachable`."""
        was_open, self._is_open = self._is_open, False
        if is_rejected:
            self._unreachable_because("the security handshake failed: wrong or missing keys of this run")
        elif self.failure is None or self._is_restarting:
            if was_open:
                self._give_up = self._reactor.call_later(RECONNECT_S, self._unreachable)
            delay_s = 0.0 if was_open else RESTART_RETRY_S if self._is_restarting else RETRY_S
            self._reactor.call_later(delay_s, self._reconnect)

    def _reconnect(self) -> None:
        if not self._is_closed and self._connection.is_closed and (self.failure is None or self._is_restarting):
            self._connect()

    def _unreachable(self) -> None:
        if not self._is_open:
            self._unreachable_because("its socket accepts no connection")

    def _unreachable_because(self, detail: str) -> None:
        if self.failure is None:
            failure = MeshFailure(FailureNote.of(self.peer, "unreachable", detail))
            self.fail(failure)
            if self._on_failure is not None:
                self._on_failure(self, failure)

    def _welcome(self, welcome: wire.Welcome) -> None:
        if welcome.protocol != wire.PROTOCOL:
            self._unreachable_because(f"it speaks protocol {welcome.protocol}, we speak {wire.PROTOCOL}")
            return
        is_new = self._incarnation is not None and welcome.incarnation != self._incarnation
        if is_new and not self._is_restarting:
            # It died and came back before we noticed: what was in flight died with the old one.
            for item in list(self.credit.clear()):
                if item.promise is not None:
                    item.promise.fail(ConnectionLost(f"{self.peer} was restarted during {item.label}"))
        self._is_open, self._is_restarting, self.failure = True, False, None
        self._incarnation = welcome.incarnation
        self.peer = msgspec.structs.replace(self.peer, pid=welcome.pid)
        self._give_up.cancel()
        self.credit.messages, self.credit.num_bytes = welcome.credit_messages, welcome.credit_bytes
        if self._on_open is not None:
            self._on_open(self)
        self._resend(welcome.last_id)
        self._flush()
        self._reactor.notify()

    def _resend(self, last_id: int) -> None:
        """After a break: calls in flight are lost, broadcasts the peer has not had go again, oldest first."""
        for item in [item for item in self.credit.by_id.values() if item.is_sent]:
            if item.is_oneway and item.id > last_id:
                self._connection.send(item.header, item.frames)
                continue
            self.credit.end(item.id)
            if item.promise is not None:
                item.promise.fail(ConnectionLost(f"the connection to {self.peer} broke during {item.label}"))

    def fail(self, failure: MeshFailure) -> int:
        """The peer is gone: calls to it end in this failure, at once and until it is back, should it be restarting.

        Returns how many calls just ended.
        """
        with self._reactor.lock:
            if self.failure is not None and not self._is_restarting:
                return 0
            self.failure = failure
            self._is_open, self._is_restarting = False, failure.is_restarting
            self._connection.close()
            self._give_up.cancel()
            if self._is_restarting:
                self._reactor.call_later(RESTART_RETRY_S, self._reconnect)
            waiting = [item.promise for item in self.credit.clear() if item.promise is not None]
            for promise in waiting:
                promise.fail(failure)
            self._reactor.notify()
            return len(waiting)

    def close(self) -> None:
        """End the link: what is outstanding fails as stopped."""
        with self._reactor.lock:
            self._is_closed = True
            self._is_restarting = False
            self.fail(MeshFailure(FailureNote.of(self.peer, "stopped")))
            self._connection.close()
