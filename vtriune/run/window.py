"""The window: which groups may be admitted, which make the next batch, and why no token is ever too stale.

Pure logic, no I/O, no clock; called by `Groups` alone.

Let P be the groups of a rollout batch, m the hard bound, W the look-ahead. Batch u is what the
learner trains on at version u; publishing it makes version u + 1.

**Admission.** A group is admitted while fewer than B = (m + 1)·P − (W − 1) groups are active: what overtaking may use up of the
bound is not used for running ahead, group by group. A slot is released when the version
trained on its group is published, or at once when the group is filtered or lost.

**Size.** The waiting groups, oldest first, are in line for the batches to come: the next one, and those that run ahead for later
ones, m at most. A filtered group counts for the batch that it was in line for, and a younger one takes its place while that batch
may have more: of ⌊`max_oversample`·P⌋ groups for one batch, F_u may be filtered before it has less than P left, and then it is that
much shorter: its size is min(P, ⌊`max_oversample`·P⌋ − F_u), perhaps 0. So no batch ever costs more groups than that, whatever was
generated ahead of it for others. A lost group costs nothing: it is replaced. Only the batch that ends the data may be shorter.

**Cut.** Oldest first among the scored groups, as many as the batch's size; at most W − 1 younger groups may overtake the oldest one
that is left.

**The bound.** Let group g be admitted at version a as the n-th active group, n < B. Of the groups consumed before it at most n
are older and still active at a, and at most W − 1 are younger. So g is in batch a + ⌊(n + W − 1)/P⌋ at the latest, and its
staleness is at most ⌊((m + 1)·P − 1)/P⌋ = m, since no engine samples for it at a version below a.

That argument needs full batches and constant m and W. Short batches (a filter that leaves too few, the end of the data)
and live switches are covered by one invariant, from which the bound follows for each group alone:

    **Feasible.** If the waiting groups were consumed strictly oldest first in batches of their sizes from now on, each group g
    would be consumed at a version ≤ a_g + m_g  (m_g: the bound in force when g was admitted).

An admission that would break it is refused. A filtered group leaves every other in line for the batch it was in line for, or an
earlier one: where it makes its batch shorter, it was itself in line for that batch. A cut that would leave the rest infeasible
waits. It cannot wait for ever: once all waiting groups are scored the cut *is* the oldest-first one, which keeps the invariant; and
while fewer wait than the next batch needs, another can be admitted, because its size is at most P ≤ B. A resume keeps it too, under
another P or with other limits: restored groups take slots oldest first as long as it holds, and the others are admitted again when
there is room, before any new group.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice, repeat, takewhile
from typing import NamedTuple

import msgspec

from vtriune.config.modes import bound_of
from vtriune.config.tree import Mode


class WindowLimits(NamedTuple):
    """W and m of the text above."""

    look_ahead: int
    max_staleness: int


def derive_limits(mode: Mode, max_staleness: int | None, look_ahead: int | None, rollout_batch: int) -> WindowLimits:
    """W and m. On-policy nothing overtakes and nothing is stale; `bound_of` says m's default.

    Without a `look_ahead` of the user's, m ≥ 2 spends a quarter of a batch on overtaking (W = P/4 + 1), m ≤ 1 spends all of it on
    running ahead. (With a whole batch of overtaking at m = 2, a version starts a batch only after the one before: a third less
    throughput where the learner is faster than the longest completion.) Raises ValueError when `look_ahead` exceeds m·P + 1.
    """
    if mode == "on_policy":
        return WindowLimits(1, 0)
    bound = bound_of(mode, max_staleness)
    width = look_ahead if look_ahead is not None else (rollout_batch // 4 + 1 if bound >= 2 else 1)
    overtaking = -(-(width - 1) // rollout_batch)
    if overtaking > bound:
        raise ValueError(
            f"policy.look_ahead {width} lets a group wait {overtaking} versions, more than max_staleness {bound} allows; "
            f"use at most {bound * rollout_batch + 1}"
        )
    return WindowLimits(width, bound)


class _Entry(msgspec.Struct):
    admitted_version: int
    max_staleness: int
    is_scored: bool = False


class Window:
    """Admission and batch cutting for one run. Group ids rise in the order of admission."""

    def __init__(
        self, limits: WindowLimits, rollout_batch: int, *, max_oversample: float = 2.0, version: int = 0
    ) -> None:
        self.limits = limits
        self.rollout_batch = rollout_batch
        self.max_oversample = max_oversample
        # Rounded down, but 1.15 · 100 is 115, whatever binary fractions make of it.
        self.max_generated = math.floor(round(max_oversample * rollout_batch, 6))
        """Groups that one batch may cost: those trained on, and those filtered for it."""
        self.version = version
        """Of the last publish."""
        self._waiting: dict[int, _Entry] = {}
        self._training: list[int] | None = None
        self._ahead: list[int] = []
        """Consumed ids younger than the oldest waiting group, sorted: the overtakes."""
        self._num_scored = 0
        """Waiting groups that are scored."""
        self.filtered: list[int] = []
        """Groups filtered so far for the next batch, for the one after, and so on; 0 beyond the end."""
        self.without_slot: deque[int] = deque()
        """Restored groups that are to be admitted again, in this order and before any other."""
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
        """How many groups may be admitted now, one after the other: those without a slot first, and new ones unless the data are
        used up."""
        slots = self.capacity - self.num_active
        # The invariant, for the groups to come: last in line, their version at consumption stays within their bound.
        num_batches = self.limits.max_staleness - self.is_training + 1
        num_short = sum(self.rollout_batch - self._size(batch) for batch in range(min(num_batches, len(self.filtered))))
        room = max(0, min(slots, num_batches * self.rollout_batch - num_short - len(self._waiting)))
        return min(room, len(self.without_slot)) if self._is_closed else room

    def can_admit(self) -> bool:
        """Whether the next `admit` is allowed."""
        return self.num_admissible > 0

    def admit(self, group_id: int) -> None:
        """Take a slot. Raises ValueError when none is free, or `group_id` is not the first `without_slot`, or, where there is none, not
        above all earlier ones."""
        if not self.can_admit():
            raise ValueError(f"group {group_id}: no slot free ({self.num_active} of {self.capacity} active)")
        expected = self.without_slot.popleft() if self.without_slot else group_id
        if group_id != expected or (self._waiting and group_id <= next(reversed(self._waiting))):
            raise ValueError(f"group {group_id}: ids must rise with admission")
        self._waiting[group_id] = _Entry(self.version, self.limits.max_staleness)

    def mark_scored(self, group_id: int) -> None:
        """The group can be consumed. Idempotent; unknown ids raise KeyError."""
        entry = self._waiting[group_id]
        self._num_scored += not entry.is_scored
        entry.is_scored = True

    def drop(self, group_id: int, *, is_filtered: bool = True) -> None:
        """The group is filtered, or lost for good: its slot is free at once. Unknown ids raise KeyError."""
        if is_filtered:
            place = bisect_left(list(self._waiting), group_id)
            batch = next(islice(self._batches(), place, None))
            self.filtered += [0] * (batch + 1 - len(self.filtered))
            self.filtered[batch] += 1
        self._num_scored -= self._waiting.pop(group_id).is_scored
        self._forget_overtakes()

    def close(self) -> None:
        """The data are used up: nothing new is admitted, and the last batch may be short, once all that waits is scored."""
        self._is_closed = True

    @property
    def is_exhausted(self) -> bool:
        """Nothing waits and nothing more will come."""
        return self._is_closed and not self._waiting and not self.without_slot

    def cut(self) -> list[int] | None:
        """The next batch, oldest first, or None while it must wait. At most one batch is in training at a time.

        An empty list is a legal batch: the filter left nothing of what it may cost, or of the end of the data; the version moves on.
        """
        if self._training is not None:
            return None
        is_last = self._is_closed and not self.without_slot and self._num_scored == len(self._waiting)
        size = self._size(0)
        if self._num_scored < size and not is_last:
            return None
        batch = self._oldest_scored(size)
        if len(batch) < size and not is_last:
            return None
        taken = set(batch)
        rest = (entry for group_id, entry in self._waiting.items() if group_id not in taken)
        if not self._is_feasible(rest):
            return None
        for group_id in batch:
            del self._waiting[group_id]
            insort(self._ahead, group_id)
        self._forget_overtakes()
        self._training = batch
        self._num_scored -= len(batch)
        self.filtered = self.filtered[1:]
        return batch

    def publish(self) -> list[int]:
        """The batch in training became version + 1: its slots are released. Returns its groups."""
        if self._training is None:
            raise ValueError(f"version {self.version}: nothing was trained on, so there is nothing to publish")
        released, self._training = self._training, None
        self.version += 1
        return released

    def switch(self, limits: WindowLimits) -> None:
        """New limits from now on. Groups already admitted keep the bound they were admitted under."""
        self.limits = limits

    def overtakes(self) -> int:
        """How many younger groups have been consumed before the oldest waiting one."""
        return len(self._ahead)

    def restore(self, version: int, bounds: Mapping[int, int], filtered: Sequence[int]) -> None:
        """Take up again at `version` with the waiting groups of a checkpoint, group id → bound, oldest first.

        They come back unscored and in their slots, so that a resume admits nothing that was not free before. Engines
        generate them anew at `version`, which is where their staleness is counted from. Where the rollout batch is smaller than the
        one they were admitted under, the youngest may not be consumable within their bounds: these are left `without_slot`.
        """
        self.version, self._num_scored = version, 0
        # What a larger batch has cost beyond what this one may is not charged to the next.
        self.filtered = [min(num_filtered, self.max_generated) for num_filtered in filtered]
        ids = list(bounds)
        in_time = (bounds[group_id] >= batch for group_id, batch in zip(ids, self._batches(), strict=False))
        num_slots = sum(1 for _ in takewhile(bool, in_time))
        self._waiting = {group_id: _Entry(version, bounds[group_id]) for group_id in ids[:num_slots]}
        self.without_slot = deque(ids[num_slots:])

    def _size(self, batch: int) -> int:
        """Of a batch to come, by its number from the next one on, 0."""
        num_filtered = self.filtered[batch] if batch < len(self.filtered) else 0
        return max(0, min(self.rollout_batch, self.max_generated - num_filtered))

    def _batches(self, first: int = 0) -> Iterator[int]:
        """For each place in line, from the head of batch `first` on, the batch it belongs to. Without end."""
        for batch in count(first):
            yield from repeat(batch, self._size(batch))

    def _oldest_scored(self, size: int) -> list[int]:
        """Up to `size` scored groups, oldest first, with no more than W − 1 overtakes of the oldest group left behind."""
        batch: list[int] = []
        overtakes: int | None = None
        for group_id, entry in self._waiting.items():
            if len(batch) == size:
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

    def _is_feasible(self, rest: Iterable[_Entry]) -> bool:
        """Whether those that wait on, oldest first, could all be consumed in time once the next batch is cut."""
        return all(
            self.version + batch <= entry.admitted_version + entry.max_staleness
            for entry, batch in zip(rest, self._batches(first=1), strict=False)
        )

    def _forget_overtakes(self) -> None:
        oldest = next(iter(self._waiting), None)
        self._ahead = [] if oldest is None else self._ahead[bisect_right(self._ahead, oldest) :]
