"""What signals ask of a run: to stop with a checkpoint, or to end at once. Used by launch around everything that a run does.

    Ctrl-C, SIGTERM, SIGHUP (a closed ssh session)    stop after the version in hand, with a checkpoint
    a later Ctrl-C or SIGTERM                         end at once

A signal that was ignored when the run started, as `nohup` has SIGHUP ignored, stays ignored. Workers leave all three to this process.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from verifiers import terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""Signals this close together are one request: `make`, a shell or a batch system pass on what the run itself got as well."""
END_S = 8.0
"""How long ending at once may take, processes being given five seconds; then this one ends as it is, and its children with it."""
INTERRUPTED = 130
"""Exit code after a second request."""


class StopSignals:
    """Enter in the running loop. `stop` is called there by the first signal; a later one raises KeyboardInterrupt.

    Until `stop` is set there is nothing to save: the first signal cancels the task that entered.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.stop: Callable[[], object] | None = None
        self._say = say
        self._asked_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._loop.call_soon_threadsafe(self._begin_to_stop)
        # Shell and kernel both say SIGHUP when a session ends: it never asks for more than the first did.
        elif number != signal.SIGHUP and now - self._asked_at > SAME_S:
            _end_soon()
            raise KeyboardInterrupt

    def _begin_to_stop(self) -> None:
        if self.stop is not None:
            self._say("stopping after the version in hand, with a checkpoint; once more to end at once")
            self.stop()
        elif self._task is not None:
            self._say("stopping before training has begun: there is nothing to save")
            # A thread that builds a store cannot be cancelled.
            _end_soon(0)
            self._task.cancel()


def _end_soon(exit_code: int = INTERRUPTED) -> None:
    def end() -> None:
        print(f"ended without waiting longer than {END_S:.0f} s for what was under way", file=sys.stderr)
        terminal.drain()
        os._exit(exit_code)

    last_resort = threading.Timer(END_S, end)
    last_resort.daemon = True
    last_resort.start()
