"""The order in which samples are drawn: a seeded shuffle per pass over all rows of all files, or, where sources are weighted, over
those of each source; resumable to the row. With `data.draw: solve_rate` a pass leaves out most of what is too easy or too hard.

The controller draws a SampleRef per group it admits. torchdata's StatefulDataLoader runs over row numbers only, with the sampler
below: pixels stay in the store until a generator or the learner asks for them. Held-out rows are taken in order (`Store.spread`).
"""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from vtriune.config.sections.data import Data
from vtriune.config.sections.mixture import Mixture
from vtriune.data.adaptive import Adaptive
from vtriune.data.mixture import Phase, WeightedSources, by_temperature
from vtriune.data.schema import DataError
from vtriune.data.solve_rates import Bounds, SolveRates
from vtriune.data.store import Store
from vtriune.messages import SampleRef


class Cursor:
    """Iterator of SampleRefs: `epochs` passes over `store` (None: without end), each in its own order drawn from `seed`. Weighted by
    `mixture`, where that is on, or with `bounds` to the rows' solve rates, it draws as many. Raises DataError for a mixture that does
    not fit the store's sources.

    `state_dict` is plain JSON values; a cursor that loads it yields exactly the references that would have come next.
    """

    def __init__(
        self,
        store: Store,
        seed: int,
        epochs: int | None = None,
        mixture: Mixture | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        # torch loads in seconds; whoever only imports this module (the checks, --help) does not wait for it.
        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        self._store = store
        self._seed = seed
        self._num_rows_total = None if epochs is None else epochs * len(store)
        self._rates = SolveRates(seed, bounds, store.stored)
        is_weighted = mixture is not None and mixture.is_on
        self._weighted = (
            WeightedRows(store, seed, mixture, self._rates) if mixture is not None and is_weighted else None
        )
        is_adaptive = mixture is not None and mixture.adaptive
        self._adaptive = Adaptive(self._weighted.sources.names) if self._weighted is not None and is_adaptive else None
        self.progress = 0.0
        """Of the run at the next draw."""
        with warnings.catch_warnings():
            # torchdata 0.11 calls a deprecated function of torch; no reader of a run's output can act on it.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            # A generator of its own: without one, each iteration would advance torch's global generator.
            self._loader: Any = StatefulDataLoader(
                range(len(store)),
                batch_size=None,
                sampler=self._weighted or ShuffledRows(len(store), seed, self._rates),
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
        return msgspec.structs.replace(self._store.ref(row), probability=self._rates.probability(row))

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
        """For the metrics: the share of each source that is asked for, and its share of all draws, where sources are weighted; what is
        known of the rows, where draws follow that."""
        if self._weighted is None:
            return self._rates.figures()
        sources = self._weighted.sources
        asked, drawn = sources.asked(self.progress), sources.drawn()
        total = max(1, sum(drawn.values()))
        return {
            **self._rates.figures(),
            **{f"source/{name}/mixture/asked": share for name, share in asked.items()},
            **{f"source/{name}/mixture/drawn": number / total for name, number in drawn.items()},
            **{f"source/{name}/mixture/factor": factor for name, factor in sources.factors.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON values."""
        return {
            "is_weighted": self._weighted is not None,
            "fingerprint": self._store.fingerprint,
            "seed": self._seed,
            "num_drawn": self.num_drawn,
            "loader": self._loader.state_dict(),
            "solve_rates": self._rates.state_dict(),
            "adaptive": {} if self._adaptive is None else self._adaptive.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state` was taken; DataError when it was taken over other data or with another seed."""
        check_goes_on(state, self._store, self._seed, is_weighted=self._weighted is not None)
        self._loader.load_state_dict(state["loader"])
        self._rows = iter(self._loader)
        self.num_drawn = state["num_drawn"]
        self._rates.load_state_dict(state.get("solve_rates", {}))
        if self._adaptive is not None:
            self._adaptive.load_state_dict(state.get("adaptive", {}))

    def learn(self, solve_rates: Mapping[int, float]) -> None:
        """Row → mean accuracy, of the groups that ended since the publish before; draws from now on know of it."""
        self._rates.learn(solve_rates)
        if self._adaptive is not None:
            by_source: dict[str, list[float]] = {}
            for row, rate in solve_rates.items():
                by_source.setdefault(self._store.source(row), []).append(rate)
            self._adapt({source: fmean(rates) for source, rates in by_source.items()}, is_held_out=False)

    def learn_held_out(self, line: Mapping[str, float]) -> None:
        """What a line of `metrics.jsonl` says of held-out rows."""
        if self._weighted is not None:
            keys = {source: f"eval/source/{source}/reward/mean" for source in self._weighted.sources.names}
            known = {source: line[key] for source, key in keys.items() if math.isfinite(line.get(key, math.nan))}
            self._adapt(known, is_held_out=True)

    def _adapt(self, scores: Mapping[str, float], *, is_held_out: bool) -> None:
        """Weights follow the mean `scores` of some sources."""
        if self._adaptive is not None and self._weighted is not None and scores:
            sources = self._weighted.sources
            self._adaptive.learn(sources.drawn(), scores, is_held_out=is_held_out)
            sources.adapt(self._adaptive.factors(sources.unadapted(self.progress)))


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


def bounds_of(data: Data) -> Bounds | None:
    """Of the solve rates that draws follow; None where every pass takes every row."""
    limits = data.solve_rate
    return Bounds(limits.lowest, limits.highest, limits.floor) if data.draw == "solve_rate" else None


def weighted_sources(mixture: Mixture, sizes: Mapping[str, int]) -> WeightedSources:
    """The draws that `data.mixture` asks for. Raises DataError for sources that are not there."""
    if mixture.schedule:
        phases = [Phase(2.0 if phase.until is None else phase.until, phase.weights) for phase in mixture.schedule]
    else:
        phases = [Phase(2.0, mixture.weights or by_temperature(sizes, mixture.temperature or 1.0))]
    try:
        return WeightedSources(sizes, phases, mixture.caps, is_adaptive=mixture.adaptive)
    except ValueError as error:
        raise DataError(f"data.mixture.{error}") from error


class Passes:
    """Rows one after the other: every row once in each pass that takes it, pass after pass, without end.

    rows    int64 (n,), or None for 0 … n − 1 of the order
    order   of each pass, over the places in `rows`
    rates   which rows a pass takes
    """

    def __init__(self, rows: np.ndarray | None, order: "ShuffledRows", rates: SolveRates) -> None:
        self._rows, self._order, self._rates = rows, order, rates
        self.place = 0
        """Rows taken or left out so far, over all passes."""
        self._pass: tuple[int, np.ndarray] | None = None

    def next(self) -> int:
        """The next row that its pass takes."""
        while True:
            number, place = divmod(self.place, self._order.num_rows)
            if self._pass is None or self._pass[0] != number:
                self._pass = (number, self._order.order(number))
            place = int(self._pass[1][place])
            row = place if self._rows is None else int(self._rows[place])
            self.place += 1
            if self._rates.takes(row, number):
                return row


class WeightedRows:
    """torchdata sampler: sources by weight, without end, and each one's rows in passes of its own."""

    def __init__(self, store: Store, seed: int, mixture: Mixture, rates: SolveRates) -> None:
        self._mixture, self._seed, self._rates = mixture, seed, rates
        self.rows = store.rows_by_source()
        self.progress = 0.0
        self.sources = self._begin()

    def __iter__(self) -> "_WeightedRowsIterator":
        self.sources = self._begin()
        passes = {
            source: Passes(rows, ShuffledRows(len(rows), _seed_of(self._seed, source)), self._rates)
            for source, rows in self.rows.items()
        }
        return _WeightedRowsIterator(self, passes)

    def _begin(self) -> WeightedSources:
        return weighted_sources(self._mixture, {source: len(rows) for source, rows in self.rows.items()})


def _seed_of(seed: int, source: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:8], "big")


class _WeightedRowsIterator:
    """Its state is the sources' and how far the passes over each one are."""

    def __init__(self, rows: WeightedRows, passes: Mapping[str, Passes]) -> None:
        self._rows, self._passes = rows, passes

    def __iter__(self) -> "_WeightedRowsIterator":
        return self

    def __next__(self) -> int:
        return self._passes[self._rows.sources.draw(self._rows.progress)].next()

    def state_dict(self) -> dict[str, Any]:
        places = {source: passes.place for source, passes in self._passes.items()}
        return {**self._rows.sources.state_dict(), "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.sources.load_state_dict(state)
        # In a checkpoint from before rows were left out, a source's place is the number of its draws.
        for source, place in (state.get("places") or self._rows.sources.drawn()).items():
            self._passes[source].place = place


class ShuffledRows:
    """torchdata sampler: every row once in each pass that takes it, pass after pass, without end.

    The end is the cursor's: a loader that loads the state of a finished iteration begins another one.
    """

    def __init__(self, num_rows: int, seed: int, rates: SolveRates | None = None) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self._rates = rates or SolveRates(seed)

    def __iter__(self) -> "_ShuffledRowsIterator":
        return _ShuffledRowsIterator(Passes(None, self, self._rates))

    def order(self, epoch: int) -> np.ndarray:
        """int64 (num_rows,): the permutation of `epoch`.

        Sorting the bit generator's raw stream, which NumPy keeps stable between releases, unlike `numpy.random.Generator.permutation`.
        """
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_rows)
        return np.argsort(bits, kind="stable")


class _ShuffledRowsIterator:
    """Its state is one number: pass and place follow from it."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def __iter__(self) -> "_ShuffledRowsIterator":
        return self

    def __next__(self) -> int:
        return self._passes.next()

    def state_dict(self) -> dict[str, int]:
        return {"place": self._passes.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # A checkpoint from before rows were left out calls it otherwise.
        self._passes.place = state["place"] if "place" in state else state["num_drawn"]
