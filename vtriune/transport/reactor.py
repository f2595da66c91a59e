"""The sockets of one process and the threads that read them. Used by links and inboxes, and by futures that wait.

Every socket is guarded by `lock`; any thread may send. No thread exists only to read, since passing a message on from it to
the thread that waits would cost as much as the message. A thread that waits reads all sockets meanwhile: the one with the
asyncio loop, once a coroutine has made a call (the loop watches one epoll descriptor that stands for all sockets), or else
one of those blocked in `Future.get`, the leader (pattern leader and followers). While there is neither, the process's
watcher thread reads at every tick. libzmq's own thread keeps connections and heartbeats alive all the while.

Handlers run under the lock, must not block and run no user code; what they `defer` runs right after, without the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

_RECHECK_S = 0.25
_EVENTS_AT_ONCE = 64
# How long a thread stays awake for an answer; a yield that takes _SLICE_S went to another thread's work.
_AWAKE_S = 300e-6
_SLICE_S = 400e-6
_MAX_PENALTY = 4096
# Messages read from one socket before others get their turn.
_TURN = 256


class Channel(Protocol):
    """A socket the reactor reads."""

    fd: int
    socket: Any

    def read_one(self, is_likely: bool) -> bool:
        """Handle one message; False when there was none and nothing was sent meanwhile, which also rearms the descriptor.
        `is_likely`: its descriptor has just said that there is one, or several have just been read."""
        ...


class Timer:
    """A pending `call_later`; `cancel()` makes it do nothing."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Forget the action. Harmless when it has run."""
        self.action = None


