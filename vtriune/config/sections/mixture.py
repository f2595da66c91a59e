"""`data.mixture`: how much of each source is trained on."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

from vtriune.config.sections.section import Count, Section, Share

SourceWeight = Annotated[float, Meta(ge=0, le=1e6)]


class MixturePhase(Section, frozen=True):
    """Weights for one stretch of the run; the first whose end lies ahead is in force."""

    until: Share | None = None
    """Progress of the run at which the next phase begins; null for the last phase, which lasts to the end."""
    weights: dict[str, SourceWeight] = msgspec.field(default_factory=dict)
    """As `data.mixture.weights`."""


class Mixture(Section, frozen=True):
    """Weights of sources. Without any, an epoch shows every row once, whatever its source."""

    weights: dict[str, SourceWeight] = msgspec.field(default_factory=dict)
    """Draws of each source in proportion to each other, such as {geo: 2, charts: 1}. Every source is named; 0 leaves one out. Taken in
    thousandths of their sum. Live: `python -m vtriune.control RUN weight SOURCE VALUE`."""
    temperature: Annotated[float, Meta(ge=1, le=1000)] | None = None
    """In place of weights: rows of each source to the power of 1/temperature. 1 is in proportion to the rows; more is more even."""
    caps: dict[str, Count] = msgspec.field(default_factory=dict)
    """Most draws of a source in an epoch, which is as many draws as there are rows; other sources then share what it leaves."""
    schedule: list[MixturePhase] = msgspec.field(default_factory=list)
    """In place of weights: other ones as the run goes on."""

    adaptive: bool = False
    """Raise and lower weights, between half of and twice what is asked for, as sources go on rising or not (docs/data.md)."""

    @property
    def is_on(self) -> bool:
        """Whether sources are weighted at all."""
        return bool(self.weights or self.temperature or self.caps or self.schedule or self.adaptive)

    def problems(self) -> Iterable[str]:
        given = [name for name in ("weights", "temperature", "schedule") if getattr(self, name)]
        if len(given) > 1:
            yield f"data.mixture: {' and '.join(given)}, which each say all weights; write one of them"
        if self.schedule:
            ends = [phase.until for phase in self.schedule]
            rising = [end for end in ends[:-1] if end is not None]
            if ends[-1] is not None or len(rising) < len(ends) - 1 or any(b <= a for a, b in pairwise(rising)):
                yield f"data.mixture.schedule: until is {ends}; it must rise, and be null in the last phase alone"
