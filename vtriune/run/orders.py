"""The one maker of orders to train. Pure; called by the controller.

What was ordered is archived with the version (`vtriune.record.archive.ORDER`), and a replay takes it from there.
"""

from vtriune.config.tree import Config
from vtriune.messages import Correction, TrainOrder
from vtriune.run.groups import Groups
from vtriune.run.schedule import ModeInForce, Progress, WorkDone


def make(
    config: Config, in_force: ModeInForce, progress: Progress, done: WorkDone, groups: Groups, batch: list[int]
) -> TrainOrder:
    """The order to train on the scored groups of `batch`, oldest first, once `done` is done."""
    policy = config.policy
    size = policy.rollout_batch if in_force.mode == "on_policy" else policy.update_batch or policy.rollout_batch
    updates = update_batches(batch, size)
    # After a switch a group's bound may be another than the one in force.
    max_staleness = groups.bound(batch)
    return TrainOrder(
        version=done.versions,
        updates=updates,
        mode=in_force.mode,
        bound=in_force.max_staleness,
        max_staleness=max_staleness,
        correction=correction(config, max_staleness, len(updates)),
        progress=progress.through(len(batch), len(updates), done),
        attempts=groups.attempts(batch),
        open_from=groups.open_from(batch),
    )


def update_batches(group_ids: list[int], update_batch: int) -> list[list[int]]:
    """Group ids of each optimiser step, in order; the last may be short."""
    return [group_ids[start : start + update_batch] for start in range(0, len(group_ids), update_batch)]


def correction(config: Config, max_staleness: int, num_updates: int) -> Correction:
    """`loss.correction`, with `auto` resolved by what is trained on: groups that cannot be stale, in one update, are on-policy data."""
    if config.loss.correction != "auto":
        return config.loss.correction
    return "none" if max_staleness == 0 and num_updates <= 1 else "decoupled"
