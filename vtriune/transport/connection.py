"""One ZeroMQ connection to a peer's inbox, with its monitor. Made by links, one after another when connections break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from vtriune.transport.frames import NOBLOCK, has_input, receive, send, send_part
from vtriune.transport.reactor import Reactor
from vtriune.transport.security import Security
from vtriune.transport.wire import Limits

HEARTBEAT_S = 5.0
SILENCE_S = 60.0

_REJECTED = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_LOST = (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)


def set_options(socket: Any, limits: Limits, own: dict[zmq.SocketOption, int]) -> None:
    """What the sockets of both ends have in common, and what is one's own. Credit bounds what waits to be sent, not libzmq."""
    common = {
        zmq.SNDHWM: 0,
        zmq.MAXMSGSIZE: limits.frame_bytes,
        zmq.HEARTBEAT_IVL: int(HEARTBEAT_S * 1000),
        zmq.HEARTBEAT_TIMEOUT: int(SILENCE_S * 1000),
    }
    for option, value in (common | own).items():
        socket.setsockopt(option, value)


class Connection:
    """A DEALER socket. `on_message` gets each message's parts; `on_lost(is_rejected)` is called when it has broken.

    Heartbeats are libzmq's own: its thread answers them even while Python computes, so their silence for `SILENCE_S`
    means a stopped process or a broken network, not a busy one.
    """

    def __init__(
        self,
        reactor: Reactor,
        limits: Limits,
        address: str,
        security: Security | None,
        on_message: Callable[[list[Any]], None],
        on_lost: Callable[[bool], None],
    ) -> None:
        self._reactor = reactor
        self._limits = limits
        self._on_message = on_message
        self._on_lost = on_lost
        socket = reactor.context.socket(zmq.DEALER)
        set_options(socket, limits, {zmq.RCVHWM: 0, zmq.LINGER: 0, zmq.RECONNECT_IVL: -1})
        if security is not None and not address.startswith("ipc://"):
            security.secure_client(socket)
        self.socket: Any = socket
        self.is_closed = False
        self.fd = int(socket.getsockopt(zmq.FD))
        self._monitor = Monitor(reactor, socket, sum({*_LOST, *_REJECTED}), self._on_event)
        socket.connect(address)
        reactor.register(self)

    def send(self, header: bytes, frames: Sequence[Any] = ()) -> None:
        """Send, or note that there is no connection to send on."""
        try:
            if frames:
                send(self.socket, (header,), frames)
            else:
                send_part(self.socket, header, NOBLOCK)
        except zmq.Again:
            # No pipe: the connection has gone, as its monitor is about to say. What was to go counts as sent on it.
            self._reactor.call_later(0.0, lambda: self._lost(is_rejected=False))

    def check_input(self, is_likely: bool) -> None:
        """To be called after sending."""
        if not self.is_closed:
            self._reactor.check_after_send(self, has_input, is_likely)

    def read_one(self, is_likely: bool) -> bool:
        """Handle one message; the handler may close this connection."""
        parts = receive(self.socket, 1, self._limits.frames, is_likely)
        if parts is None:
            return False
        self._on_message(parts)
        return not self.is_closed

    def _on_event(self, event: int) -> None:
        self._lost(is_rejected=event in _REJECTED)

    def _lost(self, *, is_rejected: bool) -> None:
        if not self.is_closed:
            self.close()
            self._on_lost(is_rejected)

    def close(self) -> None:
        """Drop it. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            self._reactor.unregister(self)
            self._monitor.close()
            self.socket.close(linger=0)


class Monitor:
    """Connection events of one socket."""

    def __init__(self, reactor: Reactor, socket: Any, events: int, on_event: Callable[[int], None]) -> None:
        self._reactor = reactor
        self._watched = socket
        self.socket: Any = socket.get_monitor_socket(events)
        self._on_event = on_event
        self.fd = int(self.socket.getsockopt(zmq.FD))
        reactor.register(self)

    def read_one(self, is_likely: bool) -> bool:
        """Pass on the next event; the handler may close this monitor."""
        if not has_input(self.socket):
            return False
        event = parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))["event"]
        if event != zmq.EVENT_MONITOR_STOPPED:
            self._on_event(int(event))
        return not self.socket.closed

    def close(self) -> None:
        """Stop watching. Call before closing the watched socket."""
        self._reactor.unregister(self)
        # Also closes the monitor's own socket, which pyzmq keeps.
        self._watched.disable_monitor()
        self.socket.close(linger=0)
