"""The sending half of a connection: calls to one peer, their credit, and what becomes of them. Used by `vtriune.runtime`.

Guarantees:
- Calls and broadcasts of one link reach the peer's inbox in the order they were submitted.
- At most `credit_messages` of them, and `credit_bytes` of payload, are unfinished at the peer (one larger message may
  go alone). Further ones wait here; a thread that may block does so, others raise `BacklogFull` at a bound.
- Each ends exactly once: in a reply, a fault, a deadline, `ConnectionLost`, or the peer's `MeshFailure`.
- A dropped connection is opened again at once. Calls in flight then fail with `ConnectionLost` (whether they ran is
  unknown); broadcasts are sent again and the peer drops those it already had, so each runs once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from vtriune.transport import wire
from vtriune.transport.codec import Payload
from vtriune.transport.errors import BacklogFull, ConnectionLost, DeadlineExceeded, MeshFailure
from vtriune.transport.reactor import Reactor, Timer, has_input, receive
from vtriune.transport.wire import (
    Call,
    Cancel,
    Done,
    FailureNote,
    Fault,
    Hello,
    Limits,
    PeerRef,
    Refused,
    Reply,
    Welcome,
)

HEARTBEAT_S = 5.0
SILENCE_S = 60.0
RECONNECT_S = 1.0
CONNECT_S = 20.0
_BATCH = 256
_MONITORED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_CLOSED
)


class Outcome(Protocol):
    """Who waits for a call. Both methods are called under the reactor's lock, at most one of them, once."""

    def resolve(self, value: msgspec.Raw | None, frames: Sequence[Any], blobs: Sequence[int]) -> None:
        """The call succeeded; a broadcast was handed to the peer."""
        ...

    def fail(self, error: Exception | wire.ErrorNote) -> None:
        """The call ended otherwise."""
        ...


class ClientSecurity(Protocol):
    """Sets a connecting socket's keys."""

    def secure_client(self, socket: Any) -> None:
        """Apply them before connecting."""
        ...


class Outstanding:
    """A submitted call until its end."""

    __slots__ = ("frames", "header", "id", "is_oneway", "is_sent", "label", "num_bytes", "outcome", "timer")

    def __init__(self, call: Call, payload: Payload, outcome: Outcome) -> None:
        self.id = call.id
        self.header: bytes = wire.encode(call)
        self.frames: Sequence[Any] = payload.frames
        self.num_bytes = payload.num_bytes
        self.outcome: Outcome | None = outcome
        self.is_oneway = call.oneway
        self.is_sent = False
        self.label = f"{call.actor.partition('#')[0]}.{call.endpoint}"
        self.timer: Timer | None = None


