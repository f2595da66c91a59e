"""`rewards`: how answers are scored. The reward library's options under their own names, and what only a run's pools have.

Read by the verifier pool and the recorder, and by the checks of the data.
"""

from typing import Annotated

from msgspec import Meta

from verifiers import RewardOptions
from verifiers.types import MAX_FAULT_RATE, MEMORY_GIB
from vtriune.config.sections.section import ShareOrZero


class Rewards(RewardOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every key of `verifiers.RewardOptions`, and the limits of the processes that score."""

    memory_gib: Annotated[float, Meta(gt=0, le=65536)] = MEMORY_GIB
    """Address space of a verifier worker, GiB: one that needs more is ended, and its answer is a fault."""
    max_fault_rate: ShareOrZero = MAX_FAULT_RATE
    """Share of faults among a source's latest verdicts above which the run ends: masked answers train on nothing."""

    @property
    def options(self) -> RewardOptions:
        """What changes a score, as the library takes it and an archive carries it."""
        return RewardOptions(**{name: getattr(self, name) for name in RewardOptions.__struct_fields__})
