"""Deliveries at the learner: whatever comes twice, late, or in another order at another rank."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from learner.batch.examples import DeliveryError, Example, example
from learner.batch.inbox import GroupInbox
from tests.learner.worlds import scored_group

Delivery = tuple[int, int]


def delivered(group_id: int, attempt: int) -> Example:
    """Attempt `attempt` of a group; its tokens are no other attempt's."""
    responses = [np.full(2, 10 + attempt), np.full(3, 20 + attempt)]
    scored = scored_group(group_id, np.arange(4), responses, [1.0, 0.0])
    group = replace(scored.group, lease=replace(scored.group.lease, attempt=attempt))
    return example(replace(scored, group=group), scale_by_std=True, blocked_ids=[])


def tokens(items: list[Example]) -> list[tuple[int, int]]:
    return [(item.group_id, int(item.scored.group.trajectories[0].token_ids[0])) for item in items]


@given(st.permutations([(group, attempt) for group in range(3) for attempt in range(3)]), st.data())
def test_every_rank_trains_on_the_attempt_that_the_order_names(arrivals: list[Delivery], data: st.DataObject) -> None:
    other_order = data.draw(st.permutations(arrivals))
    attempts = {group: data.draw(st.integers(0, 2)) for group in range(3)}
    ranks = []
    for deliveries in (arrivals, other_order):
        inbox = GroupInbox()
        assert all(inbox.add(delivered(*delivery)) for delivery in deliveries)
        ranks.append(tokens(inbox.take([2, 0, 1], attempts)))
        assert inbox.num_duplicates == 6, "two of three attempts of each group were not the one"
        assert not inbox.add(delivered(1, 1)), "it is late"
    assert ranks[0] == ranks[1] == [(group, 10 + attempts[group]) for group in (2, 0, 1)]


def test_a_group_of_which_only_another_attempt_came_is_missing() -> None:
    inbox = GroupInbox()
    inbox.add(delivered(4, 0))
    assert inbox.missing([4], {}) == []
    assert inbox.missing([4], {4: 1}) == [4]
    with pytest.raises(DeliveryError, match=r"\[4\].*never delivered"):
        inbox.take([4], {4: 1})


def test_what_was_never_ordered_is_forgotten_once_it_has_ended() -> None:
    inbox = GroupInbox()
    for group_id in range(100):
        inbox.add(delivered(group_id, 0))
        if group_id % 2:
            # Even groups were filtered, or lost.
            inbox.take([group_id], {})
        inbox.forget_below(group_id - 3)
    assert inbox.state() == {"consumed": [97, 99], "open_from": 96}
    assert inbox.missing(range(100), {}) == [*range(96), 97, 99]
    assert not inbox.add(delivered(8, 1)), "it ended long ago"
    resumed = GroupInbox()
    resumed.restore(inbox.state())
    assert resumed.add(delivered(96, 0)), "what was open at the checkpoint is delivered again"
    assert not resumed.add(delivered(97, 0))
