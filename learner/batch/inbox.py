"""Delivered examples, kept until they are trained. Called by `learner.learner`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from learner.batch.examples import DeliveryError, Example


class GroupInbox:
    """Delivered examples by group id and attempt, until trained.

    Several attempts of a group may come, at each rank in an order of its own; the order to train names the one that counts. What
    comes twice or too late is counted and dropped, what the policy filtered is dropped when its turn has passed: memory stays
    that of the window, (max_staleness + 1) · rollout_batch groups of 8 bytes a token; texts are left out before they are sent.
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
