"""Difficulty-aware draws: what is within bounds once in every pass, what is not with a known probability, the same after a resume."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.rows import row, write_parquet
from vtriune.config.sections.data import Data, SolveRate
from vtriune.config.sections.mixture import Mixture
from vtriune.data import Store, build_store
from vtriune.data.loader import Cursor, bounds_of
from vtriune.data.solve_rates import Bounds, SolveRates

BOUNDS = Bounds(0.05, 0.95, 0.1)
WEIGHTED = Mixture(weights={"a": 3.0, "b": 1.0})
MIXTURES = st.sampled_from([None, WEIGHTED])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("solve_rates")
    files = [
        write_parquet(folder / f"train_math_{name}_20.parquet", [row(number, name) for number in range(start, start + 20)])
        for start, name in ((0, "a"), (20, "b"))
    ]  # fmt: skip
    return build_store(files, folder / "store")


def test_the_key_of_the_file_gives_the_bounds() -> None:
    limits = SolveRate(lowest=0.2, highest=0.8, floor=0.3)
    assert bounds_of(Data(draw="solve_rate", solve_rate=limits)) == Bounds(0.2, 0.8, 0.3)
    assert bounds_of(Data(solve_rate=limits)) is None
    assert list(SolveRate(lowest=0.9, highest=0.1).problems()) == ["data.solve_rate: lowest 0.9 is above highest 0.1"]


@pytest.mark.parametrize("mixture", [None, WEIGHTED])
def test_until_a_rate_is_known_the_order_is_that_of_uniform_draws(store: Store, mixture: Mixture | None) -> None:
    plain = list(Cursor(store, 5, epochs=2, mixture=mixture))
    assert list(Cursor(store, 5, epochs=2, mixture=mixture, bounds=BOUNDS)) == plain


def test_rows_outside_of_the_bounds_are_drawn_as_often_as_the_floor_says_and_carry_that_probability(
    store: Store,
) -> None:
    cursor = Cursor(store, 5, bounds=BOUNDS)
    cursor.learn({0: 1.0, 1: 0.0, 2: 0.05, 3: 0.95})
    drawn = list(islice(cursor, 40_000))
    counts = Counter(ref.row for ref in drawn)
    num_passes = counts[10]
    assert all(abs(counts[row] - num_passes) <= 1 for row in range(2, 40))
    for seldom in (0, 1):
        # Four standard deviations of a binomial count.
        assert abs(counts[seldom] - 0.1 * num_passes) < 4 * (num_passes * 0.1 * 0.9) ** 0.5
    assert {ref.row: ref.probability for ref in drawn} == {row: 0.1 if row < 2 else 1.0 for row in range(40)}


def test_the_last_word_on_a_row_counts_and_the_figures_say_how_many_are_left_out(store: Store) -> None:
    cursor = Cursor(store, 5, bounds=BOUNDS)
    assert cursor.figures() == {"draw/rows_known": 0, "draw/rows_too_hard": 0, "draw/rows_too_easy": 0}
    cursor.learn({0: 1.0, 1: 1.0, 2: 0.0})
    cursor.learn({1: 0.5})
    assert cursor.figures() == {"draw/rows_known": 3, "draw/rows_too_hard": 1, "draw/rows_too_easy": 1}


def test_a_row_that_an_epoch_shows_twice_has_one_rate(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train_math_b_5_x2.parquet", [row(number) for number in range(5)])
    twice = build_store([path], tmp_path / "store")
    cursor = Cursor(twice, 5, bounds=BOUNDS)
    cursor.learn({7: 1.0})
    assert cursor.figures()["draw/rows_known"] == 1
    counts = Counter(ref.row for ref in islice(cursor, 4000))
    assert max(counts[2], counts[7]) < 0.2 * min(count for number, count in counts.items() if number not in (2, 7))


def test_an_epoch_is_as_many_draws_as_there_are_rows_however_many_are_left_out(store: Store) -> None:
    cursor = Cursor(store, 5, epochs=2, bounds=BOUNDS)
    cursor.learn(dict.fromkeys(range(40), 1.0))
    assert len(list(cursor)) == 80


@settings(max_examples=40, deadline=None)
@given(
    MIXTURES,
    st.lists(
        st.tuples(st.integers(0, 40), st.dictionaries(st.integers(0, 39), st.floats(0, 1), max_size=10)), max_size=6
    ),
)
def test_a_cursor_that_is_killed_at_any_draws_goes_on_to_the_row_with_what_it_knew(
    store: Store, mixture: Mixture | None, kills: list[tuple[int, dict[int, float]]]
) -> None:
    def begin() -> Cursor:
        return Cursor(store, 1, epochs=8, mixture=mixture, bounds=BOUNDS)

    whole, cursor = begin(), begin()
    for num_draws, rates in kills:
        assert list(islice(cursor, num_draws)) == list(islice(whole, num_draws))
        whole.learn(rates)
        cursor.learn(rates)
        state = json.loads(json.dumps(cursor.state_dict()))
        list(islice(cursor, 7))
        cursor.learn({0: 1.0, 5: 0.0})
        cursor = begin()
        cursor.load_state_dict(state)
    assert list(cursor) == list(whole)


@settings(max_examples=40, deadline=None)
@given(MIXTURES, st.dictionaries(st.integers(0, 39), st.floats(0, 1)))
def test_no_row_comes_twice_before_all_of_its_source_came_or_were_left_out(
    store: Store, mixture: Mixture | None, rates: dict[int, float]
) -> None:
    cursor = Cursor(store, 3, mixture=mixture, bounds=BOUNDS)
    cursor.learn(rates)
    always = {row for row in range(40) if 0.05 <= rates.get(row, 0.5) <= 0.95}
    seen: dict[object, set[int]] = {}
    for ref in islice(cursor, 300):
        source = mixture and store.source(ref.row)
        of_pass = seen.setdefault(source, set())
        if ref.row in of_pass:
            rows = {row for row in always if mixture is None or store.source(row) == source}
            assert rows <= of_pass
            of_pass.clear()
        of_pass.add(ref.row)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), MIXTURES)
def test_a_checkpoint_from_before_rows_were_left_out_goes_on_to_the_row(
    store: Store, num_before: int, mixture: Mixture | None
) -> None:
    cursor = Cursor(store, 1, epochs=3, mixture=mixture)
    list(islice(cursor, num_before))
    state = json.loads(json.dumps(cursor.state_dict()).replace('"place"', '"num_drawn"'))
    del state["solve_rates"]
    _without(state, "places")
    resumed = Cursor(store, 1, epochs=3, mixture=mixture)
    resumed.load_state_dict(state)
    assert list(resumed) == list(cursor)


def _without(state: object, key: str) -> None:
    """Takes `key` out, wherever it is."""
    if isinstance(state, dict):
        state.pop(key, None)
        for value in state.values():
            _without(value, key)


@given(st.integers(0, 2**31), st.integers(0, 1000))
def test_the_coin_is_of_seed_pass_and_row(seed: int, number: int) -> None:
    rates = SolveRates(seed, Bounds(0.1, 0.9, 0.5))
    rates.learn(dict.fromkeys(range(64), 0.0))
    takes = [rates.takes(row, number) for row in range(64)]
    again = SolveRates(seed, Bounds(0.1, 0.9, 0.5))
    again.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    assert [again.takes(row, number) for row in range(64)] == takes
    assert 0 < sum(takes) < 64
