"""The window: which groups may be admitted, which make the next batch, and why no token is ever too stale.

Pure logic, no I/O, no clock; called by the controller alone.

Let P be the groups of a rollout batch, m the hard bound, W the look-ahead. Batch u is what the
learner trains on at version u; publishing it makes version u + 1.

**Admission.** A group is admitted while fewer than B = (m + 1)·P − (W − 1) groups are active: what overtaking may use up of the
bound is not used for running ahead, group by group. A slot is released when the version
trained on its group is published, or at once when the group is filtered or lost. With a filter, at most `max_oversample`·P
groups are generated for one batch; then the batch is cut from what is left, short or even empty.

**Cut.** Oldest first among the scored groups; at most W − 1 younger groups may overtake the oldest one that is left.

**The bound.** Let group g be admitted at version a as the n-th active group, n < B. Of the groups consumed before it at most n
are older and still active at a, and at most W − 1 are younger. So g is in batch a + ⌊(n + W − 1)/P⌋ at the latest, and its
staleness is at most ⌊((m + 1)·P − 1)/P⌋ = m, since no engine samples for it at a version below a.

That argument needs full batches and constant S and W. Short batches (a filter that leaves too few, the end of the data)
and live switches are covered by one invariant, kept by every cut, from which the bound follows for each group alone:

    **Feasible.** If the waiting groups were consumed strictly oldest first in full batches from now on, each group g
    would be consumed at a version ≤ a_g + m_g  (m_g: the bound in force when g was admitted).

A cut that would leave the rest infeasible waits. It cannot wait for ever: once all waiting groups are scored the cut *is*
the oldest-first one, which keeps the invariant.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

Mode = Literal["on_policy", "off_policy"]


class Limits(NamedTuple):
    """S, W and m of the text above."""

    target_staleness: int
    look_ahead: int
    max_staleness: int


def derive_limits(mode: Mode, max_staleness: int | None, look_ahead: int | None, rollout_batch: int) -> Limits:
    """W, and S = m − ⌈(W − 1)/P⌉, the whole versions left to run ahead. On-policy all are zero; off-policy m defaults to 2.

    Without a `look_ahead` of the user's, m ≥ 2 spends a quarter of a batch on overtaking (W = P/4 + 1), m ≤ 1 spends all of it on
    running ahead. (With a whole batch of overtaking at m = 2, a version starts a batch only after the one before: a third less
    throughput where the learner is faster than the longest completion.) Raises ValueError when `look_ahead` exceeds m·P + 1.
    """
    if mode == "on_policy":
        return Limits(0, 1, 0)
    bound = 2 if max_staleness is None else max_staleness
    width = look_ahead if look_ahead is not None else (rollout_batch // 4 + 1 if bound >= 2 else 1)
    overtaking = -(-(width - 1) // rollout_batch)
    if overtaking > bound:
        raise ValueError(
            f"policy.look_ahead {width} lets a group wait {overtaking} versions, more than max_staleness {bound} allows; "
            f"use at most {bound * rollout_batch + 1}"
        )
    return Limits(bound - overtaking, width, bound)


class _Entry(msgspec.Struct):
    admitted_version: int
    max_staleness: int
    is_scored: bool = False


class Window:
    """Admission and batch cutting for one run. Group ids rise in the order of admission."""

    def __init__(self, limits: Limits, rollout_batch: int, *, max_oversample: float = 2.0, version: int = 0) -> None:
        self.limits = limits
        self.rollout_batch = rollout_batch
        self.max_oversample = max_oversample
        self.version = version
        """Of the last publish."""
        self._waiting: dict[int, _Entry] = {}
        self._training: list[int] | None = None
        self._ahead: list[int] = []
        """Consumed ids younger than the oldest waiting group, sorted: the overtakes."""
        self._num_scored = 0
        """Waiting groups that are scored."""
        self._num_filtered = 0
        """Groups filtered since the last cut."""
        self._is_closed = False

    @property
    def capacity(self) -> int:
        """B."""
        return (self.limits.max_staleness + 1) * self.rollout_batch - (self.limits.look_ahead - 1)

    @property
    def num_active(self) -> int:
        """Groups that hold a slot: waiting, or trained on but not yet published."""
        return len(self._waiting) + len(self._training or ())

    @property
    def num_waiting(self) -> int:
        """Groups admitted and not yet in a batch."""
        return len(self._waiting)

    @property
    def is_training(self) -> bool:
        """A batch is cut and its version not yet published."""
        return self._training is not None

    @property
    def num_admissible(self) -> int:
        """How many groups may be admitted now, one after the other."""
        if self._is_closed:
            return 0
        slots = self.capacity - self.num_active
        # The invariant, for the groups to come: last in line, their version at consumption stays within their bound.
        feasible = (self.limits.max_staleness - self.is_training + 1) * self.rollout_batch - len(self._waiting)
        return max(0, math.ceil(min(slots, feasible, self._budget_left())))

    def can_admit(self) -> bool:
        """Whether the next `admit` is allowed."""
        return self.num_admissible > 0

    def admit(self, group_id: int) -> None:
        """Take a slot. Raises ValueError when none is free or `group_id` is not above all earlier ones."""
        if not self.can_admit():
            raise ValueError(f"group {group_id}: no slot free ({self.num_active} of {self.capacity} active)")
        if self._waiting and group_id <= next(reversed(self._waiting)):
            raise ValueError(f"group {group_id}: ids must rise with admission")
        self._waiting[group_id] = _Entry(self.version, self.limits.max_staleness)

    def mark_scored(self, group_id: int) -> None:
        """The group can be consumed. Idempotent; unknown ids raise KeyError."""
        entry = self._waiting[group_id]
        self._num_scored += not entry.is_scored
        entry.is_scored = True

    def drop(self, group_id: int, *, is_filtered: bool = True) -> None:
        """The group is filtered, or lost for good: its slot is free at once. Unknown ids raise KeyError."""
        self._num_scored -= self._waiting.pop(group_id).is_scored
        self._num_filtered += is_filtered
        self._forget_overtakes()

    def close(self) -> None:
        """The data are used up: nothing more is admitted, and a batch may be short once all that waits is scored."""
        self._is_closed = True

    @property
    def is_exhausted(self) -> bool:
        """Nothing waits and nothing more will come."""
        return self._is_closed and not self._waiting

    def __contains__(self, group_id: int) -> bool:
        """Whether the group waits."""
        return group_id in self._waiting

    def cut(self) -> list[int] | None:
        """The next batch, oldest first, or None while it must wait. At most one batch is in training at a time.

        An empty list is a legal batch: the filter left nothing of `max_oversample`·P groups; the version moves on.
        """
        if self._training is not None:
            return None
        if self._num_scored < self.rollout_batch and not self._may_be_short():
            return None
        batch = self._oldest_scored()
        if len(batch) < self.rollout_batch and not self._may_be_short():
            return None
        taken = set(batch)
        rest = (entry for group_id, entry in self._waiting.items() if group_id not in taken)
        if not self._is_feasible(rest, self.version + 1):
            return None
        for group_id in batch:
            del self._waiting[group_id]
            insort(self._ahead, group_id)
        self._forget_overtakes()
        self._training = batch
        self._num_scored -= len(batch)
        self._num_filtered = 0
        return batch

    def publish(self) -> list[int]:
        """The batch in training became version + 1: its slots are released. Returns its groups."""
        if self._training is None:
            raise ValueError(f"version {self.version}: nothing was trained on, so there is nothing to publish")
        released, self._training = self._training, None
        self.version += 1
        return released

    def switch(self, limits: Limits) -> None:
        """New limits from now on. Groups already admitted keep the bound they were admitted under."""
        self.limits = limits

    def overtakes(self) -> int:
        """How many younger groups have been consumed before the oldest waiting one."""
        return len(self._ahead)

    @property
    def num_filtered(self) -> int:
        """Groups filtered since the last cut: what of the oversampling is used."""
        return self._num_filtered

    def restore(self, version: int, bounds: Mapping[int, int], num_filtered: int) -> None:
        """Take up again at `version` with the waiting groups of a checkpoint, group id → bound, oldest first.

        They come back unscored and in their slots, so that a resume admits nothing that was not free before. Engines
        generate them anew at `version`, which is where their staleness is counted from.
        """
        self.version, self._num_scored, self._num_filtered = version, 0, num_filtered
        self._waiting = {group_id: _Entry(version, bound) for group_id, bound in bounds.items()}

    def _oldest_scored(self) -> list[int]:
        """Up to P scored groups, oldest first, with no more than W − 1 overtakes of the oldest group left behind."""
        batch: list[int] = []
        overtakes: int | None = None
        for group_id, entry in self._waiting.items():
            if len(batch) == self.rollout_batch:
                break
            if not entry.is_scored:
                if overtakes is None:
                    overtakes = len(self._ahead) - bisect_right(self._ahead, group_id)
            elif overtakes is None:
                batch.append(group_id)
            elif overtakes < self.limits.look_ahead - 1:
                overtakes += 1
                batch.append(group_id)
            else:
                break
        return batch

    def _may_be_short(self) -> bool:
        """Nothing more will come for this batch: none may be admitted, and no waiting group is still on its way."""
        if self._num_scored < len(self._waiting):
            return False
        return bool(self._waiting) if self._is_closed else self._budget_left() <= 0

    def _budget_left(self) -> float:
        """Groups that may still be generated for this batch and the S that run ahead. Never binds without a filter."""
        budget = self.capacity + (self.max_oversample - 1) * self.rollout_batch
        return budget - len(self._waiting) - self._num_filtered

    def _is_feasible(self, rest: Iterable[_Entry], next_version: int) -> bool:
        return all(
            next_version + index // self.rollout_batch <= entry.admitted_version + entry.max_staleness
            for index, entry in enumerate(rest)
        )

    def _forget_overtakes(self) -> None:
        oldest = next(iter(self._waiting), None)
        self._ahead = [] if oldest is None else self._ahead[bisect_right(self._ahead, oldest) :]
