"""How much of each source is drawn, and which comes next. Pure logic; `loader` turns a source into a row.

Weights are taken in thousandths, of which each above 0 gets one at least, and brought to lowest terms: whole numbers a_i whose sum
L ≤ 1000 is the length of a **period**. While a period lasts the weight in force of source i is a_i / L, and after its L draws each
source was drawn a_i times. Whatever changes (the phase of a schedule, a live weight, a cap, the end of an epoch) comes into force when
a period begins.

**The bound.** |draws of i − Σ of its weight in force at each draw| < 1, for every source after every draw. Within a period let x be the
draws of source i after n of them. Its j-th draw may come once n·a_i > (j − 1)·L, else x − n·a_i/L would reach 1, and must come by
⌈j·L/a_i⌉, else n·a_i/L − x would. Of the sources that may be drawn, the one that must be first is. Unit jobs with such windows are all
met by the earliest deadline first if they can be met at all, and they can (R. Tijdeman, *The chairman assignment problem*, Discrete
Mathematics 32, 1980). At a period's end every difference is 0, so that no change finds a debt. Were a change taken in the middle of a
period, no order could keep the bound: with k sources and a change at every draw, differences grow as 1/2 + 1/3 + … + 1/k.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

PARTS = 1000
ADAPTIVE_PARTS = 100
"""Hundredths, where weights adapt: what was learnt comes into force within as many draws."""


class Phase(NamedTuple):
    """Weights until the run's progress reaches `until`."""

    until: float
    weights: Mapping[str, float]


