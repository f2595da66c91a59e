"""Keys of a run, and the check of who connects. Used by every process of a run that binds anything but `ipc://`.

Every TCP socket of a run speaks CURVE. All servers of the run share one key pair, all clients another; both are made
by the root for this run alone and reach the workers over an inherited socket, never a command line or environment.
A client must know the server's public key to be heard at all and must hold the one client key on the allow-list;
anyone else is refused before a single byte of theirs is decoded, and counted by the inbox.
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import zmq
from zmq.utils.z85 import decode as z85_decode

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_DOMAIN = b"vtriune"
_POLL_MS = 200


class RunKeys(msgspec.Struct, frozen=True):
    """One key pair for servers, one for clients; Z85 text."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    def __repr__(self) -> str:
        return "RunKeys(...)"


def new_keys() -> RunKeys:
    """Fresh keys from libsodium."""
    return RunKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


class Security:
    """Applies a run's keys to sockets and answers libzmq's question whether a client may come in."""

    def __init__(self, context: zmq.Context[Any], keys: RunKeys) -> None:
        self._keys = keys
        self._allowed = {z85_decode(keys.client_public)}
        self._is_closing = False
        self._socket: Any = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ADDRESS)
        # Of its own, because a handshake must not wait for a busy asyncio loop.
        self._thread = threading.Thread(target=self._serve, name="vtriune-zap", daemon=True)
        self._thread.start()

    def secure_server(self, socket: Any) -> None:
        """Require CURVE of every client, and a key on the allow-list."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.server_secret)

    def secure_client(self, socket: Any) -> None:
        """Show the run's client key, and demand the run's server key of the other end."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.client_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.client_secret)

    def _serve(self) -> None:
        while not self._is_closing:
            if self._socket.poll(_POLL_MS):
                self._socket.send_multipart(self.answer(self._socket.recv_multipart()))
        self._socket.close()

    def answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to one ZAP 1.0 request: 200 for an allowed CURVE key in our domain, 400 for anything else."""
        request_id = request[1] if len(request) > 1 else b""
        is_allowed = (
            len(request) == 7
            and request[0] == b"1.0"
            and request[2] == _DOMAIN
            and request[5] == b"CURVE"
            and request[6] in self._allowed
        )
        status = (b"200", b"OK") if is_allowed else (b"400", b"unknown key")
        return [b"1.0", request_id, *status, b"", b""]

    def close(self) -> None:
        """End the thread. Call before the context goes."""
        self._is_closing = True
        self._thread.join()