class Link:
    """Calls to one peer over one connection at a time."""

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        me: PeerRef,
        peer: PeerRef,
        link_id: int,
        security: ClientSecurity | None,
    ) -> None:
        self.peer = peer
        self.failure: MeshFailure | None = None
        self._reactor = reactor
        self._limits = limits
        self._me = me
        self._link_id = link_id
        self._security = security
        self._next_id = 1
        self._outstanding: dict[int, Outstanding] = {}
        self._backlog: deque[Outstanding] = deque()
        self._num_inflight = 0
        self._inflight_bytes = 0
        self._backlog_bytes = 0
        self._credit_messages = limits.credit_messages
        self._credit_bytes = limits.credit_bytes
        self._is_open = False
        self._was_open = False
        self._incarnation = 0
        self._retry: Timer | None = None
        self._give_up: Timer | None = None
        with reactor.lock:
            self._give_up = reactor.call_later(CONNECT_S, self._unreachable)
            self._connect()

    # ---- sending

    @property
    def num_outstanding(self) -> int:
        """Calls submitted and not ended; `choose` balances by it."""
        return len(self._outstanding)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a message of this size may go, or wait its turn, within the credit."""
        if self.failure is not None:
            return True
        unfinished_bytes = self._inflight_bytes + self._backlog_bytes
        fits = unfinished_bytes + num_bytes <= self._credit_bytes or unfinished_bytes == 0
        return fits and self._num_inflight + len(self._backlog) < self._credit_messages

    def wait_for_room(self, num_bytes: int, timeout_s: float | None = None) -> None:
        """Block a plain thread until there is credit; on an asyncio thread only check the backlog's bound.

        Raises:
            BacklogFull: on an asyncio thread, with `backlog_messages` or `credit_bytes` times four waiting.
            DeadlineExceeded: no credit within `timeout_s`.
        """
        if self.has_room(num_bytes):
            return
        if self._reactor.runs_in_this_thread():
            too_many = len(self._backlog) >= self._limits.backlog_messages
            if too_many or self._backlog_bytes > 4 * self._limits.credit_bytes:
                raise BacklogFull(
                    f"{len(self._backlog)} messages ({self._backlog_bytes} bytes) wait for {self.peer}: "
                    "await earlier calls before making more"
                )
        elif not self._reactor.wait(lambda: self.has_room(num_bytes), timeout_s):
            raise DeadlineExceeded(f"no credit from {self.peer} within {timeout_s} s: it is too slow or frozen")

    def submit(
        self,
        actor: str,
        endpoint: str,
        payload: Payload,
        num_positional: int,
        names: tuple[str, ...],
        outcome: Outcome,
        oneway: bool = False,
        deadline_s: float | None = None,
    ) -> int:
        """Send a call, or queue it for credit; returns its id. A link that has failed fails the outcome at once."""
        with self._reactor.lock:
            call_id = self._next_id
            self._next_id = call_id + 1
            if self.failure is not None and not self._revive():
                outcome.fail(self.failure)
                return call_id
            body = msgspec.Raw(payload.body)
            call = Call(call_id, actor, endpoint, body, num_positional, names, payload.blobs, oneway, deadline_s)
            item = Outstanding(call, payload, outcome)
            self._outstanding[call_id] = item
            if deadline_s is not None:
                item.timer = self._reactor.call_later(deadline_s, lambda: self._expire(item, deadline_s))
            if self._is_open and not self._backlog and self._has_credit(item):
                self._transmit(item)
                self._check_input()
            else:
                self._backlog.append(item)
                self._backlog_bytes += item.num_bytes
            return call_id

    def cancel(self, call_id: int) -> None:
        """Forget a call's outcome and tell the callee to stop working on it."""
        with self._reactor.lock:
            item = self._outstanding.get(call_id)
            if item is not None and item.outcome is not None:
                item.outcome = None
                self._abandon(item)

    def tell(self, message: wire.Message) -> None:
        """Send a message that needs no credit and no answer; dropped when there is no connection."""
        with self._reactor.lock:
            if self._is_open:
                self._send([wire.encode(message)])
                self._check_input()

    def _has_credit(self, item: Outstanding) -> bool:
        fits = self._inflight_bytes + item.num_bytes <= self._credit_bytes or self._inflight_bytes == 0
        return fits and self._num_inflight < self._credit_messages

    def _transmit(self, item: Outstanding) -> None:
        item.is_sent = True
        self._num_inflight += 1
        self._inflight_bytes += item.num_bytes
        self._send([item.header, *item.frames] if item.frames else [item.header])
        if item.is_oneway:
            outcome, item.outcome = item.outcome, None
            if outcome is not None:
                outcome.resolve(None, (), ())
        else:
            item.frames, item.header = (), b""

    def _send(self, parts: list[Any]) -> None:
        try:
            if len(parts) == 1:
                self._socket.send(parts[0], zmq.NOBLOCK)
            else:
                self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            # No pipe: the connection is gone, which the monitor is about to say. What was to go now counts as sent
            # on the lost connection.
            self._reactor.call_later(0.0, self._lost)

    def _check_input(self) -> None:
        if has_input(self._socket):
            self._reactor.mark_ready(self)

    def _flush(self) -> None:
        moved = False
        while self._backlog and self._is_open and self._has_credit(self._backlog[0]):
            item = self._backlog.popleft()
            self._backlog_bytes -= item.num_bytes
            self._transmit(item)
            moved = True
        if moved and self._is_open:
            self._check_input()

    def _expire(self, item: Outstanding, deadline_s: float) -> None:
        outcome, item.outcome = item.outcome, None
        if outcome is None:
            return
        where = "waiting to be sent to" if not item.is_sent else "at"
        self._abandon(item)
        outcome.fail(DeadlineExceeded(f"{item.label} took over {deadline_s:g} s {where} {self.peer}"))

    def _abandon(self, item: Outstanding) -> None:
        """An unsent call is forgotten; a sent one keeps its credit until the callee has answered the cancellation."""
        if item.is_sent:
            self.tell(Cancel(item.id))
        else:
            self._backlog.remove(item)
            self._backlog_bytes -= item.num_bytes
            del self._outstanding[item.id]

    # ---- receiving

    def on_readable(self) -> bool:
        """Handle a batch of answers."""
        for _ in range(_BATCH):
            parts = receive(self._socket, 1, self._limits.frames)
            if parts is None:
                self._flush()
                return False
            try:
                message = wire.decode(parts[0])
            except wire.WireError as error:
                self._fail(self._note("unreachable", f"it answered with something else than our protocol: {error}"))
                return False
            self._handle(message, parts)
            if self.failure is not None:
                return False
        self._flush()
        return True

    def _handle(self, message: wire.Message, parts: list[Any]) -> None:
        match message:
            case Reply(call_id, value, blobs):
                outcome = self._end(call_id)
                if outcome is not None:
                    outcome.resolve(value, parts[1:], blobs)
            case Fault(call_id, error):
                outcome = self._end(call_id)
                if outcome is not None:
                    outcome.fail(error)
            case Done(ids):
                for call_id in ids:
                    self._end(call_id)
            case Welcome():
                self._welcome(message)
            case Refused(reason):
                self._fail(self._note("unreachable", f"it refused the connection: {reason}"))
            case _:
                self._fail(self._note("unreachable", f"it sent {type(message).__name__}, which only callers send"))

    def _end(self, call_id: int) -> Outcome | None:
        item = self._outstanding.pop(call_id, None)
        if item is None:
            return None
        if item.is_sent:
            self._num_inflight -= 1
            self._inflight_bytes -= item.num_bytes
        if item.timer is not None:
            item.timer.cancel()
        if self._num_inflight < self._credit_messages:
            self._reactor.notify()
        return item.outcome

    # ---- the connection

    def _connect(self) -> None:
        socket = self._reactor.context.socket(zmq.DEALER)
        options: tuple[tuple[int, int], ...] = (
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, -1),
            (zmq.MAXMSGSIZE, self._limits.frame_bytes),
            (zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000)),
            (zmq.HEARTBEAT_TIMEOUT, int(SILENCE_S * 1000)),
        )
        for option, value in options:
            socket.setsockopt(option, value)
        if self._security is not None and not self.peer.address.startswith("ipc://"):
            self._security.secure_client(socket)
        self._socket: Any = socket
        self.fd = int(socket.getsockopt(zmq.FD))
        self._monitor = Monitor(self._reactor, socket.get_monitor_socket(_MONITORED), self._on_event)
        socket.connect(self.peer.address)
        self._reactor.register(self)
        self._send([wire.encode(Hello(wire.PROTOCOL, self._me, self._link_id))])

    def _disconnect(self) -> None:
        self._is_open = False
        if self._socket.closed:
            return
        self._reactor.unregister(self)
        self._monitor.close()
        self._socket.disable_monitor()
        self._socket.close(linger=0)

    def _on_event(self, event: int) -> None:
        if event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            self._fail(self._note("unreachable", "the security handshake failed: wrong or missing keys of this run"))
        elif self.failure is None:
            self._lost()

    def _lost(self) -> None:
        """The connection broke, or an attempt to open it failed: try again until `_unreachable`."""
        if self.failure is not None or self._socket.closed:
            return
        if self._is_open:
            self._give_up = self._reactor.call_later(RECONNECT_S, self._unreachable)
        self._disconnect()
        self._connect_soon(0.0 if self._give_up is not None and self._was_open else 0.05)
        self._was_open = False

    def _connect_soon(self, delay_s: float) -> None:
        if self._retry is None:
            self._retry = self._reactor.call_later(delay_s, self._reconnect)

    def _reconnect(self) -> None:
        self._retry = None
        if self.failure is None and not self._is_open:
            self._connect()

    def _unreachable(self) -> None:
        if not self._is_open and self.failure is None:
            self._fail(self._note("unreachable", "its socket accepts no connection"))

    def _welcome(self, welcome: Welcome) -> None:
        if welcome.protocol != wire.PROTOCOL:
            self._fail(self._note("unreachable", f"it speaks protocol {welcome.protocol}, we speak {wire.PROTOCOL}"))
            return
        self._is_open = self._was_open = True
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None
        self._credit_messages, self._credit_bytes = welcome.credit_messages, welcome.credit_bytes
        self._resend(welcome.last_id)
        self._flush()

    def _resend(self, last_id: int) -> None:
        """After a break: calls in flight are lost, broadcasts the peer has not had go again, oldest first."""
        for item in [item for item in self._outstanding.values() if item.is_sent]:
            if item.is_oneway and item.id > last_id:
                self._send([item.header, *item.frames])
                continue
            outcome = self._end(item.id)
            if outcome is not None:
                outcome.fail(ConnectionLost(f"the connection to {self.peer} broke during {item.label}"))

    def _revive(self) -> bool:
        return False

    def _note(self, cause: str, detail: str) -> FailureNote:
        return FailureNote(self.peer.mesh, self.peer.rank, self.peer.host, self.peer.pid, cause, detail=detail)

    def _fail(self, note: FailureNote) -> None:
        self.fail(MeshFailure(note))

    def fail(self, failure: MeshFailure) -> int:
        """The peer is gone: every call to it, present and future, ends in this failure. Returns how many just did."""
        with self._reactor.lock:
            if self.failure is not None:
                return 0
            self.failure = failure
            self._disconnect()
            items, self._outstanding = self._outstanding, {}
            self._backlog.clear()
            self._num_inflight = self._inflight_bytes = self._backlog_bytes = 0
            for item in items.values():
                if item.timer is not None:
                    item.timer.cancel()
            waiting = [item.outcome for item in items.values() if item.outcome is not None]
            for outcome in waiting:
                outcome.fail(failure)
            self._reactor.notify()
            return len(waiting)

    def close(self) -> None:
        """End the link: what is outstanding fails as stopped."""
        self._fail(self._note("stopped", ""))


class Monitor:
    """Connection events of one socket."""

    def __init__(self, reactor: Reactor, socket: Any, on_event: Callable[[int], None]) -> None:
        self._reactor = reactor
        self._socket = socket
        self._on_event = on_event
        self.fd: int = socket.getsockopt(zmq.FD)
        reactor.register(self)

    def on_readable(self) -> bool:
        """Pass on the next event; the handler may close this monitor."""
        if not has_input(self._socket):
            return False
        event = parse_monitor_message(self._socket.recv_multipart(zmq.NOBLOCK))["event"]
        if event != zmq.EVENT_MONITOR_STOPPED:
            self._on_event(event)
        return not self._socket.closed

    def close(self) -> None:
        """Stop watching."""
        self._reactor.unregister(self)
        self._socket.close(linger=0)
