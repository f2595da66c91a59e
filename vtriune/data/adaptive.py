"""Weights that follow what a draw of each source still teaches. Pure logic; `loader` feeds it and hands its factors to `mixture`.

The signal of a source is the slope of its mean score over its own draws, by least squares over the last WINDOW points, less ERRORS
standard errors, at least 0: what is solved, and what cannot be learnt, has none, and noise seldom passes for a rise. Points are
held-out rewards once there are FEWEST of them, else the mean accuracies of the groups that ended with a version.

A weight is asked · clip(signal / mean signal, LEAST, MOST), the mean weighted by the shares asked for. While no source is known to
rise, weights stay as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

LEAST, MOST = 0.5, 2.0
WINDOW = 48
FEWEST, FEWEST_TRAINED = 4, 12
"""Points from which a slope is taken. A version has few groups of a source, and its mean is noisier than that of held-out rows."""
ERRORS = 2.0


class Scores(msgspec.Struct):
    """Of one source, oldest first: (draws until then, mean score), at most WINDOW of each."""

    trained: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []

    @property
    def signal(self) -> float:
        """Rise per draw that is beyond its standard errors; 0 where too little is known."""
        if len(self.held_out) >= FEWEST:
            return certain_slope(self.held_out)
        return certain_slope(self.trained) if len(self.trained) >= FEWEST_TRAINED else 0.0


class Adaptive:
    """Scores of each source as they come, and what follows for its share. Starts at what is asked."""

    def __init__(self, names: Sequence[str]) -> None:
        self._scores = {name: Scores() for name in names}

    def learn(self, drawn: Mapping[str, int], scores: Mapping[str, float], *, is_held_out: bool) -> None:
        """Mean scores of some sources, each after as many of its draws as `drawn` says."""
        for name, score in scores.items():
            of_source = self._scores[name]
            points = of_source.held_out if is_held_out else of_source.trained
            points.append((drawn[name], score))
            del points[:-WINDOW]

    def factors(self, asked: Mapping[str, float]) -> dict[str, float] | None:
        """Source → its weight over the one asked for, given the shares `asked`; None while no source with a share is known to rise."""
        signals = {name: self._scores[name].signal for name, share in asked.items() if share > 0}
        mean = sum(asked[name] * signal for name, signal in signals.items())
        if mean <= 0:
            return None
        return {name: min(max(signal / mean, LEAST), MOST) for name, signal in signals.items()}

    def state_dict(self) -> dict[str, Any]:
        """The scores, as JSON values."""
        state: dict[str, Any] = msgspec.to_builtins(self._scores)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know what was known when `state` was taken."""
        self._scores |= msgspec.convert(state, dict[str, Scores])


def certain_slope(points: Sequence[tuple[int, float]]) -> float:
    """Least-squares slope of `points` less ERRORS standard errors, at least 0; 0 of fewer than FEWEST, or where draws do not differ."""
    if len(points) < FEWEST:
        return 0.0
    x, y = np.array(points, np.float64).T
    x, y = x - x.mean(), y - y.mean()
    spread = float(x @ x)
    if spread == 0:
        return 0.0
    slope = float(x @ y) / spread
    residual = y - slope * x
    error = math.sqrt(float(residual @ residual) / (len(x) - 2) / spread)
    return max(0.0, slope - ERRORS * error)
