"""What a call returns: `await` it in asyncio code, `.get()` it elsewhere. Made by endpoints, settled by links.

A value is decoded by the thread that takes it, not by the one that reads the socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from vtriune.runtime.failure import error_from_note
from vtriune.runtime.shape import Extent, ValueMesh
from vtriune.transport.codec import Schema
from vtriune.transport.link import Link
from vtriune.transport.reactor import Reactor
from vtriune.transport.wire import ErrorNote, PeerRef

R = TypeVar("R")
logger = logging.getLogger("vtriune.runtime")


class _Unseen:
    """Logs an error that is forgotten before anyone has looked at it. An object of its own, since a finalizer on the future
    would cost every call."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __del__(self) -> None:
        if self.error is not None:
            logger.error("a call failed and nobody looked at its future: %s", self.error)


class Future(Generic[R]):
    """A value to come.

    `get(timeout=)` blocks a plain thread; `await` suspends a coroutine. Both may be used again and return the same
    value. A task cancelled while awaiting cancels the call at the callee, and so does `cancel()`.
    """

    # The state of a future that no one waits for yet; most are settled without needing more of their own.
    is_done = False
    _error: BaseException | None = None
    _value: Any = None
    _is_seen = False
    _unseen: _Unseen | None = None
    _waiters: tuple[asyncio.Future[None], ...] = ()
    _callbacks: tuple[Callable[[Future[Any]], None], ...] = ()

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def done(self) -> bool:
        """Whether a value or an error is there."""
        return self.is_done

    def get(self, timeout: float | None = None) -> R:
        """Block until the value is there.

        Args:
            timeout: Seconds to wait; the call itself goes on afterwards, `get` may be called again.

        Raises:
            TimeoutError: not there in time.
            RuntimeError: called in asyncio code, where it would stop the loop.
        """
        if not self.is_done and not self._reactor.wait(self.done, timeout, self._is_near()):
            raise TimeoutError(f"no answer within {timeout} s from {self._whom()}")
        return self._take()

    def __await__(self) -> Generator[Any, None, R]:
        if not self.is_done:
            self._reactor.attach_running_loop()
            waiter = asyncio.get_running_loop().create_future()
            with self._reactor.lock:
                if self.done():
                    waiter.set_result(None)
                else:
                    self._waiters = (*self._waiters, waiter)
            try:
                yield from waiter.__await__()
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self._take()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error, or None for a value; blocks like `get`."""
        try:
            self.get(timeout)
        except Exception as error:
            # Whatever the call ended in is what was asked for; a timeout of our own is not an outcome.
            if not self.is_done:
                raise
            return error
        return None

    def cancel(self) -> None:
        """Stop waiting and tell the callee to stop working on it. Harmless once done."""
        with self._reactor.lock:
            if self.is_done:
                return
            self._abandon()
            self.mark_seen()
            self._settle(error=asyncio.CancelledError("cancelled by the caller"))

    def add_done_callback(self, callback: Callable[[Future[R]], None]) -> None:
        """Have `callback(self)` called once done: at once, or by the thread that reads the sockets; it must not block."""
        with self._reactor.lock:
            if not self.is_done:
                self._callbacks = (*self._callbacks, callback)
                return
        callback(self)

    def _abandon(self) -> None:
        """Tell the callee; nothing to tell here."""

    def _is_near(self) -> bool:
        """Whether the value may be one round trip away."""
        return False

    def _whom(self) -> str:
        return "the mesh"

    def mark_seen(self) -> None:
        """An error of this future is, or will be, known to somebody: it need not be logged."""
        self._is_seen = True
        if self._unseen is not None:
            self._unseen.error = None

    def _take(self) -> R:
        if self._error is not None:
            self.mark_seen()
            raise self._error
        value: R = self._value
        return value

    def _settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Set the outcome; only the first counts."""
        with self._reactor.lock:
            if self.is_done:
                return
            self._value, self._error = value, error
            if error is not None and not self._is_seen:
                self._unseen = _Unseen(error)
            self.is_done = True
            self._reactor.notify()
            if not self._waiters and not self._callbacks:
                return
            waiters, self._waiters = self._waiters, ()
            running = asyncio._get_running_loop()
            for waiter in waiters:
                loop = waiter.get_loop()
                if loop is running:
                    _wake(waiter)
                elif not loop.is_closed():
                    loop.call_soon_threadsafe(_wake, waiter)
            callbacks, self._callbacks = self._callbacks, ()
        for callback in callbacks:
            callback(self)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class CallFuture(Future[R]):
    """The value of one call to one rank."""

    _raw: tuple[msgspec.Raw, Sequence[Any], Sequence[int]] | None = None
    # The call's number on its link, by which it is cancelled; 0 until it has been submitted.
    call_id = 0

    def __init__(self, reactor: Reactor, endpoint: str, peer: PeerRef, schema: Schema, link: Link) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        self._peer = peer
        self._schema = schema
        self._link = link

    def _abandon(self) -> None:
        self._link.cancel(self.call_id)

    def _is_near(self) -> bool:
        return len(self._link.credit.by_id) == 1

    def resolve(self, value: msgspec.Raw | None, parts: Sequence[Any], blobs: Sequence[int]) -> None:
        """From the link: the encoded result, and the parts of its message."""
        if self.is_done:
            return
        self._raw = None if value is None else (value, parts, blobs)
        if self._waiters or self._callbacks:
            self._settle()
        else:
            self.is_done = True
            self._reactor.notify()

    def fail(self, error: Exception | ErrorNote) -> None:
        """From the link: an error."""
        self._settle(
            error=error_from_note(error, self._endpoint, self._peer) if isinstance(error, ErrorNote) else error
        )

    def _whom(self) -> str:
        return f"{self._endpoint} at {self._peer}"

    def _take(self) -> R:
        if self._raw is not None:
            (value, parts, blobs), self._raw = self._raw, None
            try:
                self._value = self._schema.unpack(value, parts[1:], blobs)[0]
            except Exception as error:
                # A result that does not fit its annotation is this future's error, now and on later takes.
                self._error = error
        if self._error is not None:
            return super()._take()
        taken: R = self._value
        return taken


