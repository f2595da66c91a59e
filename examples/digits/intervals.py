"""Paired bootstrap intervals (Efron 1979) of mean differences. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 4000


class Effect(NamedTuple):
    """A mean difference over rows and seeds, the percentiles 2.5 and 97.5 of its bootstrap over rows, and each seed's own mean."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def is_clear(self) -> bool:
        """The interval leaves 0 out, and the mean is beyond the seeds' standard deviation (that of one seed is 0)."""
        spread = float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else 0.0
        return (self.low > 0 or self.high < 0) and abs(self.mean) > spread

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def effect(differences: Sequence[np.ndarray], seed: int = 0) -> Effect:
    """Of one array (rows,) a seed, the same rows in each. Rows are drawn with replacement, all seeds' values of a row together."""
    by_row = np.mean(np.stack(differences), axis=0)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(by_row), (NUM_RESAMPLES, len(by_row)))
    low, high = np.percentile(by_row[drawn].mean(axis=1), [2.5, 97.5])
    return Effect(float(by_row.mean()), float(low), float(high), tuple(float(each.mean()) for each in differences))
