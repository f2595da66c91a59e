"""What is ordered for a batch follows from the batch, the mode in force and progress."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.config.tree import Config, Loss, Policy
from vtriune.messages import SampleRef, TrainOrder
from vtriune.run import orders
from vtriune.run.groups import Groups
from vtriune.run.orders import correction, update_batches
from vtriune.run.schedule import ModeInForce, Progress, WorkDone
from vtriune.run.window import WindowLimits

FOUR_UPDATES = Config(policy=Policy(mode="off_policy", rollout_batch=8, update_batch=2))


@given(st.lists(st.integers(), unique=True), st.integers(1, 9))
def test_update_batches_hold_every_group_once_in_order(ids: list[int], size: int) -> None:
    batches = update_batches(ids, size)
    assert [group_id for batch in batches for group_id in batch] == ids
    assert all(len(batch) == size for batch in batches[:-1])


@pytest.mark.parametrize(
    ("max_staleness", "num_updates", "expected"),
    [(0, 1, "none"), (0, 0, "none"), (2, 1, "decoupled"), (0, 2, "decoupled")],
)
def test_groups_that_cannot_be_stale_in_one_update_need_no_correction_unless_one_is_named(
    max_staleness: int, num_updates: int, expected: str
) -> None:
    assert correction(Config(), max_staleness, num_updates) == expected
    assert correction(Config(loss=Loss(correction="tis")), max_staleness, num_updates) == "tis"


@given(st.lists(st.integers(0, 4), max_size=8), st.sampled_from(["on_policy", "off_policy"]))
def test_an_order_is_what_its_batch_is_and_survives_the_archive(bounds: list[int], mode: str) -> None:
    groups, batch = Groups(WindowLimits(1, 4), 8), []
    for bound in bounds:
        groups.switch(WindowLimits(1, bound))
        batch.append(groups.admit(SampleRef("rows", 0), "rows").group_id)
    for group_id in batch:
        groups.report(group_id, groups.lease(group_id, 1.0), is_filtered=False)
    in_force = ModeInForce(mode, 0 if mode == "on_policy" else 4)  # type: ignore[arg-type]
    order = orders.make(FOUR_UPDATES, in_force, Progress("versions", 20), WorkDone(5, 0), groups, batch)
    assert order.group_ids == list(order.attempts) == batch
    assert {len(update) for update in order.updates[:-1]} <= {8 if mode == "on_policy" else 2}
    assert len(order.progress) == len(order.updates) + 1
    assert (order.version, order.mode, order.bound) == (5, *in_force)
    assert order.max_staleness == max(bounds, default=0)
    assert order.correction == correction(FOUR_UPDATES, order.max_staleness, len(order.updates))
    assert msgspec.json.decode(msgspec.json.encode(order), type=TrainOrder) == order
