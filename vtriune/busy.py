"""Share of the time in which at least one of several overlapping pieces of work ran. Pure logic; the clock is an argument.

Work is told of when it ends; what still runs at a reading counts in the next one, from that reading on.
"""


class Busy:
    """The union of intervals, read out and begun anew by `take_idle_share`. Times in seconds on the caller's clock."""

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
