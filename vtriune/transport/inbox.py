"""The receiving half: one bound socket per process that accepts peers and hands their calls on. Used by `vtriune.runtime`.

A connection starts with Hello; before it, and for anything that cannot be read, nothing is executed. A message that
does not fit is refused by name and the connection lives on. Every accepted call is answered exactly once, which also
returns its credit.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import zmq

from vtriune.transport import wire
from vtriune.transport.connection import Monitor, set_options
from vtriune.transport.frames import NOBLOCK, NOBLOCK_MORE, has_input, receive, send, send_part
from vtriune.transport.reactor import Reactor
from vtriune.transport.security import Security
from vtriune.transport.wire import Back, Call, Done, ErrorNote, Fault, Gone, Limits, Payload, PeerRef, Reply

logger = logging.getLogger("vtriune.runtime")

_DONE_BATCH = 64
_REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)


class CallReceiver(Protocol):
    """What the process does with calls. Called under the reactor's lock: must not block."""

    def on_call(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        """Start a call; it ends with the session's `answer`."""
        ...

    def on_cancel(self, session: Session, call_id: int) -> None:
        """The caller gave up."""
        ...


class NewsReceiver(Protocol):
    """What the process does with news of other processes. Called under the reactor's lock: must not block."""

    def on_gone(self, gone: Gone) -> int:
        """A process somewhere has failed; returns the number of calls that ended so."""
        ...

    def on_back(self, back: Back) -> None:
        """It runs again."""
        ...


class Session:
    """One peer's link into this inbox; it outlives a dropped connection."""

    __slots__ = ("_inbox", "done_ids", "has_been_refused", "identity", "last_id", "num_unfinished", "peer")

    def __init__(self, inbox: Inbox, identity: bytes, peer: PeerRef) -> None:
        self._inbox = inbox
        self.identity = identity
        self.peer = peer
        self.last_id = 0
        self.num_unfinished = 0
        self.has_been_refused = False
        self.done_ids: list[int] = []

    def answer(self, call: Call, answer: Payload | ErrorNote) -> None:
        """End a call: with a value, which is a payload of one item, or an exception; a one-way call with neither."""
        if call.oneway:
            self._inbox.done_soon(self, call.id)
        elif isinstance(answer, ErrorNote):
            self._inbox.send(self, wire.encode(Fault(call.id, answer)), ())
        else:
            header = wire.encode(Reply(call.id, msgspec.Raw(answer.body), answer.blobs))
            self._inbox.send(self, header, answer.frames)

    def flush_done(self) -> None:
        """Send the batch."""
        ids, self.done_ids = self.done_ids, []
        if ids:
            self._inbox.send(self, wire.encode(Done(tuple(ids))), (), num_answered=0)


class Inbox:
    """The bound socket, and the sessions of the peers that introduced themselves."""

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        incarnation: int,
        news: NewsReceiver,
        security: Security | None,
        address: str,
    ) -> None:
        self._reactor = reactor
        self._limits = limits
        self._incarnation = incarnation
        self._news = news
        self.calls: CallReceiver | None = None
        """None in a process that hosts no actors."""
        self._by_identity: dict[bytes, Session] = {}
        self._by_link: dict[tuple[str, int], Session] = {}
        self._undone: dict[Session, None] = {}
        self.num_refused = 0
        self.socket: Any = reactor.context.socket(zmq.ROUTER)
        own = {zmq.RCVHWM: 2 * limits.credit_messages, zmq.LINGER: 200, zmq.ROUTER_MANDATORY: 1, zmq.BACKLOG: 1024}
        set_options(self.socket, limits, own)
        self._monitor: Monitor | None = None
        if security is not None:
            security.secure_server(self.socket)
            self._monitor = Monitor(reactor, self.socket, sum(_REFUSALS), self._count_refusal)
        self.fd = int(self.socket.getsockopt(zmq.FD))
        self.socket.bind(address)
        # Where peers connect to: a port of 0 is resolved.
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        reactor.register(self)

    def read_one(self, is_likely: bool) -> bool:
        """Handle one message; without one, send what is owed for finished one-way calls.

        True after either: a send may hide a message that has just come, so one more look has to follow.
        """
        parts = receive(self.socket, 2, self._limits.frames, is_likely)
        if parts is None:
            if not self._undone:
                return False
            self._flush_done()
            return True
        self._handle(parts)
        return True

    def _handle(self, parts: list[Any]) -> None:
        identity = parts[0]
        session = self._by_identity.get(identity)
        try:
            if len(parts) < 2 or len(parts[1]) > self._limits.header_bytes:
                raise wire.WireError("no header, or one over the limit")
            message = wire.decode(parts[1])
        except wire.WireError as error:
            self._refuse(identity, session, str(error))
            return
        if type(message) is Call and session is not None:
            self._accept(session, message, parts)
        elif isinstance(message, wire.Hello):
            self._greet(identity, message)
        elif session is None:
            self._refuse(identity, None, "say Hello first")
        elif isinstance(message, wire.Cancel):
            if self.calls is not None:
                self.calls.on_cancel(session, message.id)
        elif isinstance(message, Gone):
            self._news.on_gone(message)
        elif isinstance(message, Back):
            self._news.on_back(message)
        else:
            self._refuse(identity, session, f"{type(message).__name__} is not for an inbox")

    def _accept(self, session: Session, call: Call, parts: list[Any]) -> None:
        if call.id <= session.last_id:
            # A broadcast sent again after a dropped connection: it has been executed.
            return
        session.last_id = call.id
        session.num_unfinished += 1
        if session.num_unfinished > self._limits.credit_messages:
            # A peer that overdraws its credit is not ours or is broken.
            reason = f"{self._limits.credit_messages} calls are unfinished"
        elif len(parts) - 2 > self._limits.frames:
            reason = f"more than {self._limits.frames} frames"
        elif self.calls is None:
            reason = "this process hosts no actors"
        else:
            self.calls.on_call(session, call, parts[2:])
            return
        session.answer(call, wire.refusal(f"{call.endpoint}: {reason}"))

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            self._refuse(
                identity, None, f"protocol {hello.protocol} is not {wire.PROTOCOL}: use one version of vtriune"
            )
            return
        key = (hello.sender.node, hello.link)
        session = self._by_link.get(key)
        if session is None:
            session = self._by_link[key] = Session(self, identity, hello.sender)
        self._by_identity.pop(session.identity, None)
        session.identity = identity
        self._by_identity[identity] = session
        credit = self._limits.credit_messages, self._limits.credit_bytes
        welcome = wire.Welcome(wire.PROTOCOL, os.getpid(), self._incarnation, session.last_id, *credit)
        self.send(session, wire.encode(welcome), (), num_answered=0)

    def _refuse(self, identity: bytes, session: Session | None, reason: str) -> None:
        """Strangers are counted and told nothing they could use; a known peer keeps its session, and the log names it
        once: garbage in numbers must not fill a disk."""
        self.num_refused += 1
        if session is None:
            with contextlib.suppress(zmq.ZMQError):
                send(self.socket, (identity, wire.encode(wire.Refused(reason))))
        elif not session.has_been_refused:
            session.has_been_refused = True
            logger.warning("refused a message from %s: %s; more of its kind are counted only", session.peer, reason)

    def send(self, session: Session, header: bytes, frames: Sequence[Any], num_answered: int = 1) -> None:
        """Send to a peer. An answer to a peer that is gone has no reader and is dropped."""
        with self._reactor.lock:
            session.num_unfinished -= num_answered
            if self.socket.closed:
                return
            try:
                if frames:
                    send(self.socket, (session.identity, header), frames)
                else:
                    send_part(self.socket, session.identity, NOBLOCK_MORE)
                    send_part(self.socket, header, NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
            if self._reactor.rereading is not self:
                self._reactor.check_after_send(self, has_input, is_likely=session.num_unfinished > 0)

    def done_soon(self, session: Session, call_id: int) -> None:
        """Tell the peer, with the next batch, that a one-way call has finished."""
        with self._reactor.lock:
            session.num_unfinished -= 1
            session.done_ids.append(call_id)
            self._undone[session] = None
            if len(session.done_ids) >= _DONE_BATCH:
                session.flush_done()
            else:
                self._reactor.check_after_send(self, has_input, is_likely=True)

    def _flush_done(self) -> None:
        sessions, self._undone = self._undone, {}
        for session in sessions:
            session.flush_done()

    def forget(self, node: str) -> None:
        """Drop the sessions of a process that is gone."""
        with self._reactor.lock:
            for key in [key for key in self._by_link if key[0] == node]:
                session = self._by_link.pop(key)
                self._by_identity.pop(session.identity, None)
                self._undone.pop(session, None)

    def _count_refusal(self, event: int) -> None:
        self.num_refused += 1

    def close(self) -> None:
        """Stop listening; answers already given are still delivered."""
        self._reactor.unregister(self)
        if self._monitor is not None:
            self._monitor.close()
        self.socket.close()
