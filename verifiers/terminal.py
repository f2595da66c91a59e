"""Output that nobody has to read: a terminal that was closed, a pipe without a reader, a full disk or letters that the terminal does
not know never end the program that writes; and Ctrl-C is no error to be traced. Every command line opens its output here first, and
every worker process its log.
"""

import atexit
import contextlib
import io
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

NUM_WAITING = 1000
"""Writes that may wait for a slow reader."""
DRAIN_S = 2.0
"""How long the end of a program waits for its last lines to be taken."""


def open_output(*, encoding: str | None = None, waits: bool = True) -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that never raise; a letter that is not in their encoding becomes "?".

    encoding  in place of the terminal's
    waits     off: a reader that takes nothing (Ctrl-S, a pager, a dead connection) does not hold the program up; beyond
              `NUM_WAITING` writes output is lost. On: it waits, as is right for a program that only prints
    """
    _output.backlog = None if waits else _Backlog()
    # In the background of a terminal that stops whoever writes to it (`stty tostop`), what is ignored is written all the same.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Closed before Python started.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        raw = io.BufferedWriter(_Stream(stream.fileno()))
        text = io.TextIOWrapper(raw, encoding or stream.encoding, errors="replace", line_buffering=True)
        setattr(sys, name, text)
    sys.excepthook = _tell
    atexit.register(drain)


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What ended the program."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def lost() -> str:
    """Why something could not be written, for the first time; empty while everything was."""
    return _output.lost


def drain() -> None:
    """Return once all output is taken, or `DRAIN_S` later. Called at exit; call it before `os._exit`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # A closed one.
            stream.flush()
    backlog, _output.backlog = _output.backlog, None
    if backlog is not None and not backlog.has_taken_all(DRAIN_S):
        _output.is_over = True


class _Output:
    """What both streams share."""

    lost = ""
    backlog: "_Backlog | None" = None
    is_over = False
    """Its reader was waited for in vain: whatever is still written would block the exit."""


_output = _Output()


class _Stream(io.RawIOBase):
    """A file descriptor; what it does not take counts as written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = bytes(data)
        if _output.backlog is not None:
            _output.backlog.give(lambda: self._put(content))
        elif not _output.is_over:
            self._put(content)
        return len(content)

    def _put(self, content: bytes) -> None:
        try:
            while content:
                try:
                    content = content[os.write(self._descriptor, content) :]
                except BlockingIOError:  # Another program has set the terminal so.
                    select.select([], [self._descriptor], [])
        except OSError as error:
            _output.lost = _output.lost or str(error.strerror)


class _Backlog(threading.Thread):
    """Writes in order, on a thread that may be blocked for ever."""

    def __init__(self) -> None:
        super().__init__(name="output", daemon=True)
        self._writes: queue.Queue[Callable[[], None]] = queue.Queue(NUM_WAITING)
        self.start()

    def give(self, write: Callable[[], None]) -> None:
        try:
            self._writes.put_nowait(write)
        except queue.Full:
            _output.lost = _output.lost or "nobody reads it"

    def has_taken_all(self, within_s: float) -> bool:
        end = time.monotonic() + within_s
        while self._writes.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)
        return not self._writes.unfinished_tasks

    def run(self) -> None:
        while True:
            self._writes.get()()
            self._writes.task_done()
