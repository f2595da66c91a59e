"""Draws by weight: within one of what was asked for after every draw, whatever changes; caps hold; a resume goes on to the draw."""

import contextlib
import json
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtriune.data.mixture import PARTS, Period, Phase, WeightedSources, apportion, by_temperature, in_lowest_terms

NAMES = "abcdefgh"
weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e3), st.integers(1, 5).map(float))


def weights(num_sources: int) -> st.SearchStrategy[dict[str, float]]:
    drawn = st.lists(weight, min_size=num_sources, max_size=num_sources).filter(any)
    return drawn.map(lambda values: dict(zip(NAMES, values, strict=False)))


@st.composite
def mixtures(draw: st.DrawFn) -> WeightedSources:
    num_sources = draw(st.integers(1, 8))
    sizes = {name: draw(st.integers(1, 400)) for name in NAMES[:num_sources]}
    untils = [*sorted({draw(st.floats(0, 1)) for _ in range(draw(st.integers(0, 2)))}), 1.0]
    phases = [Phase(until, draw(weights(num_sources))) for until in untils]
    caps = {name: draw(st.integers(1, 60)) for name in sizes if draw(st.booleans()) and draw(st.booleans())}
    return WeightedSources(sizes, phases, caps)


@settings(deadline=None, max_examples=150)
@given(mixtures(), st.data())
def test_after_every_draw_each_source_is_within_one_of_what_was_in_force(
    mixture: WeightedSources, data: st.DataObject
) -> None:
    asked = dict.fromkeys(mixture.names, Fraction(0))
    counts = dict.fromkeys(mixture.names, 0)
    changes = data.draw(
        st.dictionaries(st.integers(0, 300), st.tuples(st.sampled_from(mixture.names), weight), max_size=6)
    )
    for number in range(300):
        if number in changes:
            # One that would leave no source with a weight is refused, and changes nothing.
            with contextlib.suppress(ValueError):
                mixture.set_weight(*changes[number])
        if number % 37 == 0:
            state = json.loads(json.dumps(mixture.state_dict()))
            mixture.load_state_dict(state)
        source = mixture.draw(number / 300)
        counts[source] += 1
        period = mixture._state.period
        assert period is not None
        for name, quota in zip(mixture.names, period.quotas, strict=True):
            asked[name] += Fraction(quota, sum(period.quotas))
            assert abs(counts[name] - asked[name]) < 1, (name, number)
        if period.is_over:
            assert all(counts[name] == asked[name] for name in mixture.names)
    assert mixture.drawn() == counts


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_every_period_can_be_drawn_and_gives_each_source_its_quota(quotas: list[int]) -> None:
    period = Period(quotas, [0] * len(quotas))
    for _ in range(sum(quotas)):
        period.next()
    assert period.is_over


@given(st.lists(weight, min_size=1, max_size=48).filter(any))
def test_thousandths_are_the_weights_rounded_and_none_is_forgotten(asked: list[float]) -> None:
    parts = apportion(asked, PARTS, at_least=1)
    assert sum(parts) == PARTS
    assert [part > 0 for part in parts] == [each > 0 for each in asked]
    raised = sum(1 for part, each in zip(parts, asked, strict=True) if part > each / sum(asked) * PARTS + 1)
    assert raised == 0
    if min(each for each in asked if each) / sum(asked) >= 1 / PARTS:
        assert all(abs(part - each / sum(asked) * PARTS) <= 1 + 1e-9 for part, each in zip(parts, asked, strict=True))


def test_equal_weights_take_turns_and_simple_ones_have_short_periods() -> None:
    mixture = WeightedSources(dict.fromkeys("abc", 10), [Phase(1.0, dict.fromkeys("abc", 7.0))])
    assert "".join(mixture.draw(0.0) for _ in range(9)) == "abcabcabc"
    assert in_lowest_terms([500, 250, 250]) == [2, 1, 1]
    mixture = WeightedSources({"a": 10, "b": 10}, [Phase(1.0, {"a": 3.0, "b": 1.0})])
    drawn = "".join(mixture.draw(0.0) for _ in range(20))
    assert all(drawn[start : start + 4].count("b") == 1 for start in range(0, 20, 4))


def test_a_cap_holds_in_every_epoch_and_the_others_share_what_it_leaves() -> None:
    mixture = WeightedSources({"a": 50, "b": 25, "c": 25}, [Phase(1.0, {"a": 2.0, "b": 1.0, "c": 1.0})], {"b": 10})
    for epoch in range(1, 4):
        for _ in range(100):
            mixture.draw(0.0)
        assert mixture.drawn()["b"] == 10 * epoch
        assert abs(mixture.drawn()["a"] - 2 * mixture.drawn()["c"]) <= 2 * epoch


def test_an_epoch_ends_early_where_everything_is_at_its_cap() -> None:
    mixture = WeightedSources({"a": 50, "b": 50}, [Phase(1.0, {"a": 1.0, "b": 1.0})], {"a": 3, "b": 2})
    drawn = [mixture.draw(0.0) for _ in range(25)]
    assert drawn.count("a") == 15
    assert all(drawn[start : start + 5].count("b") == 2 for start in range(0, 25, 5))


def test_a_phase_and_a_live_weight_come_into_force_when_a_period_begins() -> None:
    mixture = WeightedSources({"a": 10, "b": 10}, [Phase(0.5, {"a": 1.0, "b": 0.0}), Phase(1.0, {"a": 0.0, "b": 1.0})])
    assert [mixture.draw(progress) for progress in (0.0, 0.4, 0.5, 1.0)] == ["a", "a", "b", "b"]
    mixture.set_weight("a", 1.0)
    assert mixture.asked(1.0) == {"a": 0.5, "b": 0.5}
    assert sorted(mixture.draw(1.0) for _ in range(4)) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("phases", "caps", "said"),
    [
        ([Phase(1.0, {"a": 1.0})], {}, "weights: none for b; write 0 for what is not to be drawn"),
        ([Phase(1.0, {"a": 1.0, "b": 1.0, "c": 1.0})], {}, "weights: no source c; there are a, b"),
        ([Phase(1.0, {"a": 0.0, "b": 0.0})], {}, "weights: all are 0"),
        ([Phase(1.0, {"a": 1.0, "b": 1.0})], {"z": 1}, "caps: no source z; there are a, b"),
    ],
)
def test_what_names_no_source_or_leaves_none_is_refused(phases: list[Phase], caps: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WeightedSources({"a": 1, "b": 1}, phases, caps)


def test_temperature_makes_sources_more_even() -> None:
    sizes = {"a": 100, "b": 1}
    assert by_temperature(sizes, 1.0) == {"a": 100.0, "b": 1.0}
    assert by_temperature(sizes, 2.0) == {"a": 10.0, "b": 1.0}


def test_forty_eight_sources_are_drawn_at_a_rate_that_no_run_feels() -> None:
    mixture = WeightedSources(
        {f"s{n:02}": 1000 for n in range(48)}, [Phase(1.0, {f"s{n:02}": 1.0 + n for n in range(48)})]
    )
    start = time.process_time()
    for _ in range(5000):
        mixture.draw(0.5)
    assert (time.process_time() - start) / 5000 < 200e-6
