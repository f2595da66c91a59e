"""Where a run's time goes: the parts of the time between two lines of `metrics.jsonl`, and shares of it. For interval and fleet.

    line 7 ──record──checkpoint──wait──train──publish──evaluate──▶ line 8

Pure logic but for the clock. Times are in seconds.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal, get_args

Part = Literal["wait", "train", "publish", "evaluate", "record", "checkpoint", "other"]


class Stopwatch:
    """The time of one task, which does one thing at a time: every moment belongs to exactly one part, so that the parts sum up to the
    whole by construction. What is in no `on` is `other`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self._part: Part = "other"
        self._since = clock()

    @contextlib.contextmanager
    def on(self, part: Part) -> Iterator[None]:
        """The time inside the block is that part's; where blocks are nested, the inner one's."""
        outer = self._part
        self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(outer)

    def take(self) -> dict[str, float]:
        """`time/<part>_s` since the last call, for every part, and their sum `time/step_s`."""
        self._turn_to(self._part)
        spent, self._spent = self._spent, dict.fromkeys(get_args(Part), 0.0)
        return {**{f"time/{part}_s": seconds for part, seconds in spent.items()}, "time/step_s": sum(spent.values())}

    def _turn_to(self, part: Part) -> None:
        now = self._clock()
        self._spent[self._part] += now - self._since
        self._part, self._since = part, now


class Busy:
    """The share of the time in which at least one of several overlapping pieces of work ran. Pure logic: times in seconds on the
    caller's clock.

    Work is told of when it ends; what still runs at a reading counts in the next one, from that reading on.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._intervals: list[tuple[float, float]] = []

    def ended(self, seconds: float, now: float) -> None:
        """A piece of work that took `seconds` has ended."""
        self._intervals.append((max(now - seconds, self._since), now))

    def take_idle_share(self, now: float) -> float:
        """1 − busy / elapsed since the last reading; 0 when no time has passed."""
        busy_s, covered_until = 0.0, self._since
        for begin, end in sorted(self._intervals):
            busy_s += max(end - max(begin, covered_until), 0.0)
            covered_until = max(covered_until, end)
        elapsed_s, self._since, self._intervals = now - self._since, now, []
        return 1.0 - busy_s / elapsed_s if elapsed_s > 0 else 0.0
