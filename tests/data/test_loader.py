"""The order samples are drawn in: a permutation per epoch, seeded, resumable to the row."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.data.rows import row, write_parquet
from vtriune.config.sections.mixture import Mixture, MixturePhase
from vtriune.data import DataError, Store, build_store
from vtriune.data.loader import Cursor, ShuffledRows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("loader")
    files = [
        write_parquet(
            folder / f"train_math_{name}_20.parquet", [row(number, name) for number in range(start, start + 20)]
        )
        for start, name in ((0, "a"), (20, "b"))
    ]
    return build_store(files, folder / "store")


def test_each_epoch_draws_every_row_once_and_in_another_order(store: Store) -> None:
    rows = [ref.row for ref in Cursor(store, seed=5, epochs=3)]
    epochs = [rows[start : start + 40] for start in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_fixes_the_order_and_another_seed_changes_it(store: Store) -> None:
    one, same, other = ([ref.row for ref in Cursor(store, seed=seed, epochs=1)] for seed in (5, 5, 6))
    assert one == same != other


@settings(max_examples=40, deadline=None)
@given(num_before=st.integers(0, 120), num_more=st.integers(0, 120))
def test_a_resumed_cursor_draws_exactly_what_would_have_come_next(store: Store, num_before: int, num_more: int) -> None:
    cursor = Cursor(store, seed=1, epochs=3)
    list(islice(cursor, num_before))
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = Cursor(store, seed=1, epochs=3)
    resumed.load_state_dict(state)
    assert resumed.num_drawn == num_before
    # A second checkpoint later in the resumed run, too.
    head = list(islice(resumed, num_more))
    again = Cursor(store, seed=1, epochs=3)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert [*head, *again] == list(cursor)


def test_an_endless_cursor_goes_on_and_a_finished_one_stays_finished(store: Store) -> None:
    endless = Cursor(store, seed=1, epochs=None)
    list(islice(endless, 1000))
    assert endless.num_drawn == 1000
    finished = Cursor(store, seed=1, epochs=1)
    assert len(list(finished)) == 40
    resumed = Cursor(store, seed=1, epochs=1)
    resumed.load_state_dict(finished.state_dict())
    assert next(finished, None) is None
    assert next(resumed, None) is None


def test_state_of_other_data_or_another_seed_is_refused(store: Store, tmp_path: Path) -> None:
    state = Cursor(store, seed=1).state_dict()
    with pytest.raises(DataError, match=r"run\.seed: 2 where the run began with 1"):
        Cursor(store, seed=2).load_state_dict(state)
    file = write_parquet(tmp_path / "other.parquet", [row(1)])
    with pytest.raises(DataError, match=r"data\.train: store .* where the run began with"):
        Cursor(build_store([file], tmp_path / "store"), seed=1).load_state_dict(state)


def test_drawing_leaves_torchs_global_generator_alone(store: Store) -> None:
    before = torch.get_rng_state()
    list(islice(Cursor(store, seed=3), 60))
    assert torch.equal(torch.get_rng_state(), before)


def test_orders_are_uniform_over_rows_and_places() -> None:
    rows = ShuffledRows(8, seed=11)
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), rows.order(epoch)] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_the_order_of_a_seed_is_the_same_on_every_machine_and_release() -> None:
    assert ShuffledRows(10, seed=7).order(3).tolist() == [2, 4, 7, 3, 5, 1, 8, 9, 0, 6]


WEIGHTED = Mixture(weights={"a": 3.0, "b": 1.0})


def test_a_weighted_epoch_draws_as_often_as_there_are_rows_and_each_sources_rows_once_per_pass(store: Store) -> None:
    rows = [ref.row for ref in Cursor(store, seed=5, epochs=4, mixture=WEIGHTED)]
    assert len(rows) == 160
    of_a, of_b = ([row for row in rows if (row < 20) == is_a] for is_a in (True, False))
    assert (len(of_a), len(of_b)) == (120, 40)
    passes = [of_a[start : start + 20] for start in range(0, 120, 20)] + [of_b[:20], of_b[20:]]
    assert all(len(set(one)) == 20 for one in passes)
    assert len({tuple(one) for one in passes}) == 8


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=5), st.sampled_from([None, ("a", 0.0), ("b", 7.0)]))
def test_a_weighted_cursor_that_is_killed_at_any_draws_goes_on_to_the_row(
    store: Store, kills: list[int], live: tuple[str, float] | None
) -> None:
    whole, cursor = (Cursor(store, seed=1, epochs=5, mixture=WEIGHTED) for _ in range(2))
    if live is not None:
        whole.set_weight(*live)
        cursor.set_weight(*live)
    found = []
    for num_draws in kills:
        found += list(islice(cursor, num_draws))
        state = json.loads(json.dumps(cursor.state_dict()))
        list(islice(cursor, 7))
        cursor = Cursor(store, seed=1, epochs=5, mixture=WEIGHTED)
        cursor.load_state_dict(state)
    assert found + list(cursor) == list(whole)


def test_without_weights_the_order_is_what_it_was(store: Store) -> None:
    plain = list(Cursor(store, seed=5, epochs=2))
    assert list(Cursor(store, seed=5, epochs=2, mixture=Mixture())) == plain
    assert Cursor(store, seed=5, mixture=Mixture()).figures() == {}


def test_a_schedule_follows_the_runs_progress_and_the_figures_say_what_was_asked_and_drawn(store: Store) -> None:
    phases = [MixturePhase(until=0.5, weights={"a": 1.0, "b": 0.0}), MixturePhase(weights={"a": 1.0, "b": 1.0})]
    cursor = Cursor(store, seed=1, mixture=Mixture(schedule=phases))
    first = list(islice(cursor, 10))
    cursor.progress = 0.5
    second = list(islice(cursor, 10))
    assert all(ref.row < 20 for ref in first)
    assert sum(ref.row < 20 for ref in second) == 5
    assert cursor.figures() == {
        "source/a/mixture/asked": 0.5, "source/b/mixture/asked": 0.5,
        "source/a/mixture/drawn": 0.75, "source/b/mixture/drawn": 0.25,
    }  # fmt: skip


def test_weights_of_other_sources_and_a_change_between_weights_and_none_are_refused(store: Store) -> None:
    with pytest.raises(DataError, match=r"data\.mixture\.weights: no source c; there are a, b"):
        Cursor(store, seed=1, mixture=Mixture(weights={"a": 1.0, "b": 1.0, "c": 1.0}))
    plain, weighted = Cursor(store, seed=1), Cursor(store, seed=1, mixture=WEIGHTED)
    with pytest.raises(DataError, match=r"data\.mixture: weighted True where the run began with False"):
        weighted.load_state_dict(plain.state_dict())
    with pytest.raises(DataError, match="draws every row once an epoch"):
        plain.set_weight("a", 1.0)
    with pytest.raises(DataError, match="no source z; there are a, b"):
        weighted.set_weight("z", 1.0)


def test_adaptive_weights_follow_what_rises_and_come_back_from_a_checkpoint(store: Store) -> None:
    mixture = Mixture(adaptive=True)
    cursor = Cursor(store, seed=1, mixture=mixture)
    for number in range(12):
        list(islice(cursor, 20))
        cursor.learn({0: number / 12, 1: number / 12, 20: 0.5})
    assert cursor.figures()["source/a/mixture/factor"] == 2.0
    assert cursor.figures()["source/b/mixture/factor"] == 0.5
    assert cursor.figures()["source/a/mixture/asked"] == 0.8
    resumed = Cursor(store, seed=1, mixture=mixture)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    for number in range(10):
        for one in (cursor, resumed):
            one.learn_held_out({"eval/source/a/reward/mean": 0.5, "eval/source/b/reward/mean": number / 20})
        assert list(islice(resumed, 30)) == list(islice(cursor, 30))
    assert resumed.figures() == cursor.figures()
    assert resumed.figures()["source/b/mixture/factor"] == 2.0


def test_a_run_that_goes_on_without_adapting_has_the_weights_that_are_asked(store: Store) -> None:
    cursor = Cursor(store, seed=1, mixture=Mixture(weights={"a": 1.0, "b": 1.0}, adaptive=True))
    for number in range(12):
        list(islice(cursor, 20))
        cursor.learn({0: number / 12, 20: 0.5})
    assert cursor.figures()["source/a/mixture/asked"] == 0.8
    resumed = Cursor(store, seed=1, mixture=Mixture(weights={"a": 1.0, "b": 1.0}))
    resumed.load_state_dict(cursor.state_dict())
    assert resumed.figures()["source/a/mixture/asked"] == 0.5


def test_an_evaluation_without_a_verdict_says_nothing_of_its_source(store: Store) -> None:
    told, untold = (Cursor(store, seed=1, mixture=Mixture(adaptive=True)) for _ in range(2))
    told.learn_held_out({"eval/source/a/reward/mean": float("nan")})
    assert told.state_dict() == untold.state_dict()


def test_lines_and_solve_rates_move_no_weights_that_do_not_adapt(store: Store) -> None:
    still, told = (Cursor(store, seed=1, mixture=WEIGHTED) for _ in range(2))
    for number in range(10):
        told.learn({0: number / 10})
        told.learn_held_out({"eval/source/a/reward/mean": number / 10})
        assert list(islice(told, 30)) == list(islice(still, 30))
