"""The thread that starts this process's children and learns of their end at once. One per process that has children,
and in every worker, where it also watches the parent.

Children are started by this thread because the kernel ties "die with the parent" to the starting thread. Their exit
is seen through pidfds, without polling.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vtriune.transport.wire import FailureNote

if TYPE_CHECKING:
    from vtriune.runtime.node import Node

logger = logging.getLogger("vtriune.runtime")
TICK_S = 0.1


class Watched:
    """Something the watcher polls: a descriptor and what to do when it is readable."""

    def __init__(self, fd: int, on_readable: Callable[[], None]) -> None:
        self.fd = fd
        self.on_readable = on_readable


class Watcher:
    """A daemon thread with a selector, a queue of things to do, and a slow tick."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._on_wake)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._on_close: list[Callable[[], None]] = []
        self._is_closing = False
        self.parent: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="vtriune-watcher", daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], None]) -> None:
        """Run `job` on the watcher's thread."""
        self._jobs.put(job)
        os.eventfd_write(self._wake_fd, 1)

    def do_later(self, delay_s: float, job: Callable[[], None]) -> None:
        """Run `job` on the watcher's thread after `delay_s`, to the tick. Call on the watcher's thread."""
        self._timers.append((time.monotonic() + delay_s, job))

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` whenever `fd` is. Call on the watcher's thread."""
        self._selector.register(fd, selectors.EVENT_READ, on_readable)

    def unwatch(self, fd: int) -> None:
        """Stop. Call on the watcher's thread."""
        self._selector.unregister(fd)

    def on_close(self, action: Callable[[], None]) -> None:
        """Have `action` called when the process shuts down."""
        self._on_close.append(action)

    def report_to_parent(self, note: FailureNote) -> None:
        """Pass a failure to the owner of this process."""
        if self.parent is not None:
            send_note(self.parent, note)

    def _on_wake(self) -> None:
        os.eventfd_read(self._wake_fd)

    def _run(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(TICK_S):
                self._guard(key.data)
            while not self._jobs.empty():
                self._guard(self._jobs.get())
            now = time.monotonic()
            due = [job for when, job in self._timers if when <= now]
            self._timers = [(when, job) for when, job in self._timers if when > now]
            for job in due:
                self._guard(job)
            self._guard(self._node.reactor.tick)

    def _guard(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception:
            # This thread must outlive any single job: it is what notices every later failure.
            logger.exception("the watcher's job failed")

    def close(self) -> None:
        """End the children, then the thread."""
        for action in self._on_close:
            self._guard(action)
        self._is_closing = True
        if threading.current_thread() is not self._thread:
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join(timeout=5.0)


def exit_note(
    mesh: str, rank: int, host: str, pid: int, returncode: int, is_oom: bool, log_tail: tuple[str, ...]
) -> FailureNote:
    """The failure of a process that has ended with this return code (negative: killed by that signal)."""
    if returncode >= 0:
        return FailureNote(mesh, rank, host, pid, "exit", exit_code=returncode, log_tail=log_tail)
    cause = "oom" if is_oom and -returncode == signal.SIGKILL else "signal"
    return FailureNote(mesh, rank, host, pid, cause, signal=-returncode, log_tail=log_tail)


def send_note(control: socket.socket, message: msgspec.Struct) -> None:
    """Write one length-prefixed message to a control socket."""
    body = msgspec.msgpack.encode(message)
    control.sendall(struct.pack("<I", len(body)) + body)


def receive_note(control: socket.socket, limit: int = 64 << 20) -> bytes | None:
    """Read one length-prefixed message; None at end of file."""
    head = _read(control, 4)
    if head is None:
        return None
    (size,) = struct.unpack("<I", head)
    if size > limit:
        raise ValueError(f"a control message of {size} bytes exceeds {limit}")
    return _read(control, size)


def _read(control: socket.socket, size: int) -> bytes | None:
    parts = b""
    while len(parts) < size:
        try:
            part = control.recv(size - len(parts))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts += part
    return parts
