"""Scored group → example: checked, with advantages. Keeps delivered groups until they are trained. Called by `learner.learner`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.advantages import advantages
from learner.balance import Shape
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
    def has_signal(self) -> bool:
        """Whether any advantage is not 0."""
        return bool(self.advantages.any())

    @property
    def shape(self) -> Shape:
        """Lengths for the plan."""
        group = self.scored.group
        lengths = tuple(len(group.trajectories[index].token_ids) for index in self.used)
        return Shape(len(group.prompt_ids), self.used, lengths)

    @property
    def num_tokens(self) -> int:
        """Response tokens that count in the denominator."""
        return sum(self.shape.lengths)

    def versions(self, completion: int) -> np.ndarray:
        """int64 (T,): which version sampled each token."""
        spans = self.scored.group.trajectories[completion].spans
        return np.repeat([span.version for span in spans], [span.num_tokens for span in spans])


def example(scored: ScoredGroup, *, scale_by_std: bool, blocked_ids: Sequence[int] = ()) -> Example:
    """Check `scored` and compute its advantages over the trajectories that have a verdict other than `fault`.

    Zero-variance groups get advantage 0; their tokens still count in the denominator, as the formula says. Groups with
    fewer than two such trajectories count nowhere. Raises DeliveryError.
    """
    group = scored.group
    where = f"group {group.lease.group_id} of {scored.source} from generator {group.generator}"
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
    """Staleness of every used trajectory; raises StaleTrajectory when one is above the bound or from the future."""
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


class Inbox:
    """Delivered examples by group id and attempt, until trained.

    Several attempts of a group may come, at each rank in an order of its own; the order to train names the one that counts. What
    comes twice or too late is counted and dropped, what the policy filtered is dropped when its turn has passed: memory stays
    that of the window.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, dict[int, Example]] = {}
        self._consumed: set[int] = set()
        self._open_from = 0
        """Groups below have ended: trained, filtered or lost."""
        self.num_duplicates = 0

    def add(self, item: Example) -> bool:
        """Whether `item` was new."""
        attempt = item.scored.group.lease.attempt
        is_late = item.group_id in self._consumed or item.group_id < self._open_from
        if is_late or attempt in self._waiting.get(item.group_id, ()):
            self.num_duplicates += 1
            return False
        self._waiting.setdefault(item.group_id, {})[attempt] = item
        return True

    def missing(self, group_ids: Iterable[int], attempts: Mapping[int, int]) -> list[int]:
        """Those of which the attempt that counts (0 where `attempts` is silent) has not arrived."""
        return [i for i in group_ids if attempts.get(i, 0) not in self._waiting.get(i, ())]

    def take(self, group_ids: Sequence[int], attempts: Mapping[int, int]) -> list[Example]:
        """Hand over and mark as consumed; raises DeliveryError naming ids that are absent."""
        absent = self.missing(group_ids, attempts)
        if absent:
            raise DeliveryError(
                f"groups {absent} are ordered for training, but were never delivered to this learner rank"
            )
        self._consumed.update(group_ids)
        delivered = [self._waiting.pop(group_id) for group_id in group_ids]
        self.num_duplicates += sum(len(others) - 1 for others in delivered)
        return [others[attempts.get(i, 0)] for i, others in zip(group_ids, delivered, strict=True)]

    def forget_below(self, group_id: int) -> None:
        """Every group of a smaller id has ended: drop what is left of those, and whatever else comes of them."""
        self._open_from = group_id
        for ended in [waiting for waiting in self._waiting if waiting < group_id]:
            del self._waiting[ended]
        self._consumed = {consumed for consumed in self._consumed if consumed >= group_id}

    def state(self) -> dict[str, Any]:
        """Which groups were trained or have ended otherwise; part of a checkpoint."""
        return {"consumed": sorted(self._consumed), "open_from": self._open_from}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Start over after a resume: nothing waiting, the ended known."""
        self._waiting.clear()
        self._consumed, self._open_from = set(state["consumed"]), state["open_from"]
