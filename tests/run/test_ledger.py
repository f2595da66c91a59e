"""The ledger's promise: every admitted group ends exactly once, whatever generators do."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vtriune.messages import SampleRef
from vtriune.run.ledger import MAX_REASONS, Ledger, LedgerError, Solved

REF = SampleRef("f", 0)


class Story(RuleBasedStateMachine):
    """Leases, losses, late and double reports, ends and restarts in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(max_failures=2, max_deaths=3)
        self.states: dict[int, str] = {}
        self.attempts: dict[int, int] = {}
        self.losses: Counter[tuple[int, bool]] = Counter()
        """Leases lost, by group and by whether the generator died."""

    def those(self, *states: str) -> list[int]:
        return [g for g, state in self.states.items() if state in states]

    @rule()
    def admit(self) -> None:
        group = self.ledger.admit(REF, "s", 1)
        self.states[group.group_id], self.attempts[group.group_id] = "admitted", 0

    @precondition(lambda self: self.those("admitted"))
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        group_id = data.draw(st.sampled_from(self.those("admitted")))
        assert self.ledger.lease(group_id, deadline=1.0) == self.attempts[group_id]
        self.states[group_id] = "leased"

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        group_id = data.draw(st.sampled_from(sorted(self.states)))
        first = self.states[group_id] in ("admitted", "leased")
        attempt = data.draw(st.integers(0, self.attempts[group_id]))
        assert self.ledger.report(group_id, attempt) is first
        if first:
            self.states[group_id], self.attempts[group_id] = "scored", attempt
            assert self.ledger.attempts([group_id]) == {group_id: attempt}, "the first report counts, whichever it is"

    @precondition(lambda self: self.those("leased"))
    @rule(data=st.data(), stale=st.booleans(), is_death=st.booleans())
    def lose(self, data: st.DataObject, stale: bool, is_death: bool) -> None:
        group_id = data.draw(st.sampled_from(self.those("leased")))
        attempt = self.attempts[group_id]
        is_lost = self.ledger.lose_lease(group_id, attempt - stale, "killed", is_death=is_death)
        if stale:
            assert not is_lost
            return
        self.losses[group_id, is_death] += 1
        if self.losses[group_id, False] < 2 and self.losses[group_id, True] < 3:
            assert not is_lost
            self.states[group_id], self.attempts[group_id] = "admitted", attempt + 1
        else:
            assert is_lost
            self.states[group_id] = "lost"

    @precondition(lambda self: self.those("scored"))
    @rule(data=st.data(), end=st.sampled_from(["consumed", "filtered"]))
    def finish(self, data: st.DataObject, end: str) -> None:
        group_id = data.draw(st.sampled_from(self.those("scored")))
        if end == "consumed":
            self.ledger.consume([group_id])
        else:
            self.ledger.filter(group_id)
        self.states[group_id] = end
        with pytest.raises(LedgerError):
            self.ledger.consume([group_id])

    @rule()
    def restart_from_checkpoint(self) -> None:
        fresh = Ledger(max_failures=2, max_deaths=3)
        fresh.restore(self.ledger.state())
        self.ledger = fresh
        for group_id in self.those("leased", "scored"):
            self.states[group_id] = "admitted"

    @invariant()
    def every_group_is_open_or_ended_once(self) -> None:
        self.ledger.audit()
        counts = self.ledger.counts()
        for state, num in counts.items():
            assert num == len(self.those(state)), state
        waiting = self.ledger.first_to_lease()
        assert (waiting and waiting.group_id) == min(self.those("admitted"), default=None)
        assert list(self.ledger.bounds()) == sorted(self.those("admitted", "leased", "scored"))
        assert {g.group_id for g in self.ledger.overdue(2.0)} == set(self.those("leased"))


Story.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestEveryGroupEndsOnce = Story.TestCase


def test_a_report_of_a_group_never_admitted_is_a_fault_of_ours() -> None:
    with pytest.raises(LedgerError, match="never admitted"):
        Ledger().report(3, 0)


def test_a_group_outlives_many_generators_but_few_failures_of_its_own() -> None:
    ledger = Ledger(max_failures=3, max_deaths=12)
    for is_death, num_losses in ((True, 12), (False, 3)):
        group = ledger.admit(REF, "s", 1)
        for number in range(1, num_losses + 1):
            attempt = ledger.lease(group.group_id, deadline=9.0)
            is_lost = ledger.lose_lease(group.group_id, attempt, "gone", is_death=is_death)
            assert is_lost == (number == num_losses)
    assert ledger.counts()["lost"] == 2


def test_losses_are_a_share_of_what_was_drawn_though_a_broken_group_fails_long_before_the_whole_ones_are_scored() -> (
    None
):
    ledger = Ledger(max_failures=1)
    for _ in range(1000):
        ledger.admit(REF, "s", 1)
    for group_id in range(0, 1000, 50):
        ledger.lease(group_id, 1.0)
        assert ledger.lose_lease(group_id, 0, "broken")
    assert ledger.num_lost_among(200) == 4
    again = Ledger()
    again.restore(ledger.state())
    assert again.num_lost_among(200) == 4
    assert again.num_lost_among(1000) == 20


def test_reasons_that_name_their_rows_do_not_grow_with_the_losses() -> None:
    ledger = Ledger(max_failures=1)
    for number in range(1000):
        ledger.lease(ledger.admit(REF, "s", 1).group_id, 1.0)
        ledger.lose_lease(number, 0, f"row {number} is broken")
    assert len(ledger.lost_reasons) == MAX_REASONS + 1
    assert sum(ledger.lost_reasons.values()) == 1000


def test_a_group_that_ended_says_how_it_was_answered_once_in_the_order_of_ids_and_over_a_resume() -> None:
    ledger = Ledger()
    for row in range(5):
        ledger.admit(SampleRef("f", row), "s", 1)
        ledger.lease(row, deadline=1.0)
    for group_id, rate in ((3, 0.25), (1, 1.0), (0, 0.5), (2, None), (4, 0.75)):
        ledger.report(group_id, 0, rate)
    ledger.filter(3)
    ledger.consume([1, 2])
    ledger.fault(4)
    resumed = Ledger()
    resumed.restore(ledger.state())
    for one in (ledger, resumed):
        assert one.take_solved() == [Solved(1, 1, 1.0), Solved(3, 3, 0.25)]
        assert one.take_solved() == []
    # What was scored and not yet trained on is generated anew, and answered anew.
    resumed.lease(0, deadline=1.0)
    resumed.report(0, 0, 0.125)
    resumed.consume([0])
    assert resumed.take_solved() == [Solved(0, 0, 0.125)]
