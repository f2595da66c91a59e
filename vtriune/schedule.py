"""Pure functions of training progress: which mode is in force, how long the run is. Called by the controller."""

from typing import Literal, NamedTuple

from vtriune.config.tree import Config, Policy
from vtriune.window import Limits, Mode, derive_limits

Correction = Literal["none", "decoupled", "tis", "icepop"]


class Stance(NamedTuple):
    """Mode and hard bound in force."""

    mode: Mode
    max_staleness: int

    def limits(self, policy: Policy) -> Limits:
        """The window's limits; `policy.look_ahead` applies off-policy as far as the bound allows it."""
        look_ahead = policy.look_ahead
        if look_ahead is not None:
            look_ahead = min(look_ahead, self.max_staleness * policy.rollout_batch + 1)
        return derive_limits(self.mode, self.max_staleness, look_ahead, policy.rollout_batch)


def stance(policy: Policy, progress: float) -> Stance:
    """What `policy` asks for at `progress` in [0, 1]: the schedule's phase if there is one, else mode and bound."""
    for phase in policy.schedule:
        if phase.until is None or progress < phase.until:
            return Stance(phase.mode, phase.max_staleness)
    if policy.schedule:
        return Stance(policy.schedule[-1].mode, policy.schedule[-1].max_staleness)
    if policy.mode == "on_policy":
        return Stance("on_policy", 0)
    return Stance("off_policy", 2 if policy.max_staleness is None else policy.max_staleness)


def num_versions(config: Config, num_rows: int) -> int:
    """Number of publishes of the whole run: `run.steps`, or as many rollout batches as the epochs hold, rounded up."""
    if config.run.steps is not None:
        return config.run.steps
    return -(-num_rows * (config.run.epochs or 1) // config.policy.rollout_batch)


def update_batches(group_ids: list[int], update_batch: int) -> list[list[int]]:
    """Group ids of each optimiser step, in order; the last may be short."""
    return [group_ids[start : start + update_batch] for start in range(0, len(group_ids), update_batch)]


def correction(config: Config, current: Stance) -> Correction:
    """`loss.correction` with `auto` resolved: decoupled off-policy; none on-policy, which a bound of 0 with one update a batch is."""
    if config.loss.correction != "auto":
        return config.loss.correction
    policy = config.policy
    is_one_update = policy.update_batch in (None, policy.rollout_batch)
    is_on_policy = current.mode == "on_policy" or (current.max_staleness == 0 and is_one_update)
    return "none" if is_on_policy else "decoupled"
