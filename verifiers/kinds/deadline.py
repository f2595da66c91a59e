"""A deadline for code in the main thread of a process that nobody else watches.

It interrupts Python bytecode only: a loop inside C code outlives it. The pool therefore does not rely on it, and kills instead.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class DeadlineError(BaseException):
    """Raised in the guarded code. Not an Exception: sympy catches those in many places and goes on."""


def _expire(_signal: int, _frame: object) -> None:
    raise DeadlineError


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise DeadlineError in the body after `seconds`; off the main thread, or where a timer runs already, never."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return
    before = signal.signal(signal.SIGALRM, _expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
