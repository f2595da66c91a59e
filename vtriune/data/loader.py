"""The order in which samples are drawn: a seeded shuffle per epoch over all rows of all files, or, where sources are weighted, over
those of each source; resumable to the row.

The controller draws a SampleRef per group it admits. torchdata's StatefulDataLoader runs over row numbers only, with the sampler
below: pixels stay in the store until a generator or the learner asks for them. Held-out rows are taken in order (`Store.spread`).
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vtriune.config.sections.mixture import Mixture
from vtriune.data.mixture import Phase, WeightedSources, by_temperature
from vtriune.data.schema import DataError
from vtriune.data.store import Store
from vtriune.messages import SampleRef


class Cursor:
    """Iterator of SampleRefs: `epochs` passes over `store` (None: without end), each in its own order drawn from `seed`. Weighted by
    `mixture`, where that is on, it draws as many. Raises DataError for a mixture that does not fit the store's sources.

    `state_dict` is plain JSON values; a cursor that loads it yields exactly the references that would have come next.
    """

    def __init__(self, store: Store, seed: int, epochs: int | None = None, mixture: Mixture | None = None) -> None:
        # torch loads in seconds; whoever only imports this module (the checks, --help) does not wait for it.
        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        self._store = store
        self._seed = seed
        self._num_rows_total = None if epochs is None else epochs * len(store)
        self._weighted = WeightedRows(store, seed, mixture) if mixture is not None and mixture.is_on else None
        self.progress = 0.0
        """Of the run at the next draw."""
        with warnings.catch_warnings():
            # torchdata 0.11 calls a deprecated function of torch; no reader of a run's output can act on it.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            # A generator of its own: without one, each iteration would advance torch's global generator.
            self._loader: Any = StatefulDataLoader(
                range(len(store)),
                batch_size=None,
                sampler=self._weighted or ShuffledRows(len(store), seed),
                generator=torch.Generator().manual_seed(seed),
            )
        self._rows: Iterator[int] = iter(self._loader)
        self.num_drawn = 0
        """References drawn since the first epoch began, over resumes."""

    def __iter__(self) -> "Cursor":
        return self

    def __next__(self) -> SampleRef:
        if self.is_used_up:
            raise StopIteration
        if self._weighted is not None:
            self._weighted.progress = self.progress
        row = int(next(self._rows))
        self.num_drawn += 1
        return self._store.ref(row)

    @property
    def is_used_up(self) -> bool:
        """Every row is drawn `epochs` times; or more often, where a run goes on with fewer epochs than it has behind it."""
        return self._num_rows_total is not None and self.num_drawn >= self._num_rows_total

    def set_weight(self, source: str, weight: float) -> None:
        """From the next period of draws on. Raises DataError for a source that is not there, and where sources are not weighted."""
        if self._weighted is None:
            raise DataError("data.mixture: this run draws every row once an epoch; begin one with weights")
        try:
            self._weighted.sources.set_weight(source, weight)
        except ValueError as error:
            raise DataError(f"data.mixture: {error}") from error

    def figures(self) -> dict[str, float]:
        """For the metrics: the share of each source that is asked for, and its share of all draws. Nothing where none is weighted."""
        if self._weighted is None:
            return {}
        sources = self._weighted.sources
        asked, drawn = sources.asked(self.progress), sources.drawn()
        total = max(1, sum(drawn.values()))
        return {f"source/{name}/mixture/asked": share for name, share in asked.items()} | {
            f"source/{name}/mixture/drawn": number / total for name, number in drawn.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON values."""
        return {
            "is_weighted": self._weighted is not None,
            "fingerprint": self._store.fingerprint,
            "seed": self._seed,
            "num_drawn": self.num_drawn,
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state` was taken; DataError when it was taken over other data or with another seed."""
        check_goes_on(state, self._store, self._seed, is_weighted=self._weighted is not None)
        self._loader.load_state_dict(state["loader"])
        self._rows = iter(self._loader)
        self.num_drawn = state["num_drawn"]


def check_goes_on(state: Mapping[str, Any], store: Store, seed: int, *, is_weighted: bool) -> None:
    """DataError when a cursor's `state` was taken over other data than those of `store`, with another seed, or of sources that were
    weighted where they are not."""
    for key, was, here in (
        ("data.mixture: weighted", state.get("is_weighted", False), is_weighted),
        ("data.train: store", state["fingerprint"], store.fingerprint),
        ("run.seed:", state["seed"], seed),
    ):
        if was != here:
            raise DataError(
                f"{key} {here} where the run began with {was}: it goes on over the same rows in the same order alone; write what it "
                "began with, or begin a new run (another run.name)"
            )


def weighted_sources(mixture: Mixture, sizes: Mapping[str, int]) -> WeightedSources:
    """The draws that `data.mixture` asks for. Raises DataError for sources that are not there."""
    if mixture.schedule:
        phases = [Phase(2.0 if phase.until is None else phase.until, phase.weights) for phase in mixture.schedule]
    else:
        phases = [Phase(2.0, mixture.weights or by_temperature(sizes, mixture.temperature or 1.0))]
    try:
        return WeightedSources(sizes, phases, mixture.caps)
    except ValueError as error:
        raise DataError(f"data.mixture.{error}") from error


class WeightedRows:
    """torchdata sampler: sources by weight, without end, and each one's rows once per pass over it, in an order of the pass."""

    def __init__(self, store: Store, seed: int, mixture: Mixture) -> None:
        self._mixture = mixture
        self.rows = store.rows_by_source()
        self.orders = {source: ShuffledRows(len(rows), _seed_of(seed, source)) for source, rows in self.rows.items()}
        self.progress = 0.0
        self.sources = self._begin()

    def __iter__(self) -> "_WeightedRowsIterator":
        self.sources = self._begin()
        return _WeightedRowsIterator(self)

    def _begin(self) -> WeightedSources:
        return weighted_sources(self._mixture, {source: len(rows) for source, rows in self.rows.items()})


def _seed_of(seed: int, source: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:8], "big")


class _WeightedRowsIterator:
    """Its state is the sources'; passes and places follow from how often each was drawn."""

    def __init__(self, rows: WeightedRows) -> None:
        self._rows = rows
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> "_WeightedRowsIterator":
        return self

    def __next__(self) -> int:
        source, number = self._rows.sources.draw(self._rows.progress)
        rows = self._rows.rows[source]
        over, place = divmod(number, len(rows))
        if self._orders.get(source, (-1,))[0] != over:
            self._orders[source] = (over, self._rows.orders[source].order(over))
        return int(rows[self._orders[source][1][place]])

    def state_dict(self) -> dict[str, Any]:
        return self._rows.sources.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.sources.load_state_dict(state)


class ShuffledRows:
    """torchdata sampler: every row once per epoch, epoch after epoch, without end.

    The end is the cursor's: a loader that loads the state of a finished iteration begins another one.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed

    def __iter__(self) -> "_ShuffledRowsIterator":
        return _ShuffledRowsIterator(self)

    def order(self, epoch: int) -> np.ndarray:
        """int64 (num_rows,): the permutation of `epoch`.

        Sorting the bit generator's raw stream, which NumPy keeps stable between releases, unlike `numpy.random.Generator.permutation`.
        """
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_rows)
        return np.argsort(bits, kind="stable")


class _ShuffledRowsIterator:
    """Its state is one number: epoch and place follow from it."""

    def __init__(self, rows: ShuffledRows) -> None:
        self._rows = rows
        self._num_drawn = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> "_ShuffledRowsIterator":
        return self

    def __next__(self) -> int:
        epoch, place = divmod(self._num_drawn, self._rows.num_rows)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._rows.order(epoch))
        self._num_drawn += 1
        return int(self._order[1][place])

    def state_dict(self) -> dict[str, int]:
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._num_drawn = state["num_drawn"]
