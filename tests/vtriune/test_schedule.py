"""What the configuration asks for at a given progress."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.config.tree import Config, Loss, Phase, Policy, Run
from vtriune.schedule import Stance, correction, num_versions, stance, update_batches


def test_the_schedule_gives_each_stretch_its_mode() -> None:
    policy = Policy(schedule=[Phase(until=0.7, mode="off_policy", max_staleness=4), Phase(mode="on_policy")])
    assert stance(policy, 0.0) == Stance("off_policy", 4)
    assert stance(policy, 0.69) == Stance("off_policy", 4)
    assert stance(policy, 0.7) == Stance("on_policy", 0)
    assert stance(policy, 1.0) == Stance("on_policy", 0)


def test_without_a_schedule_off_policy_defaults_to_two_versions() -> None:
    assert stance(Policy(mode="off_policy"), 0.5) == Stance("off_policy", 2)
    assert stance(Policy(mode="on_policy"), 0.5) == Stance("on_policy", 0)


@given(st.integers(0, 8), st.none() | st.integers(1, 500), st.integers(1, 64))
def test_limits_keep_within_the_stance_whatever_look_ahead_is_set(
    bound: int, look_ahead: int | None, batch: int
) -> None:
    limits = Stance("off_policy", bound).limits(Policy(look_ahead=look_ahead, rollout_batch=batch))
    assert limits.target_staleness + -(-(limits.look_ahead - 1) // batch) <= bound


@pytest.mark.parametrize(("rows", "epochs", "expected"), [(20, 1, 4), (18, 1, 3), (20, 3, 10)])
def test_epochs_are_counted_in_rollout_batches(rows: int, epochs: int, expected: int) -> None:
    config = Config(run=Run(epochs=epochs), policy=Policy(rollout_batch=6))
    assert num_versions(config, rows) == expected


@given(st.lists(st.integers(), unique=True), st.integers(1, 9))
def test_update_batches_hold_every_group_once_in_order(ids: list[int], size: int) -> None:
    batches = update_batches(ids, size)
    assert [group_id for batch in batches for group_id in batch] == ids
    assert all(len(batch) == size for batch in batches[:-1])


def test_the_correction_follows_the_mode_unless_named() -> None:
    assert correction(Config(), Stance("on_policy", 0)) == "none"
    assert correction(Config(), Stance("off_policy", 2)) == "decoupled"
    assert correction(Config(), Stance("off_policy", 0)) == "none"
    assert correction(Config(policy=Policy(rollout_batch=8, update_batch=4)), Stance("off_policy", 0)) == "decoupled"
    assert correction(Config(loss=Loss(correction="tis")), Stance("off_policy", 2)) == "tis"
