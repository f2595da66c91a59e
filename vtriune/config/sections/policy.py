"""`policy`: how old the data may be, how many there are to a version and to an update."""

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vtriune.config.sections.section import MOST, Count, CountOrZero, Mode, Seconds, Section, Share


class Phase(Section, frozen=True):
    """One stretch of the schedule; the first whose end lies ahead is in force."""

    until: Share | None = None
    """Progress of the run at which the next phase begins; null for the last phase, which lasts to the end."""
    mode: Mode = "on_policy"
    """As `policy.mode`."""
    max_staleness: CountOrZero | None = None
    """As `policy.max_staleness`."""


class Policy(Section, frozen=True):
    """On-policy or off-policy, batches and groups."""

    mode: Mode = "on_policy"
    """on_policy: every token is of the version that is trained on it. off_policy: generation goes on while the learner trains. Can be
    switched on a running job with `vtriune.control`. With a `schedule`, its phases say the mode."""
    max_staleness: CountOrZero | None = None
    """Hard bound on a token's age in versions when it is trained on. null: 0 on-policy, 2 off-policy. With the decoupled correction 4
    cost AReaL nothing, 8 a point (arXiv 2505.24298)."""
    look_ahead: Count | None = None
    """Off-policy: a batch may pass over its oldest unfinished group for at most this many - 1 younger ones; cut to max_staleness ·
    rollout_batch + 1. null: a quarter of the rollout batch + 1 where max_staleness is 2 or more, else 1."""
    in_flight: Literal["continue", "recompute", "drain"] = "continue"
    """What becomes of completions under way when weights arrive. continue: the new version goes on over the old keys and values.
    recompute: the same, these computed anew. drain: they end first, under the old version."""
    rollout_batch: Count = 1024
    """Groups (prompts) trained on per version. The default is the paper's."""
    update_batch: Count | None = None
    """Groups per optimiser step. null: the rollout batch. The paper's off-policy runs make 8 steps of 128 at half the learning rate."""
    group_size: Annotated[int, Meta(ge=2, le=MOST)] = 8
    """Completions per prompt. An advantage is a reward against the group's mean, so there are at least 2; 8 is the paper's."""
    filter: Literal["none", "zero_variance"] = "none"
    """zero_variance: groups whose rewards are all equal give no gradient and are replaced, as in DAPO (arXiv 2503.14476)."""
    max_oversample: Annotated[float, Meta(ge=1, le=100)] = 2.0
    """With a filter: at most this many times `rollout_batch` groups, rounded down, are generated for one batch, which is then as short
    as it is. Off-policy up to max_staleness · rollout_batch more run ahead; each counts for the later batch it is in line for."""
    schedule: list[Phase] = msgspec.field(default_factory=list)
    """Mode and bound over the run's progress, in place of `mode` and `max_staleness`."""
    lease_s: Seconds = 600.0
    """Seconds a generator has for a group, or a held-out row, from the lease to the score; after them it is given to another."""

    def problems(self) -> Iterable[str]:
        if self.rollout_batch % (self.update_batch or self.rollout_batch):
            yield f"policy.rollout_batch: {self.rollout_batch} is not a multiple of update_batch ({self.update_batch})"
        if self.schedule and self.max_staleness is not None:
            yield f"policy.max_staleness: {self.max_staleness} beside a schedule, whose phases have bounds of their own; leave it out"
        last = 0.0
        for index, phase in enumerate(self.schedule):
            if phase.until is None and index < len(self.schedule) - 1:
                yield f"policy.schedule[{index}]: only the last phase may leave `until` out"
            if phase.until is not None and phase.until <= last:
                yield f"policy.schedule[{index}].until: {phase.until} must rise"
            last = phase.until or last
