"""The thread that starts this process's children and learns of their end at once. One per process that has children.

Children are started by this thread because the kernel ties "die with the parent" to the starting thread, which must
live as long as the process. Their exit is seen through pidfds, without polling.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from vtriune.runtime.bootstrap import LEFT_TO_ROOT
from vtriune.runtime.memory_kills import MemoryKills

logger = logging.getLogger("vtriune.runtime")

TICK_S = 0.1
_SAMPLE_EVERY_S = 1.0


class ProcessWatcher:
    """A daemon thread with a selector, a queue of things to do, and a slow tick.

    Args:
        on_tick: Called every `TICK_S`, more or less.
    """

    def __init__(self, on_tick: Callable[[], None]) -> None:
        self._on_tick = on_tick
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, lambda: os.eventfd_read(self._wake_fd))
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._at_close: list[Callable[[], None]] = []
        self.memory_kills = MemoryKills()
        self._sampled_at = 0.0
        self._is_closing = False
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
        """Stop; harmless for one that is not watched. Call on the watcher's thread, before closing `fd`."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def at_close(self, action: Callable[[], None]) -> None:
        """Have `action` called when the process shuts down."""
        self._at_close.append(action)

    def _run(self) -> None:
        # Children start with what is blocked here, and so lose no race between their start and their own handling of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_ROOT)
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
            if now - self._sampled_at > _SAMPLE_EVERY_S:
                self._sampled_at = now
                self._guard(self.memory_kills.sample)
            self._guard(self._on_tick)
        self._selector.close()
        os.close(self._wake_fd)

    def _guard(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception:
            # This thread must outlive any single job: it is what notices every later failure.
            logger.exception("the watcher's job failed")

    def close(self) -> None:
        """End the children, then the thread."""
        for action in self._at_close:
            self._guard(action)
        if threading.current_thread() is self._thread:
            self._is_closing = True
        elif self._thread.is_alive():
            # The thread may end by itself meanwhile, and with it what wakes it.
            with contextlib.suppress(OSError):
                self.do(self._end)
            self._thread.join(timeout=5.0)

    def _end(self) -> None:
        self._is_closing = True
