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
    assert (resumed.num_drawn, resumed.epoch) == (num_before, num_before // 40)
    # A second checkpoint later in the resumed run, too.
    head = list(islice(resumed, num_more))
    again = Cursor(store, seed=1, epochs=3)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    assert [*head, *again] == list(cursor)


def test_an_endless_cursor_goes_on_and_a_finished_one_stays_finished(store: Store) -> None:
    endless = Cursor(store, seed=1, epochs=None)
    list(islice(endless, 1000))
    assert (endless.num_drawn, endless.epoch) == (1000, 25)
    finished = Cursor(store, seed=1, epochs=1)
    assert len(list(finished)) == 40
    resumed = Cursor(store, seed=1, epochs=1)
    resumed.load_state_dict(finished.state_dict())
    assert next(finished, None) is None
    assert next(resumed, None) is None


def test_state_of_other_data_or_another_seed_is_refused(store: Store, tmp_path: Path) -> None:
    state = Cursor(store, seed=1).state_dict()
    with pytest.raises(DataError, match="seed 1, this run 2"):
        Cursor(store, seed=2).load_state_dict(state)
    file = write_parquet(tmp_path / "other.parquet", [row(1)])
    with pytest.raises(DataError, match="a run resumes on the data"):
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