class Reactor:
    """Owns the ZeroMQ context and the epoll set of one process."""

    def __init__(self) -> None:
        self.context = zmq.Context(io_threads=1)
        self.context.set(zmq.MAX_SOCKETS, 65535)
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._num_waiting = 0
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._channels: dict[int, Channel] = {}
        self._ready: dict[Channel, None] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_order = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._loop_due = False
        self._leader = 0
        # How many of the next waits for a near answer sleep at once, and how many did last.
        self._num_asleep = 0
        self._penalty = 1
        self._promoted: set[int] = set()
        # The promoted channel being read: it will be looked at again, whatever is sent meanwhile.
        self.rereading: Channel | None = None
        self._deferred: deque[Callable[[], None]] = deque()
        # `defer(action)`: run `action` after the handlers of this round, in order, on the thread that ran them.
        self.defer = self._deferred.append
        self.is_closed = False

    def register(self, channel: Channel) -> None:
        """Start reading a socket."""
        with self.lock:
            self._channels[channel.fd] = channel
            self._epoll.register(channel.fd, select.EPOLLIN)
            self.mark_ready(channel)

    def unregister(self, channel: Channel) -> None:
        """Stop reading a socket; call before closing it."""
        with self.lock:
            if self._channels.pop(channel.fd, None) is not None and channel.fd not in self._promoted:
                self._epoll.unregister(channel.fd)
            self._ready.pop(channel, None)

    def promote(self, channel: Channel) -> None:
        """Have the running loop watch this channel's descriptor itself, which saves a system call a message. For one
        that is read by this loop as long as it lives. Call on the loop's thread."""
        self.attach_running_loop()
        with self.lock:
            if self._loop is not None and channel.fd not in self._promoted:
                self._epoll.unregister(channel.fd)
                self._promoted.add(channel.fd)
                self._loop.add_reader(channel.fd, self._read, channel)

    def _read(self, channel: Channel) -> None:
        """Read a promoted channel message by message, running what each deferred before looking for the next: the last
        look, which finds nothing, then also covers what was sent meanwhile."""
        deferred = self._deferred
        has_read = True
        try:
            for number in range(_TURN):
                with self.lock:
                    has_read = self._channels.get(channel.fd) is channel and channel.read_one(number != 1)
                    self.rereading = channel if has_read else None
                while deferred:
                    deferred.popleft()()
                if not has_read:
                    return
        finally:
            # Also when something raised: the look that senders rely on is still owed.
            if has_read:
                with self.lock:
                    self.rereading = None
                    self.mark_ready(channel)

    def run_deferred(self) -> None:
        """Run what was deferred. For those who defer outside a handler; never under the lock."""
        while self._deferred:
            self._deferred.popleft()()

    def mark_ready(self, channel: Channel) -> None:
        """Note that a socket has input although its descriptor may not say so: libzmq's descriptors are
        edge-triggered, and a send can consume the edge."""
        self._ready[channel] = None
        self.wake()

    def check_after_send(self, channel: Channel, has_input: Callable[[Any], bool], is_likely: bool) -> None:
        """Look for input that a send may have hidden, now or at the next read, whichever is sooner and cheaper.

        `is_likely` tells that the next read will find something anyway. Callers hold the lock.
        """
        if self.rereading is channel:
            return
        if self._loop is None or not self._loop.is_running():
            self._ready[channel] = None
            if self._leader not in (0, threading.get_ident()):
                os.eventfd_write(self._wake_fd, 1)
        elif is_likely or has_input(channel.socket):
            self.mark_ready(channel)

    def wake(self) -> None:
        """Have the thread that reads run `drain` soon. Callers hold the lock."""
        thread = threading.get_ident()
        if self._loop is not None and self._loop.is_running():
            if thread != self._loop_thread:
                os.eventfd_write(self._wake_fd, 1)
            elif not self._loop_due:
                self._loop_due = True
                self._loop.call_soon(self._drain_from_loop)
        elif self._leader not in (0, thread):
            os.eventfd_write(self._wake_fd, 1)

    def attach_running_loop(self) -> None:
        """Let the calling thread's running asyncio loop, if any, read the sockets from now on."""
        loop = asyncio._get_running_loop()
        if loop is not None and loop is not self._loop:
            with self.lock:
                current = self._loop
                if current is None or not current.is_running():
                    if current is not None and not current.is_closed():
                        current.remove_reader(self._epoll.fileno())
                    self._loop, self._loop_thread, self._loop_due = loop, threading.get_ident(), False
                    loop.add_reader(self._epoll.fileno(), self._drain_from_loop)
                    loop.call_soon(self._drain_from_loop)
                    self._loop_due = True

    def _drain_from_loop(self) -> None:
        self._loop_due = False
        self.drain()

    def drain(self) -> None:
        """Handle all input at hand and due timers, without blocking."""
        with self.lock:
            if not self.is_closed:
                self._take_in(self._epoll.poll(0))
        self.run_deferred()

    def _take_in(self, events: Sequence[tuple[int, int]]) -> None:
        """Handle input and due timers. Every channel is read until it is found empty: its descriptor tells of the next
        message only then."""
        ready, self._ready = self._ready, {}
        for fd, _ in events:
            channel = self._channels.get(fd)
            if channel is not None:
                if ready:
                    ready.pop(channel, None)
                self._drain_channel(channel, True)
            elif fd == self._wake_fd:
                # Another thread may have cleared it between our poll and this read.
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
        for channel in ready:
            self._drain_channel(channel, False)
        if self._timers:
            self._run_timers()

    def _drain_channel(self, channel: Channel, has_said_so: bool) -> None:
        for number in range(_TURN):
            is_likely = number > 1 or (has_said_so and not number)
            if self._channels.get(channel.fd) is not channel or not channel.read_one(is_likely):
                return
        self.mark_ready(channel)

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Run `action` under the lock after `delay_s`, or up to a tick later while no thread waits or runs a loop."""
        timer = Timer(action)
        with self.lock:
            due = time.monotonic() + delay_s
            heapq.heappush(self._timers, (due, next(self._timer_order), timer))
            if self._timers[0][2] is timer:
                loop = self._loop
                if loop is not None and loop.is_running() and threading.get_ident() == self._loop_thread:
                    loop.call_later(delay_s, self._drain_from_loop)
                else:
                    self.wake()
        return timer

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].action is None):
            action = heapq.heappop(self._timers)[2].action
            if action is not None:
                action()
        loop = self._loop
        if self._timers and loop is not None and loop.is_running() and threading.get_ident() == self._loop_thread:
            loop.call_later(self._timers[0][0] - now, self._drain_from_loop)

    def notify(self) -> None:
        """Something a blocked thread may wait for has changed. Callers hold the lock."""
        if self._num_waiting:
            self._changed.notify_all()
        if self._leader not in (0, threading.get_ident()):
            os.eventfd_write(self._wake_fd, 1)

    def wait(self, is_done: Callable[[], bool], timeout_s: float | None, is_near: bool = False) -> bool:
        """Block this thread until `is_done()` or the timeout, reading the sockets where no other thread does. `is_near`: it
        may well be one round trip away.

        Raises RuntimeError: called on a thread that runs an asyncio loop; blocking would stop the loop.
        """
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("blocking here would stop this thread's asyncio loop: use `await` instead")
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self.lock:
                if is_done():
                    return True
                remaining_s = None if end is None else end - time.monotonic()
                if remaining_s is not None and remaining_s <= 0:
                    return False
                if self._leader or (self._loop is not None and self._loop.is_running()):
                    self._num_waiting += 1
                    # A loop may end without telling: look again soon rather than wait for it for ever.
                    self._changed.wait(_RECHECK_S if remaining_s is None else min(remaining_s, _RECHECK_S))
                    self._num_waiting -= 1
                    continue
                self._leader = threading.get_ident()
                poll_s = 0.0 if self._ready else self._poll_s(remaining_s)
            self._lead(poll_s, is_near)

    def _lead(self, poll_s: float, is_near: bool) -> None:
        """Read for everybody, once. What is marked ready is looked at first: more often than not that saves a system
        call."""
        try:
            if is_near and poll_s and not self._num_asleep:
                events = self._stay_awake(poll_s)
            else:
                if is_near and self._num_asleep:
                    self._num_asleep -= 1
                events = self._epoll.poll(poll_s, _EVENTS_AT_ONCE) if poll_s else []
            with self.lock:
                if not self.is_closed:
                    self._take_in(events)
        finally:
            with self.lock:
                self._leader = 0
                if self._num_waiting:
                    self._changed.notify_all()
        if self._deferred:
            self.run_deferred()

    def _stay_awake(self, timeout_s: float) -> list[tuple[int, int]]:
        """What the descriptors say within the timeout, for an answer that may be near.

        Falling asleep and being woken by another processor costs as much as a whole call. So this stays awake for a
        few round trips first, giving way to any thread that can run, until it finds the answer far or that others want
        the processor; then it sleeps, and so do, at once, twice as many of the next waits each time. Not for streams
        of messages: there it would take from those that carry them.
        """
        start = before = time.monotonic()
        while not (events := self._epoll.poll(0, _EVENTS_AT_ONCE)):
            os.sched_yield()
            now = time.monotonic()
            if now - before > _SLICE_S or now - start > min(_AWAKE_S, timeout_s):
                self._penalty = min(2 * self._penalty, _MAX_PENALTY)
                self._num_asleep = self._penalty
                return self._epoll.poll(max(0.0, start + timeout_s - now), _EVENTS_AT_ONCE)
            before = now
        self._penalty = max(1, self._penalty - 1)
        return events

    def _poll_s(self, remaining_s: float | None) -> float:
        until_timer_s = self._timers[0][0] - time.monotonic() if self._timers else 3600.0
        return max(0.0, until_timer_s if remaining_s is None else min(remaining_s, until_timer_s))

    def tick(self) -> None:
        """Called every so often by the process's watcher thread: drains when no other thread reads."""
        if self._leader or (self._loop is not None and self._loop.is_running()):
            with self.lock:
                if self._timers and self._timers[0][0] <= time.monotonic():
                    os.eventfd_write(self._wake_fd, 1)
            return
        self.drain()

    def close(self) -> None:
        """Release everything. Sockets must have been closed."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._epoll.fileno())
            self._changed.notify_all()
        self.context.destroy(linger=0)
        self._epoll.close()
        os.close(self._wake_fd)
