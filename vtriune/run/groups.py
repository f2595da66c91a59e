"""Every group of a run from admission to its end, as the controller and its leasing see it: one method for each event.

    admit ──▶ lease ──▶ report ──▶ cut ──▶ publish
      ▲         │          └─ filtered or faulted: its slot is free at once, its end is on the books
      └─ lose ──┘ (again, or for good)

Slots and batches are the window's, attempts and ends the ledger's. Both hold every open group, and nothing but this class changes
either, so that they cannot differ: a group waits or is trained on in the window exactly while it is open in the ledger, and is
scored in both or in neither. The one exception are groups that find no slot at a resume with a smaller rollout batch: they are open in
the ledger and wait outside of the window until it admits them, ahead of new ones.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from vtriune.messages import SampleRef
from vtriune.run.ledger import End, Ledger, LedgerState, OpenGroup
from vtriune.run.window import Window, WindowLimits


class Accounts(NamedTuple):
    """What became of every group so far: per source, drawn = consumed + filtered + faulted + lost + open."""

    by_source: dict[str, dict[str, int]]
    lost_reasons: dict[str, int]


class Groups:
    """The groups of one run. Pure logic; the clock is an argument.

    Raises what window and ledger raise (ValueError, LedgerError) for an event that contradicts them: a fault of the caller's.
    """

    def __init__(self, limits: WindowLimits, rollout_batch: int, *, max_oversample: float = 2.0) -> None:
        self._hold(Window(limits, rollout_batch, max_oversample=max_oversample), Ledger())

    def _hold(self, window: Window, ledger: Ledger) -> None:
        """What concerns one of them alone is handed on as it is; its text stands there."""
        self._window, self._ledger = window, ledger
        self.close, self.cut, self.switch = window.close, window.cut, window.switch
        self.lease, self.overdue = ledger.lease, ledger.overdue
        self.attempts, self.open_from = ledger.attempts, ledger.open_from
        self.num_lost_among, self.take_solved = ledger.num_lost_among, ledger.take_solved
        self.state, self.counts, self.audit = ledger.state, ledger.counts, ledger.audit

    # Events.

    def admit(self, sample: SampleRef, source: str) -> OpenGroup:
        """A new group takes a slot, under the bound in force. Raises ValueError when `can_admit` is false."""
        if not self.can_admit():
            raise ValueError(f"no slot is free: {self.slots()}")
        group = self._ledger.admit(sample, source, self._window.limits.max_staleness)
        self._window.admit(group.group_id)
        return group

    def report(
        self,
        group_id: int,
        attempt: int,
        *,
        is_filtered: bool,
        is_faulted: bool = False,
        solve_rate: float | None = None,
    ) -> bool:
        """The group is scored and delivered, and joins the next batch unless it is filtered or faulted. False for a duplicate, which
        changes nothing."""
        if not self._ledger.report(group_id, attempt, solve_rate):
            return False
        if is_filtered or is_faulted:
            (self._ledger.fault if is_faulted else self._ledger.filter)(group_id)
            self._window.drop(group_id)
        else:
            self._window.mark_scored(group_id)
        return True

    def lose(self, group_id: int, attempt: int, reason: str, *, is_death: bool = False) -> bool:
        """The lease ended without a report. Whether that lost the group for good; else it is leased again, unless `attempt` is
        outdated."""
        is_lost = self._ledger.lose_lease(group_id, attempt, reason, is_death=is_death)
        if is_lost:
            self._window.drop(group_id, is_filtered=False)
        return is_lost

    def publish(self) -> list[int]:
        """What was trained on became a version: its groups are consumed, their slots free. Returns them."""
        released = self._window.publish()
        self._ledger.consume(released)
        return released

    def restore(self, state: LedgerState, version: int, filtered: Sequence[int]) -> None:
        """Take up again from a checkpoint: open groups are to be generated anew, in the slots they had."""
        self._ledger.restore(state)
        self._window.restore(version, self._ledger.bounds(), filtered)
        for group_id in self._window.without_slot:
            # Of its admission to come; until then no bound of an earlier run gives it a slot at another resume.
            self._ledger.get(group_id).max_staleness = 0

    # What a checkpoint keeps: these, and the ledger's `state`, from which the window is restored too.

    @property
    def version(self) -> int:
        """Of the last publish."""
        return self._window.version

    @property
    def filtered(self) -> list[int]:
        """Groups filtered for each batch to come."""
        return self._window.filtered

    # What may happen next.

    @property
    def is_training(self) -> bool:
        """A batch is cut and not yet published."""
        return self._window.is_training

    @property
    def is_exhausted(self) -> bool:
        """Nothing waits and nothing more will come."""
        return self._window.is_exhausted

    def can_admit(self) -> bool:
        """Whether a new group may be admitted."""
        return not self._window.without_slot and self._window.can_admit()

    def first_to_lease(self) -> OpenGroup | None:
        """The oldest group without a generator that has a slot; one that lacks it takes one if there is room, under the bound in force
        like a new group, since nothing of it was sampled."""
        group, waiting = self._ledger.first_to_lease(), self._window.without_slot
        if group is None or not waiting or group.group_id < waiting[0]:
            return group
        if not self._window.can_admit():
            return None
        self._window.admit(group.group_id)
        group.max_staleness = self._window.limits.max_staleness
        return group

    @property
    def num_to_lease(self) -> int:
        """Groups that may be leased: with a slot and without a generator, or admissible."""
        return self._ledger.num_to_lease - len(self._window.without_slot) + self._window.num_admissible

    # What a batch is made of.

    def bound(self, batch: Iterable[int]) -> int:
        """The largest bound under which a group of `batch` was admitted; 0 for an empty one."""
        return max((self._ledger.get(group_id).max_staleness for group_id in batch), default=0)

    # Accounts.

    @property
    def num_ended(self) -> int:
        """Groups consumed, filtered, faulted or lost: samples accounted for."""
        return self._ledger.num_ended

    def accounts(self) -> Accounts:
        """Of every group drawn so far."""
        ended, still_open = self._ledger.ended_by_source(), self._ledger.open_by_source()
        by_source = {}
        for source in sorted({*ended, *still_open}):
            ends = {end: ended.get(source, {}).get(end, 0) for end in get_args(End)} | {
                "open": still_open.get(source, 0)
            }
            by_source[source] = {"drawn": sum(ends.values()), **ends}
        return Accounts(by_source, dict(self._ledger.lost_reasons))

    def slots(self) -> dict[str, int]:
        """Active groups, how many may be, and how many younger groups were consumed before the oldest that waits."""
        window = self._window
        return {"active": window.num_active, "capacity": window.capacity, "overtakes": window.overtakes()}

    def figures(self) -> dict[str, float]:
        """For `metrics.jsonl`: active groups; what became of all others, in sum and by source."""
        ends, counts = get_args(End), self._ledger.counts()
        return {
            "window/active": float(self._window.num_active),
            **{f"ledger/{end}": float(counts[end]) for end in ends},
            "ledger/duplicates": float(self._ledger.num_duplicates),
            "ledger/reissues": float(self._ledger.num_reissues),
            **{
                f"source/{source}/ledger/{end}": float(by_end.get(end, 0))
                for source, by_end in self._ledger.ended_by_source().items()
                for end in ends
            },
        }
