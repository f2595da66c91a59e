"""Scored group → example: checked, with advantages. Called by `learner.learner`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from learner.batch.advantages import advantages
from learner.batch.plan import Shape
from vtriune.messages import ScoredGroup


class DeliveryError(ValueError):
    """A group whose tokens, log-probs and spans do not fit together: a bug of whoever sent it, never trained on."""


class StaleTrajectory(RuntimeError):
    """A trajectory older than the order's `max_staleness`, or newer than the learner: admission was broken."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A group as the update needs it: G completions, of which `used` are trained on."""

    scored: ScoredGroup
    used: tuple[int, ...]
    """Completions whose verdict is not `fault`; empty when fewer than two remain (no baseline)."""
    advantages: np.ndarray
    """float32 (G,), 0 for completions that are not used"""

    @property
    def group_id(self) -> int:
        return self.scored.group.lease.group_id

    @property
    def shape(self) -> Shape:
        """Lengths for the plan and the denominator."""
        group = self.scored.group
        lengths = tuple(len(group.trajectories[index].token_ids) for index in self.used)
        return Shape(len(group.prompt_ids), self.used, lengths)


def example(scored: ScoredGroup, *, scale_by_std: bool, blocked_ids: Sequence[int] = ()) -> Example:
    """Check `scored` and compute its advantages over the trajectories that have a verdict other than `fault`.

    Zero-variance groups get advantage 0; their tokens still count in the denominator, as the formula says. Groups with
    fewer than two such trajectories count nowhere. Raises DeliveryError.
    """
    group = scored.group
    where = f"group {group.lease.group_id} of {scored.source} from generator {group.generator}"
    if not len(group.prompt_ids):
        raise DeliveryError(f"{where}: the prompt is empty; a completion needs a token to follow")
    if len(scored.verdicts) != len(group.trajectories):
        raise DeliveryError(f"{where}: {len(group.trajectories)} trajectories with {len(scored.verdicts)} verdicts")
    for index, trajectory in enumerate(group.trajectories):
        num = len(trajectory.token_ids)
        if not num == len(trajectory.logprobs) == sum(span.num_tokens for span in trajectory.spans) or not num:
            raise DeliveryError(
                f"{where}, completion {index}: {num} tokens, {len(trajectory.logprobs)} log-probs and spans "
                f"{[(span.version, span.num_tokens) for span in trajectory.spans]}; all three must cover the same tokens, at least one"
            )
        if not np.isfinite(trajectory.logprobs).all():
            raise DeliveryError(
                f"{where}, completion {index}: a log-prob is not finite; the sampler drew a token of probability 0"
            )
        if np.isin(trajectory.token_ids, blocked_ids).any():
            raise DeliveryError(
                f"{where}, completion {index}: holds an image or video pad id, which samplers must block"
            )
    used = tuple(index for index, verdict in enumerate(scored.verdicts) if verdict.status != "fault")
    values = np.zeros(len(group.trajectories), np.float32)
    if len(used) < 2:
        return Example(scored, (), values)
    values[list(used)] = advantages([scored.verdicts[index].reward for index in used], scale_by_std=scale_by_std)
    if not np.isfinite(values).all():
        raise DeliveryError(f"{where}: rewards {[verdict.reward for verdict in scored.verdicts]} are not all finite")
    return Example(scored, used, values)


def check_staleness(examples: Iterable[Example], version: int, max_staleness: int) -> list[int]:
    """Staleness of every used trajectory, in order; raises StaleTrajectory when one is above the bound or from the future."""
    staleness: list[int] = []
    for item in examples:
        for index in item.used:
            trajectory = item.scored.group.trajectories[index]
            age, newest = version - trajectory.oldest_version, max(span.version for span in trajectory.spans)
            if age > max_staleness or newest > version:
                raise StaleTrajectory(
                    f"group {item.group_id}, completion {index}: sampled by versions {trajectory.oldest_version} to {newest}, "
                    f"trained at version {version} with max_staleness {max_staleness}; the window admitted what it must not"
                )
            staleness.append(age)
    return staleness
