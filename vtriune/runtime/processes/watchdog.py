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

from vtriune.runtime import stacks, steps
from vtriune.runtime.node import this_node

logger = logging.getLogger("vtriune.runtime")


class Stall(msgspec.Struct, frozen=True):
    """How long nothing has moved, the last step of each work and how long ago it was, and every process's stacks by its title."""

    silent_s: float
    steps: list[tuple[str, float]]
    stacks: dict[str, str]

    def report(self) -> str:
        """The whole of it, for a terminal or a file."""
        parts = [f"No progress for {self.silent_s:.0f} s. What was last done, or begun and not ended since:"]
        parts += [f"  {step}, {age_s:.0f} s ago" for step, age_s in self.steps]
        parts += ["Where every process stands:"]
        parts += [f"\n== {title}\n{text}" for title, text in self.stacks.items()]
        return "\n".join(parts)


class ProgressWatchdog:
    """Calls `on_stall(Stall)`, on its own thread, once per stall: when no process of the run has told of a step for `stall_s`."""

    def __init__(self, stall_s: float, on_stall: Callable[[Stall], None]) -> None:
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._began = time.monotonic()
        self._reported = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vtriune-watchdog", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(min(1.0, self._stall_s / 4)):
            # Steps of an earlier run in this process are nobody's any more.
            last = {key: step for key, step in steps.latest().items() if step.at >= self._began}
            moved = max((step.at for step in last.values()), default=self._began)
            excused = max((step.until for step in last.values()), default=self._began)
            if time.monotonic() >= max(moved + self._stall_s, excused) and moved != self._reported:
                self._reported = moved
                self._report(time.monotonic() - moved, last)

    def _report(self, silent_s: float, last: steps.Steps) -> None:
        now = time.monotonic()
        # This process's own work says what is waited for, so it comes first; then the newest.
        ordered = sorted(last.items(), key=lambda item: (bool(item[0][0]), -item[1].at))
        told = [(f"{' '.join(filter(None, key))}: {step.what}", now - step.at) for key, step in ordered]
        try:
            collected = {"root": stacks.own_stacks(), **stacks.collect(this_node().folder)}
            self._on_stall(Stall(silent_s, told, collected))
        except Exception:
            # The watchdog must not die of what it reports: a second stall would go unseen.
            logger.exception("the stall report failed")

    def close(self) -> None:
        """Stop watching."""
        self._ending.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
