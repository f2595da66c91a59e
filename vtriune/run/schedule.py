"""Pure functions of training progress: how far the run is, which mode is in force, how long it is. Called by the controller.

Progress is one number in [0, 1]. Mode, bound, learning rate and IoU threshold follow it and nothing else: not the number of updates,
of which one mode makes several where another makes one.
"""

from typing import Literal, NamedTuple

import msgspec

from vtriune.config.modes import choices
from vtriune.config.tree import Config, Mode, Policy
from vtriune.run.window import WindowLimits, derive_limits


class WorkDone(NamedTuple):
    """Work done since the run began, over resumes."""

    versions: int
    samples: int
    """Accounted for: consumed, filtered or lost."""


NOTHING = WorkDone(0, 0)


class Progress(msgspec.Struct, frozen=True):
    """How far a run is, as a line over the work done: from 0 at the beginning to 1 at `total`.

    It never falls while work is done and ends at exactly 1. A run that was resumed with another length has a line from where it stood.
    """

    unit: Literal["versions", "samples"]
    total: int
    since: int = 0
    """Work done where the line begins,"""
    start: float = 0.0
    """and progress there."""

    def at(self, done: WorkDone) -> float:
        """Progress between two versions."""
        return self._after(getattr(done, self.unit))

    def through(self, batch: int, updates: int, done: WorkDone) -> list[float]:
        """Progress before the first and after each of the `updates` on a batch of so many groups, which share the way evenly:
        (version + (i + 1)/n)/versions after update i of n."""
        begin = getattr(done, self.unit)
        length = 1 if self.unit == "versions" else batch
        return [self._after(begin + length * (index / max(updates, 1))) for index in range(updates + 1)]

    def resumed(self, stored: "Progress", done: WorkDone) -> "Progress":
        """The line of a run planned as `self` that goes on from a checkpoint with the line `stored`: that one, unless the length
        was changed; then the way left from there to 1 is the way left of the run."""
        if (stored.unit, stored.total) == (self.unit, self.total):
            return stored
        return Progress(self.unit, self.total, getattr(done, self.unit), stored.at(done))

    def _after(self, work: float) -> float:
        if work >= self.total:
            return 1.0
        return self.start + (1.0 - self.start) * ((work - self.since) / (self.total - self.since))


def planned_progress(config: Config, num_rows: int) -> Progress:
    """Of a run from its beginning: over versions under `run.steps`, over samples under `run.epochs`."""
    if config.run.steps is not None:
        return Progress("versions", config.run.steps)
    return Progress("samples", num_rows * (config.run.epochs or 1))


class ModeInForce(NamedTuple):
    """Mode and hard bound in force."""

    mode: Mode
    max_staleness: int

    def limits(self, policy: Policy) -> WindowLimits:
        """The window's limits; `policy.look_ahead` applies off-policy as far as the bound allows it."""
        look_ahead = policy.look_ahead
        if look_ahead is not None:
            look_ahead = min(look_ahead, self.max_staleness * policy.rollout_batch + 1)
        return derive_limits(self.mode, self.max_staleness, look_ahead, policy.rollout_batch)


def mode_in_force(policy: Policy, progress: float) -> ModeInForce:
    """What `policy` asks for at `progress` in [0, 1]: the schedule's phase if there is one, else mode and bound."""
    possible = choices(policy)
    over = sum(phase.until is not None and phase.until <= progress for phase in policy.schedule)
    current = possible[min(over, len(possible) - 1)]
    return ModeInForce(current.mode, current.max_staleness)


def num_versions(config: Config, num_rows: int, done: WorkDone = NOTHING) -> int:
    """Publishes of the whole run: `run.steps`; or, at most, those that were `done` and as many rollout batches as the samples that the
    epochs have left fill, the last perhaps not. A filter or lost groups make it less: such a run ends with its data."""
    planned = planned_progress(config, num_rows)
    if planned.unit == "versions":
        return planned.total
    return done.versions + -(-max(planned.total - done.samples, 0) // config.policy.rollout_batch)


def planned_length(config: Config, num_rows: int) -> str:
    """For people: what the run trains on, and how often that shows each row."""
    policy, planned = config.policy, planned_progress(config, num_rows)
    num_groups = planned.total * (policy.rollout_batch if planned.unit == "versions" else 1)
    shown = f"{num_groups} of {num_rows} rows once"
    if num_groups >= num_rows:
        shown = f"each of {num_rows} rows {num_groups / num_rows:.3g} ×"
    size = f"{'at most ' * (planned.unit == 'samples')}{policy.rollout_batch} groups × {policy.group_size} completions"
    return f"versions: {num_versions(config, num_rows)}, of {size}, which show {shown}"