class Period(msgspec.Struct):
    """What is drawn before anything can change."""

    quotas: list[int]
    """Draws of each source, in the order of the names."""
    drawn: list[int]
    """Draws so far."""

    @property
    def is_over(self) -> bool:
        """Every quota is met."""
        return self.drawn == self.quotas

    def next(self) -> int:
        """The source of the next draw."""
        length, number = sum(self.quotas), sum(self.drawn) + 1
        due = [
            (-(-(drawn + 1) * length // quota), source)
            for source, (quota, drawn) in enumerate(zip(self.quotas, self.drawn, strict=True))
            if drawn < quota and drawn * length < number * quota
        ]
        _, source = min(due)
        self.drawn[source] += 1
        return source


class SourcesState(msgspec.Struct):
    """Where a mixture stands, to the draw."""

    period: Period | None
    live: dict[str, float]
    in_epoch: list[int]
    """Draws of each source since the epoch began."""
    drawn: list[int]
    """Draws of each source since the run began."""
    factors: dict[str, float] = {}
    """Of shares that adapt: what each source is given over what is asked; 1 for what is not named."""


class WeightedSources:
    """Draws sources by weight.

    sizes   rows of each source; an epoch, over which caps hold, is as many draws as there are rows
    phases  weights over the run's progress, the last of which lasts; each names every source
    caps    most draws of a source in an epoch; the others then share what it leaves in proportion to their weights
    is_adaptive  whether `adapt` will be called: weights are then taken in hundredths
    Raises ValueError for phases and caps that name other sources, or where no source has a weight.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        phases: Sequence[Phase],
        caps: Mapping[str, int] | None = None,
        *,
        is_adaptive: bool = False,
    ) -> None:
        self.names = sorted(sizes)
        self._num_rows = sum(sizes.values())
        self._phases, self._caps = phases, caps or {}
        self._is_adaptive = is_adaptive
        for what, named in [*(("weights", phase.weights) for phase in phases), ("caps", self._caps)]:
            if unknown := sorted(set(named) - set(self.names)):
                raise ValueError(f"{what}: no source {', '.join(unknown)}; there are {', '.join(self.names)}")
        for phase in phases:
            if missing := [name for name in self.names if name not in phase.weights]:
                raise ValueError(f"weights: none for {', '.join(missing)}; write 0 for what is not to be drawn")
            if not any(phase.weights.values()):
                raise ValueError("weights: all are 0; give one source a weight")
        zeros = [0] * len(self.names)
        self._state = SourcesState(None, {}, zeros[:], zeros[:])

    def draw(self, progress: float) -> str:
        """The next draw's source."""
        state = self._state
        if state.period is None or state.period.is_over:
            state.period = self._begin(progress)
        source = state.period.next()
        state.in_epoch[source] += 1
        state.drawn[source] += 1
        return self.names[source]

    def set_weight(self, source: str, weight: float) -> None:
        """From the next period on, whatever the phases say. Raises ValueError for a source that is not there, and where no source would
        have a weight."""
        if source not in self.names:
            raise ValueError(f"no source {source}; there are {', '.join(self.names)}")
        live = {**self._state.live, source: weight}
        if not all(any({**phase.weights, **live}.values()) for phase in self._phases):
            raise ValueError(f"{source}: weight {weight:g} would leave no source with one")
        self._state.live = live

    def adapt(self, factors: Mapping[str, float] | None) -> None:
        """From the next period on, each source's share is that of its weight times its factor; None leaves them as they are."""
        if factors is not None:
            self._state.factors = dict(factors)

    @property
    def factors(self) -> Mapping[str, float]:
        """As `adapt` set them."""
        return self._state.factors

    def asked(self, progress: float) -> dict[str, float]:
        """Shares in force at `progress`, live weights and factors included; they sum to 1."""
        factors = self._state.factors
        return _shares({name: share * factors.get(name, 1.0) for name, share in self.unadapted(progress).items()})

    def unadapted(self, progress: float) -> dict[str, float]:
        """Shares asked for at `progress` by the weights alone, live ones included."""
        weights = {**self._phase(progress).weights, **self._state.live}
        return _shares({name: weights[name] for name in self.names})

    def drawn(self) -> dict[str, int]:
        """Draws of each source since the run began."""
        return dict(zip(self.names, self._state.drawn, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        state: dict[str, Any] = msgspec.to_builtins(self._state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken, over the same sources; other weights come into force with the next period, and factors go
        where weights adapt no more."""
        self._state = msgspec.convert(state, SourcesState)
        if not self._is_adaptive:
            self._state.factors = {}

    def _phase(self, progress: float) -> Phase:
        return next((phase for phase in self._phases if progress < phase.until), self._phases[-1])

    def _begin(self, progress: float) -> Period:
        state, asked = self._state, self.asked(progress)
        left = self._left_of_caps()
        num_left = self._num_rows - sum(state.in_epoch)
        if num_left <= 0 or not any(share > 0 and left[name] > 0 for name, share in asked.items()):
            # The epoch ends, early where all that may be drawn is at its cap.
            state.in_epoch = [0] * len(self.names)
            num_left, left = self._num_rows, self._left_of_caps()
        weights = [asked[name] if left[name] > 0 else 0.0 for name in self.names]
        quotas = in_lowest_terms(apportion(weights, ADAPTIVE_PARTS if self._is_adaptive else PARTS, at_least=1))
        if self._caps and sum(quotas) > num_left:
            quotas = apportion(weights, num_left)
        quotas = [min(quota, left[name]) for name, quota in zip(self.names, quotas, strict=True)]
        return Period(quotas, [0] * len(quotas))

    def _left_of_caps(self) -> dict[str, int]:
        """Draws that a period may still give each source; PARTS where no cap says less."""
        return {
            name: max(0, min(self._caps[name] - drawn, PARTS)) if name in self._caps else PARTS
            for name, drawn in zip(self.names, self._state.in_epoch, strict=True)
        }


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def apportion(weights: Sequence[float], total: int, at_least: int = 0) -> list[int]:
    """`total` in whole parts in proportion to `weights`, by largest remainders; a weight above 0 gets `at_least`, for which
    `total` must suffice."""
    scale = total / sum(weights)
    parts = [max(int(weight * scale), at_least if weight > 0 else 0) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: (parts[place] - weights[place] * scale, place))
    for place in by_remainder[: max(0, total - sum(parts))]:
        parts[place] += 1
    # What the least ones got beyond their share, the greatest give.
    while sum(parts) > total and max(parts) > max(1, at_least):
        parts[parts.index(max(parts))] -= 1
    return parts


def in_lowest_terms(parts: Sequence[int]) -> list[int]:
    """The least whole numbers in the same proportions."""
    divisor = math.gcd(*parts)
    return [part // divisor for part in parts]


def by_temperature(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Weights ∝ size^(1/temperature): 1 is in proportion to the rows, more is more even."""
    return {name: size ** (1 / temperature) for name, size in sizes.items()}
