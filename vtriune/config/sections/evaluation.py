"""`evaluation`: when and how held-out rows are scored."""

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vtriune.config.sections.data import Files
from vtriune.config.sections.section import MOST, Count, CountOrZero, Section, Share, Text


class Evaluation(Section, frozen=True):
    """Scores of held-out rows before, during and after training."""

    every: CountOrZero = 0
    """Versions between evaluations; 0: none during training."""
    before: bool = True
    """Evaluate the initial model, which all later figures are compared with."""
    after: bool = True
    """Evaluate the last version."""
    sampling: list[Literal["sampled", "greedy"]] = msgspec.field(default_factory=lambda: ["greedy"])
    """One pass over the rows for each kind: sampled at temperature 1, greedy at 0. The first one's mean is `eval/reward/mean`."""
    top_p: Share = 1.0
    """Of sampled answers: from the likeliest tokens that together have this probability; 1 is off."""
    top_k: Annotated[int, Meta(ge=-1, le=MOST)] = -1
    """Of sampled answers: from this many likeliest tokens; -1 and 0 are off."""
    rows: Count | None = None
    """At most this many held-out rows, spread evenly over the sources; null: all."""
    files: list[Text | Files] = msgspec.field(default_factory=list)
    """Held-out files in place of `data.test`, in the same form."""

    @property
    def is_on(self) -> bool:
        """Whether anything is evaluated at all."""
        return self.before or self.after or self.every > 0

    def problems(self) -> Iterable[str]:
        if self.is_on and not self.sampling:
            yield "evaluation.sampling: empty; write [greedy], [sampled] or both"
        if len(set(self.sampling)) < len(self.sampling):
            yield f"evaluation.sampling: {self.sampling} names a kind twice, but a row is evaluated once of each kind"
        if "sampled" not in self.sampling and (self.top_p != 1.0 or self.top_k not in (-1, 0)):
            yield f"evaluation.top_p / top_k: of sampled answers, but evaluation.sampling is {self.sampling}; add sampled"
