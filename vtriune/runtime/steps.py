"""What each process of a run got done last, and when: how the watchdog tells long work from a hang.

    a worker   report_step("training", "micro-batch 3 of 9") ── at most once a second, what has moved ──▶ its parent
    the root   report_step("controller", "trains version 4") ──▶ latest() ◀── ProgressWatchdog

Work is told where it is done, by whoever does it. A process that lives, answers calls and gets nothing done tells nothing.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from vtriune.runtime.bootstrap import Moved


class Step(NamedTuple):
    """How far a piece of work is. Times are of this process's monotonic clock."""

    what: str
    at: float
    until: float
    """No stall before: `at`, or the end of a deadline that the step has of its own."""


Steps = dict[tuple[str, str], Step]
"""By process, the empty name being this one, and by work."""

_latest: Steps = {}


def report_step(work: str, step: str, within_s: float = 0.0) -> None:
    """`work` of this process has come to `step`. Costs less than a microsecond, sends nothing by itself; call it on any thread.

    Args:
        work: What goes on side by side in a process (training, a checkpoint) has names of its own.
        step: What begins or has just been done, in words for the report of a stall.
        within_s: How long this step may take before it can be a stall, since something else ends it then.
    """
    _note("", work, step, within_s)


def latest() -> Steps:
    """The last step of every piece of work, of this process and those below it."""
    return _latest.copy()


def moved(told: Steps) -> list[Moved]:
    """The steps that are not in `told`, which is brought up to date."""
    steps = latest()
    news = [Moved(*key, step.what, step.until - step.at) for key, step in steps.items() if told.get(key) is not step]
    told.update(steps)
    return news


def heard(child: str, moved: Moved) -> None:
    """A child process tells of a step of its own, or of a process below it."""
    _note(f"{child}/{moved.who}" if moved.who else child, moved.work, moved.step, moved.within_s)


def ended(child: str) -> None:
    """A child process has ended, and with it all of its work."""
    for who, work in latest():
        if who == child or who.startswith(f"{child}/"):
            del _latest[who, work]
    _note(child, "process", "has ended", 0.0)


def _note(who: str, work: str, step: str, within_s: float) -> None:
    now = time.monotonic()
    _latest[who, work] = Step(step, now, now + within_s)
