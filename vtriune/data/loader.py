"""The order in which samples are drawn: a seeded shuffle per epoch over all rows of all files, resumable to the row.

The controller draws a SampleRef per group it admits. torchdata's StatefulDataLoader runs over row numbers only, with the sampler
below: pixels stay in the store until a generator or the learner asks for them. Held-out rows are taken in order (`Store.spread`).
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from vtriune.data.schema import DataError
from vtriune.data.store import Store
from vtriune.messages import SampleRef


class Cursor:
    """Iterator of SampleRefs: `epochs` passes over `store` (None: without end), each in its own order drawn from `seed`.

    `state_dict` is plain JSON values; a cursor that loads it yields exactly the references that would have come next.
    """

    def __init__(self, store: Store, seed: int, epochs: int | None = None) -> None:
        # torch loads in seconds; whoever only imports this module (the checks, --help) does not wait for it.
        import torch
        from torchdata.stateful_dataloader import StatefulDataLoader

        self._store = store
        self._seed = seed
        self._num_rows_total = None if epochs is None else epochs * len(store)
        with warnings.catch_warnings():
            # torchdata 0.11 calls a deprecated function of torch; no reader of a run's output can act on it.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            # A generator of its own: without one, each iteration would advance torch's global generator.
            loader: Any = StatefulDataLoader(
                range(len(store)),
                batch_size=None,
                sampler=ShuffledRows(len(store), seed),
                generator=torch.Generator().manual_seed(seed),
            )
        self._loader = loader
        self._rows: Iterator[int] = iter(self._loader)
        self._num_drawn = 0

    @property
    def num_drawn(self) -> int:
        """References drawn since the first epoch began, over resumes."""
        return self._num_drawn

    @property
    def epoch(self) -> int:
        """Full passes done."""
        return self._num_drawn // len(self._store)

    def __iter__(self) -> "Cursor":
        return self

    def __next__(self) -> SampleRef:
        if self._num_drawn == self._num_rows_total:
            raise StopIteration
        row = int(next(self._rows))
        self._num_drawn += 1
        return self._store.ref(row)

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, as JSON values."""
        return {
            "fingerprint": self._store.fingerprint,
            "seed": self._seed,
            "num_drawn": self._num_drawn,
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state` was taken; DataError when it was taken over other data or with another seed."""
        for key, here in (("fingerprint", self._store.fingerprint), ("seed", self._seed)):
            if state[key] != here:
                raise DataError(
                    f"the checkpoint's loader state has {key} {state[key]!r}, this run {here!r}: a run resumes on the data and "
                    "seed it began with; start a new run for others"
                )
        self._loader.load_state_dict(state["loader"])
        self._rows = iter(self._loader)
        self._num_drawn = state["num_drawn"]


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

        Sorting the bit generator's raw stream, which NumPy keeps stable between releases, unlike `Generator.permutation`.
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
