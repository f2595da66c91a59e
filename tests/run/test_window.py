"""The window's promises, over random sequences of events and against the bound that its text proves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vtriune.run.window import Window, WindowLimits, derive_limits


class Simulation(RuleBasedStateMachine):
    """Generators that finish, lose and filter groups in any order, a learner that trains and publishes whenever it can."""

    @initialize(
        rollout_batch=st.integers(1, 5),
        max_staleness=st.integers(0, 4),
        look_ahead=st.none() | st.integers(1, 12),
        oversample=st.floats(1.0, 3.0),
    )
    def start(self, rollout_batch: int, max_staleness: int, look_ahead: int | None, oversample: float) -> None:
        if look_ahead is not None:
            look_ahead = min(look_ahead, max_staleness * rollout_batch + 1)
        self.limits = derive_limits("off_policy", max_staleness, look_ahead, rollout_batch)
        self.window = Window(self.limits, rollout_batch, max_oversample=oversample)
        self.next_id = 0
        self.admitted: dict[int, tuple[int, int]] = {}
        self.scored: set[int] = set()
        self.ended: dict[int, str] = {}
        self.batch: list[int] | None = None
        self.num_filtered = self.num_charged = 0

    def running(self) -> list[int]:
        return [g for g in self.admitted if g not in self.ended and g not in self.scored]

    @rule()
    def admit_all(self) -> None:
        num_admissible = self.window.num_admissible
        while self.window.can_admit():
            num_admissible -= 1
            group_id = self.window.without_slot[0] if self.window.without_slot else self.next_id
            self.window.admit(group_id)
            self.admitted[group_id] = (self.window.version, self.window.limits.max_staleness)
            self.next_id = max(self.next_id, group_id + 1)
        assert num_admissible == 0

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def score_one(self, data: st.DataObject) -> None:
        group_id = data.draw(st.sampled_from(self.running()))
        self.window.mark_scored(group_id)
        self.scored.add(group_id)

    @precondition(lambda self: len(self.running()) > 1)
    @rule()
    def score_all_but_the_oldest(self) -> None:
        for group_id in self.running()[1:]:
            self.window.mark_scored(group_id)
            self.scored.add(group_id)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), is_filtered=st.booleans())
    def drop_one(self, data: st.DataObject, is_filtered: bool) -> None:
        group_id = data.draw(st.sampled_from(self.running()))
        active = self.window.num_active
        self.window.drop(group_id, is_filtered=is_filtered)
        assert self.window.num_active == active - 1
        self.ended[group_id] = "dropped"
        self.num_filtered += is_filtered

    @precondition(lambda self: self.batch is None)
    @rule()
    def cut(self) -> None:
        num_filtered = next(iter(self.window.filtered), 0)
        self.batch = self.window.cut()
        if self.batch is not None:
            assert len(self.batch) + num_filtered <= self.window.max_oversample * self.window.rollout_batch + 1e-6
            self.num_charged += num_filtered
        for group_id in self.batch or ():
            assert group_id not in self.ended
            assert group_id in self.scored
            self.ended[group_id] = "consumed"
            admitted_version, bound = self.admitted[group_id]
            assert self.window.version - admitted_version <= bound

    @precondition(lambda self: self.batch is not None)
    @rule()
    def publish(self) -> None:
        before = self.window.version
        assert self.window.publish() == self.batch
        assert self.window.version == before + 1
        self.batch = None

    @rule(mode=st.sampled_from(["on_policy", "off_policy"]), bound=st.integers(0, 4))
    def switch(self, mode: str, bound: int) -> None:
        self.window.switch(derive_limits(mode, bound, None, self.window.rollout_batch))

    @rule()
    def resume(self) -> None:
        if self.batch is not None:
            return
        before = self.window
        self.restore(Window(before.limits, before.rollout_batch, max_oversample=before.max_oversample))
        if not before.without_slot:
            assert not self.window.without_slot
            assert self.window.num_active == before.num_active
            assert self.window.can_admit() == before.can_admit()

    @rule(rollout_batch=st.integers(1, 5), bound=st.integers(0, 4), oversample=st.floats(1.0, 3.0))
    def resume_with_another_batch_and_bound(self, rollout_batch: int, bound: int, oversample: float) -> None:
        if self.batch is None:
            limits = derive_limits("off_policy", bound, None, rollout_batch)
            self.restore(Window(limits, rollout_batch, max_oversample=oversample))

    def restore(self, fresh: Window) -> None:
        waiting = [g for g in self.admitted if g not in self.ended]
        bounds = {g: self.admitted[g][1] for g in waiting} | dict.fromkeys(self.window.without_slot, 0)
        fresh.restore(self.window.version, bounds, self.window.filtered)
        self.num_charged += sum(self.window.filtered) - sum(fresh.filtered)
        self.window = fresh
        self.admitted |= {group_id: (fresh.version, bound) for group_id, bound in bounds.items()}
        for group_id in fresh.without_slot:
            del self.admitted[group_id]
        self.scored = {g for g in self.scored if g in self.ended}

    @rule()
    def everything_scored_never_deadlocks(self) -> None:
        """With all waiting groups scored and nothing more to admit, the learner always gets its batch."""
        self.admit_all()
        for group_id in self.running():
            self.window.mark_scored(group_id)
            self.scored.add(group_id)
        if self.batch is None:
            self.cut()
            assert self.batch is not None

    @invariant()
    def active_is_what_was_admitted_and_not_released(self) -> None:
        if not hasattr(self, "window"):
            return
        waiting = [g for g in self.admitted if g not in self.ended]
        assert self.window.num_waiting == len(waiting)
        assert self.window.num_active == len(waiting) + len(self.batch or ())

    @invariant()
    def every_filtered_group_counts_for_one_batch(self) -> None:
        if hasattr(self, "window"):
            assert self.num_charged + sum(self.window.filtered) == self.num_filtered


Simulation.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestTheBoundHoldsOverRandomEvents = Simulation.TestCase


@given(st.integers(1, 64), st.integers(0, 8), st.none() | st.integers(1, 300))
def test_derived_limits_never_exceed_the_hard_bound(rollout_batch: int, bound: int, look_ahead: int | None) -> None:
    try:
        limits = derive_limits("off_policy", bound, look_ahead, rollout_batch)
    except ValueError:
        assert look_ahead is not None
        assert look_ahead > bound * rollout_batch + 1
        return
    assert -(-(limits.look_ahead - 1) // rollout_batch) <= bound


def test_on_policy_admits_one_batch_and_waits_for_its_publish() -> None:
    window = Window(derive_limits("on_policy", None, None, 3), 3)
    for group_id in range(3):
        window.admit(group_id)
    assert not window.can_admit()
    window.mark_scored(2)
    window.mark_scored(0)
    assert window.cut() is None
    window.mark_scored(1)
    assert window.cut() == [0, 1, 2]
    assert not window.can_admit()
    window.publish()
    assert window.can_admit()


def test_a_slow_group_is_overtaken_by_at_most_the_look_ahead_and_then_waited_for() -> None:
    window = Window(WindowLimits(look_ahead=3, max_staleness=3), 2)
    next_id = 0
    consumed: list[int] = []
    while True:
        while window.can_admit():
            window.admit(next_id)
            if next_id != 0:
                window.mark_scored(next_id)
            next_id += 1
        batch = window.cut()
        if batch is None:
            break
        consumed += batch
        window.publish()
    assert consumed == [1, 2]
    assert window.overtakes() == 2
    window.mark_scored(0)
    assert window.cut() == [0, 3]


def test_a_short_batch_is_cut_once_the_filter_used_up_the_oversampling() -> None:
    window = Window(derive_limits("on_policy", None, None, 4), 4, max_oversample=1.5)
    num_admitted = 0
    for _ in range(6):
        while window.can_admit():
            window.admit(num_admitted)
            num_admitted += 1
        if window.num_waiting > 1:
            window.drop(num_admitted - window.num_waiting)
    assert num_admitted == 6
    assert window.cut() is None
    window.mark_scored(5)
    assert window.cut() == [5]


@pytest.mark.parametrize(
    ("rollout_batch", "oversample", "cost"), [(10, 1.0, 10), (10, 1.1, 11), (100, 1.15, 115), (3, 1.5, 4)]
)
@pytest.mark.parametrize("bound", [0, 1, 2])
def test_a_batch_costs_what_the_oversampling_allows_whatever_runs_ahead_of_it(
    rollout_batch: int, oversample: float, cost: int, bound: int
) -> None:
    window = Window(derive_limits("off_policy", bound, None, rollout_batch), rollout_batch, max_oversample=oversample)
    num_admitted = 0
    for version in range(4):
        num_filtered = 0
        while window.cut() is None:
            while window.can_admit():
                window.admit(num_admitted)
                num_admitted += 1
            window.drop(num_admitted - window.num_waiting)
            num_filtered += 1
        assert num_filtered == cost
        assert num_admitted <= (version + 1) * cost + bound * rollout_batch
        assert window.publish() == []


@given(st.integers(1, 6), st.integers(0, 3), st.floats(1.0, 3.0), st.data())
def test_a_filter_makes_no_batch_short_while_younger_groups_may_take_the_places(
    rollout_batch: int, bound: int, oversample: float, data: st.DataObject
) -> None:
    window = Window(derive_limits("off_policy", bound, 1, rollout_batch), rollout_batch, max_oversample=oversample)
    while window.can_admit():
        window.admit(window.num_waiting)
    num_ahead = window.num_waiting - rollout_batch
    for group_id in (
        data.draw(st.sets(st.integers(rollout_batch, max(rollout_batch, window.num_waiting - 1)))) if num_ahead else ()
    ):
        window.drop(group_id)
    for group_id in range(rollout_batch):
        window.mark_scored(group_id)
    assert window.cut() == list(range(rollout_batch)), "what was filtered ahead counts for later batches"


def test_a_filter_that_leaves_nothing_moves_the_version_on_with_an_empty_batch() -> None:
    window = Window(derive_limits("on_policy", None, None, 2), 2, max_oversample=1.0)
    for group_id in range(2):
        window.admit(group_id)
        window.drop(group_id)
    assert not window.can_admit()
    assert window.cut() == []
    assert window.publish() == []
    assert window.version == 1
    assert window.can_admit()


def test_the_end_of_the_data_is_consumed_in_a_short_batch() -> None:
    window = Window(derive_limits("off_policy", 1, None, 4), 4)
    for group_id in range(2):
        window.admit(group_id)
    window.mark_scored(0)
    window.close()
    assert not window.can_admit()
    assert window.cut() is None
    window.mark_scored(1)
    assert window.cut() == [0, 1]


def test_an_end_of_the_data_of_which_the_filter_leaves_nothing_is_an_empty_batch() -> None:
    window = Window(derive_limits("off_policy", 1, None, 4), 4)
    window.admit(0)
    window.close()
    assert window.cut() is None
    window.drop(0)
    assert window.cut() == []


def test_admission_out_of_order_or_without_a_slot_is_refused() -> None:
    window = Window(derive_limits("on_policy", None, None, 2), 2)
    window.admit(5)
    with pytest.raises(ValueError, match="must rise"):
        window.admit(4)
    window.admit(6)
    with pytest.raises(ValueError, match="no slot free"):
        window.admit(7)


def test_restored_groups_beyond_their_bound_are_admitted_again_first_also_once_the_data_are_used_up() -> None:
    window = Window(derive_limits("on_policy", None, None, 2), 2)
    window.restore(5, {7: 0, 8: 1, 9: 1, 11: 1, 12: 1, 13: 4}, [])
    assert list(window.without_slot) == [12, 13], (
        "in the third batch 12 would be two versions old, and 13 may not overtake it"
    )
    window.close()
    assert not window.can_admit()
    for group_id in (7, 8, 9, 11):
        window.mark_scored(group_id)
    for batch in ([7, 8], [9, 11]):
        assert window.cut() == batch
        window.publish()
    assert window.num_admissible == 2
    with pytest.raises(ValueError, match="group 13: ids must rise"):
        window.admit(13)


def test_the_last_batch_is_not_short_while_restored_groups_are_without_a_slot() -> None:
    window = Window(derive_limits("on_policy", None, None, 2), 2)
    window.restore(0, {0: 0, 1: 0, 2: 0}, [])
    window.close()
    window.drop(0)
    window.mark_scored(1)
    assert not window.is_exhausted
    assert window.cut() is None
    window.admit(2)
    window.mark_scored(2)
    assert window.cut() == [1, 2]
    window.publish()
    assert window.is_exhausted
