"""Idle shares and parts of the time, against the intervals they are told of."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from vtriune.run.stopwatch import Busy, Part, Stopwatch

TIMES = st.integers(0, 40)


@given(st.lists(st.tuples(TIMES, TIMES)))
def test_the_idle_share_is_what_no_interval_covers(pairs: list[tuple[int, int]]) -> None:
    intervals = sorted(((min(pair), max(pair)) for pair in pairs), key=lambda interval: interval[1])
    busy = Busy(0)
    for begin, end in intervals:
        busy.ended(end - begin, end)
    covered = {second for begin, end in intervals for second in range(begin, end)}
    assert abs(busy.take_idle_share(40) - (1 - len(covered) / 40)) < 1e-9


def test_readings_follow_each_other() -> None:
    busy = Busy(10.0)
    assert busy.take_idle_share(10.0) == 0.0, "no time has passed"
    busy.ended(1.0, 12.0)
    assert busy.take_idle_share(14.0) == 0.75
    assert busy.take_idle_share(15.0) == 1.0
    # Begun before the reading, told of after it: what lies after the reading counts.
    busy.ended(5.0, 17.0)
    assert busy.take_idle_share(19.0) == 0.5


@given(st.lists(st.tuples(st.sampled_from(get_args(Part)), st.lists(TIMES, min_size=3, max_size=3))))
def test_every_moment_belongs_to_the_innermost_part_around_it(pieces: list[tuple[Part, list[int]]]) -> None:
    now = 0

    def wait(seconds: int) -> None:
        nonlocal now
        now += seconds

    stopwatch, expected = Stopwatch(lambda: now), dict.fromkeys(get_args(Part), 0)
    for part, (before, outside, inside) in pieces:
        wait(before)
        with stopwatch.on(part):
            wait(outside)
            with stopwatch.on("publish"):
                wait(inside)
        expected["other"] += before
        expected[part] += outside
        expected["publish"] += inside
    assert stopwatch.take() == {**{f"time/{part}_s": spent for part, spent in expected.items()}, "time/step_s": now}
    assert set(stopwatch.take().values()) == {0.0}
