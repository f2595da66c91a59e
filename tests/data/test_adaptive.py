"""Adaptive weights: bounds, resumption, and learning curves whose best mix is known."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from vtriune.data.adaptive import ERRORS, FEWEST, FEWEST_TRAINED, LEAST, MOST, WINDOW, Adaptive, certain_slope
from vtriune.data.mixture import Phase, WeightedSources

NAMES = ["a", "b", "c", "d"]
points = st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1)), max_size=20)


@given(
    st.lists(st.lists(st.floats(-0.1, 0.1), min_size=FEWEST_TRAINED, max_size=60), min_size=4, max_size=4),
    st.lists(st.floats(0, 0.05), min_size=4, max_size=4),
    st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
)
def test_no_weight_leaves_half_to_twice_what_is_asked_and_what_rises_most_gets_no_less_than_others(
    noise: list[list[float]], slopes: list[float], weights: list[float]
) -> None:
    adaptive, signals = Adaptive(NAMES), {}
    for name, of_source, slope in zip(NAMES, noise, slopes, strict=True):
        scores = [(number, slope * number + error) for number, error in enumerate(of_source)]
        for number, score in scores:
            adaptive.learn({name: number}, {name: score}, is_held_out=False)
        signals[name] = certain_slope(scores[-WINDOW:])
    factors = adaptive.factors({name: weight / sum(weights) for name, weight in zip(NAMES, weights, strict=True)})
    assert (factors is None) == (not any(signals.values()))
    if factors is not None:
        assert all(LEAST <= factor <= MOST for factor in factors.values())
        assert factors[max(signals, key=lambda name: signals[name])] == max(factors.values()) > 1 - 1e-9


@given(points)
def test_the_slope_is_scipys_less_its_standard_errors(of_source: list[tuple[int, float]]) -> None:
    assume(len(of_source) >= FEWEST and np.ptp([x for x, _ in of_source]) > 0)
    found = stats.linregress(*zip(*of_source, strict=True))
    assert certain_slope(of_source) == pytest.approx(max(0.0, found.slope - ERRORS * found.stderr), rel=1e-6, abs=1e-9)


def test_too_little_or_no_rise_leaves_the_weights_as_they_are() -> None:
    adaptive = Adaptive(["a", "b"])
    asked = {"a": 0.5, "b": 0.5}
    for number in range(FEWEST_TRAINED - 1):
        adaptive.learn({"a": number}, {"a": number / 10}, is_held_out=False)
    assert adaptive.factors(asked) is None
    for number in range(FEWEST_TRAINED):
        adaptive.learn({"b": number}, {"b": 0.5}, is_held_out=False)
    assert adaptive.factors(asked) is None


def test_held_out_scores_count_once_there_are_enough_and_a_source_of_weight_0_stays_out() -> None:
    adaptive = Adaptive(["a", "b", "c"])
    for number in range(FEWEST_TRAINED):
        drawn = {"a": number, "b": number, "c": number}
        adaptive.learn(drawn, {"a": number / 10, "b": 0.5, "c": number / 5}, is_held_out=False)
        adaptive.learn(drawn, {"a": 0.5, "b": number / 10, "c": 0.5}, is_held_out=True)
    assert adaptive.factors({"a": 0.5, "b": 0.5, "c": 0.0}) == {
        "a": LEAST, "b": MOST
    }  # fmt: skip


def test_what_is_learnt_comes_back_from_a_checkpoint() -> None:
    one, other = Adaptive(NAMES), Adaptive(NAMES)
    rng = np.random.default_rng(0)
    for number in range(30):
        one.learn(
            dict.fromkeys(NAMES, number), {name: rng.random() * number for name in NAMES}, is_held_out=number % 2 == 0
        )
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    asked = dict.fromkeys(NAMES, 0.25)
    assert other.factors(asked) == one.factors(asked)


CURVES: dict[str, Callable[[int], float]] = {
    "shuffled": lambda drawn: 0.3,
    "solved": lambda drawn: 1.0,
    "quick": lambda drawn: 0.9 - 0.6 * np.exp(-drawn / 600),
    "slow": lambda drawn: 0.8 - 0.5 * np.exp(-drawn / 1500),
}
"""Source → mean score after as many draws of it."""
NUM_VERSIONS, PER_VERSION = 138, 64


def train(weights: dict[str, float], seed: int, *, is_adaptive: bool) -> tuple[float, dict[str, float]]:
    """Mean held-out score of the sources at the end, and the factors in force then."""
    rng = np.random.default_rng(seed)
    sources = WeightedSources(dict.fromkeys(CURVES, 1000), [Phase(2.0, weights)], is_adaptive=is_adaptive)
    adaptive = Adaptive(sources.names)
    for version in range(NUM_VERSIONS):
        scores: dict[str, list[float]] = {}
        for _ in range(PER_VERSION):
            name = sources.draw(version / NUM_VERSIONS)
            scores.setdefault(name, []).append(np.clip(CURVES[name](sources.drawn()[name]) + rng.normal(0, 0.15), 0, 1))
        if is_adaptive:
            means = {name: float(np.mean(of_source)) for name, of_source in scores.items()}
            adaptive.learn(sources.drawn(), means, is_held_out=False)
            sources.adapt(adaptive.factors(sources.unadapted(0.0)))
    mean = float(np.mean([CURVES[name](drawn) for name, drawn in sources.drawn().items()]))
    return mean, sources.state_dict()["factors"]


@pytest.mark.parametrize("seed", range(3))
def test_a_shuffled_and_a_solved_source_end_at_their_floor_and_the_rest_is_as_good_as_the_best_fixed_mix(
    seed: int,
) -> None:
    """Over learning curves with the noise of 16 groups a source and version, and the paper's number of versions; mixes within the same
    bounds. In a run half as long the first versions, in which nothing is known, cost more: 0.015 in the mean of 12 seeds."""
    found, factors = train(dict.fromkeys(CURVES, 1.0), seed, is_adaptive=True)
    assert factors["shuffled"] == factors["solved"] == LEAST
    grid = [
        {"shuffled": idle, "solved": idle, "quick": quick, "slow": slow}
        for idle, quick, slow in itertools.product((0.5, 1.0), (0.5, 1.0, 2.0), (0.5, 1.0, 2.0))
    ]
    best = max(train(mix, seed, is_adaptive=False)[0] for mix in grid)
    assert found > best - 0.01
    assert found > train(dict.fromkeys(CURVES, 1.0), seed, is_adaptive=False)[0]