class GatherFuture(Future[ValueMesh[R]]):
    """The values of a call to every rank: done when all are in, or at the first error."""

    def __init__(self, reactor: Reactor, extent: Extent, parts: Sequence[CallFuture[R]]) -> None:
        super().__init__(reactor)
        self._extent = extent
        self._parts = parts
        self._num_missing = len(parts)
        for part in parts:
            part.add_done_callback(self._on_part)

    def _abandon(self) -> None:
        for part in self._parts:
            part.cancel()

    def _on_part(self, part: CallFuture[R] | Future[R]) -> None:
        with self._reactor.lock:
            self._num_missing -= 1
            is_last = self._num_missing == 0
        if part._error is not None:
            part.mark_seen()
            self._settle(error=part._error)
        elif is_last:
            self._settle()

    def _whom(self) -> str:
        return ", ".join(part._whom() for part in self._parts if not part.done())

    def _take(self) -> ValueMesh[R]:
        if self._error is None and self._value is None:
            self._value = ValueMesh(self._extent, [part._take() for part in self._parts])
        return super()._take()


class Stream(Generic[R]):
    """Replies of every rank as they arrive: iterate for futures that are done, `async for` over the values."""

    def __init__(self, reactor: Reactor, parts: Sequence[CallFuture[R]]) -> None:
        self._reactor = reactor
        self._num_left = len(parts)
        self._arrived: list[CallFuture[R]] = []
        self._waiter: Future[None] = Future(reactor)
        for part in parts:
            part.add_done_callback(self._on_part)

    def _on_part(self, part: Future[R]) -> None:
        with self._reactor.lock:
            self._arrived.append(part)  # type: ignore[arg-type]
            self._waiter._settle()

    def _next(self) -> CallFuture[R] | Future[None]:
        with self._reactor.lock:
            if self._arrived:
                return self._arrived.pop(0)
            self._waiter = Future(self._reactor)
            return self._waiter

    def __iter__(self) -> Iterator[Future[R]]:
        while self._num_left:
            item = self._next()
            if isinstance(item, CallFuture):
                self._num_left -= 1
                yield item
            else:
                item.get()

    async def __aiter__(self) -> AsyncIterator[R]:
        while self._num_left:
            item = self._next()
            if isinstance(item, CallFuture):
                self._num_left -= 1
                yield await item
            else:
                await item
