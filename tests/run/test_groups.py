"""Groups: whatever happens to them, the window and the ledger say the same."""

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vtriune.messages import SampleRef
from vtriune.run.groups import Groups
from vtriune.run.ledger import LedgerState
from vtriune.run.window import WindowLimits, derive_limits

REF = SampleRef("f", 0)
BOUNDS = st.integers(0, 3)


class Story(RuleBasedStateMachine):
    """Every event, in any order; reports and losses also of groups that ended and of attempts that are outdated."""

    @initialize(rollout_batch=st.integers(1, 4), bound=BOUNDS, oversample=st.sampled_from([1.0, 2.0]))
    def begin(self, rollout_batch: int, bound: int, oversample: float) -> None:
        self.rollout_batch, self.oversample = rollout_batch, oversample
        self.groups = self.fresh(derive_limits("off_policy", bound, None, rollout_batch))
        self.training: list[int] = []
        self.num_admitted = 0

    def fresh(self, limits: WindowLimits) -> Groups:
        return Groups(limits, self.rollout_batch, max_oversample=self.oversample)

    def any_group(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, self.num_admitted - 1))

    @rule()
    def admit(self) -> None:
        if self.groups.can_admit():
            assert self.groups.admit(REF, "s").group_id == self.num_admitted
            self.num_admitted += 1
        else:
            with pytest.raises(ValueError, match="no slot is free"):
                self.groups.admit(REF, "s")

    @rule()
    def lease(self) -> None:
        group = self.groups.first_to_lease()
        if group is not None:
            assert self.groups.lease(group.group_id, 1.0) == group.attempt

    @precondition(lambda self: self.num_admitted)
    @rule(data=st.data(), is_filtered=st.booleans())
    def report(self, data: st.DataObject, is_filtered: bool) -> None:
        group_id = self.any_group(data)
        # Without a slot it was leased to nobody, so nobody reports it.
        if group_id not in self.groups._window.without_slot:
            self.groups.report(group_id, 0, is_filtered=is_filtered)

    @precondition(lambda self: self.num_admitted)
    @rule(data=st.data(), attempt=st.integers(0, 12), is_death=st.booleans())
    def lose(self, data: st.DataObject, attempt: int, is_death: bool) -> None:
        before = self.groups.counts()["lost"]
        is_lost = self.groups.lose(self.any_group(data), attempt, "gone", is_death=is_death)
        assert self.groups.counts()["lost"] == before + is_lost

    @rule()
    def lose_the_overdue_until_they_are_lost_for_good(self) -> None:
        overdue = self.groups.overdue(2.0)
        for group in overdue[:1]:
            while not self.groups.lose(group.group_id, group.attempt, "overdue"):
                self.groups.lease(group.group_id, 1.0)

    @rule()
    def cut(self) -> None:
        batch = self.groups.cut()
        if batch is not None:
            assert not self.training
            self.training = batch
            assert set(self.groups.attempts(batch)) == set(batch)

    @precondition(lambda self: self.groups.is_training)
    @rule()
    def publish(self) -> None:
        before = self.groups.counts()["consumed"]
        assert self.groups.publish() == self.training
        assert self.groups.counts()["consumed"] == before + len(self.training)
        self.training = []

    @rule(bound=BOUNDS)
    def switch(self, bound: int) -> None:
        self.groups.switch(derive_limits("off_policy", bound, None, self.rollout_batch))

    @rule()
    def close(self) -> None:
        self.groups.close()

    @precondition(lambda self: not self.groups.is_training)
    @rule(bound=BOUNDS, rollout_batch=st.none() | st.integers(1, 4))
    def resume(self, bound: int, rollout_batch: int | None) -> None:
        before = self.rollout_batch
        self.rollout_batch = rollout_batch or before
        state = msgspec.json.decode(msgspec.json.encode(self.groups.state()), type=LedgerState)
        resumed = self.fresh(derive_limits("off_policy", bound, None, self.rollout_batch))
        resumed.restore(state, self.groups.version, self.groups.filtered)
        if self.rollout_batch >= before and not self.groups._window.without_slot:
            assert resumed.slots()["active"] == self.groups.slots()["active"]
        self.groups = resumed

    @invariant()
    def window_and_ledger_hold_the_same_groups_in_the_same_states(self) -> None:
        window, ledger = self.groups._window, self.groups._ledger
        opened = {group.group_id: group for group in ledger.state().open_groups}
        with_slot = [*window._waiting, *(window._training or [])]
        assert sorted([*with_slot, *self.groups._window.without_slot]) == sorted(opened)
        assert all(opened[group_id].state == "admitted" for group_id in self.groups._window.without_slot)
        assert max(with_slot, default=-1) < min(self.groups._window.without_slot, default=self.num_admitted)
        assert window._training is None or set(window._training) == set(self.training)
        for group_id, entry in window._waiting.items():
            assert entry.is_scored == (opened[group_id].state == "scored")
            assert entry.max_staleness == opened[group_id].max_staleness
        assert all(opened[group_id].state == "scored" for group_id in self.training)
        assert self.groups.slots()["active"] == len(with_slot)
        self.groups.audit()


Story.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestWindowAndLedgerAgree = Story.TestCase
