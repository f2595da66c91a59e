"""Notices that a run has stopped making progress, and shows where every process stands. Owned by the controller.

A stall is not a failure of any one process: nothing has died, nothing moves. So the watchdog does not decide; it
collects the Python stacks of all processes, writes them to their logs and hands one report to its owner.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from vtriune.runtime import stacks
from vtriune.runtime.node import this_node

logger = logging.getLogger("vtriune.runtime")


class Stall(msgspec.Struct, frozen=True):
    """How long nothing has moved, and every process's stacks by its title."""

    silent_s: float
    stacks: dict[str, str]

    def report(self) -> str:
        """The whole of it, for a terminal or a file."""
        parts = [f"No progress for {self.silent_s:.0f} s. Where every process stands:"]
        parts += [f"\n== {title}\n{text}" for title, text in self.stacks.items()]
        return "\n".join(parts)


class ProgressWatchdog:
    """Calls `on_stall(Stall)`, on its own thread, once per stall: when `progress()` was not called for `stall_s`."""

    def __init__(self, stall_s: float, on_stall: Callable[[Stall], None]) -> None:
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._last = time.monotonic()
        self._is_reported = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vtriune-watchdog", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Something moved."""
        self._last = time.monotonic()
        self._is_reported = False

    def _run(self) -> None:
        while not self._ending.wait(min(1.0, self._stall_s / 4)):
            silent_s = time.monotonic() - self._last
            if silent_s >= self._stall_s and not self._is_reported:
                self._is_reported = True
                self._report(silent_s)

    def _report(self, silent_s: float) -> None:
        try:
            collected = {"root": stacks.own_stacks(), **stacks.collect(this_node().folder)}
            self._on_stall(Stall(silent_s, collected))
        except Exception:
            # The watchdog must not die of what it reports: a second stall would go unseen.
            logger.exception("the stall report failed")

    def close(self) -> None:
        """Stop watching."""
        self._ending.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
