"""The event model: it keeps the window's promises, reaches what theory says it can, and agrees with the real control plane."""

from pathlib import Path

import msgspec
import pytest

from bench.device_time.run import measure
from vtriune.plan.fleet import Hardware, candidates, is_sensible
from vtriune.plan.model import Simulation, simulate
from vtriune.plan.schedule import Schedule
from vtriune.plan.simulated_device import Costs, Lengths

SMALL = Schedule(num_engines=4, max_sequences=8, rollout_batch=8, group_size=4, training_s=6.0, num_versions=8)
EQUAL = Lengths(median=500.0, sigma=0.0)


@pytest.mark.parametrize("bound", [0, 1, 2, 4])
@pytest.mark.parametrize("training_s", [0.5, 6.0, 30.0])
def test_no_group_is_consumed_beyond_the_bound_and_every_batch_is_full(bound: int, training_s: float) -> None:
    model = Simulation(msgspec.structs.replace(SMALL, max_staleness=bound, training_s=training_s))
    outcome = model.run()
    assert outcome.max_staleness <= bound
    assert outcome.num_groups == SMALL.num_versions * SMALL.rollout_batch


def test_every_group_is_open_or_ended_once() -> None:
    model = Simulation(SMALL)
    model.run()
    counts = model.groups.counts()
    assert counts["consumed"] == SMALL.num_versions * SMALL.rollout_batch
    assert counts["filtered"] + counts["lost"] == 0
    assert counts["admitted"] + counts["leased"] + counts["scored"] == model.groups.slots()["active"]


def test_staleness_zero_and_on_policy_take_the_same_time() -> None:
    on_policy = simulate(msgspec.structs.replace(SMALL, mode="on_policy", max_staleness=0))
    assert simulate(msgspec.structs.replace(SMALL, max_staleness=0)) == on_policy


def test_equal_lengths_on_policy_take_generation_training_and_publish_in_turn() -> None:
    schedule = msgspec.structs.replace(
        SMALL, mode="on_policy", max_staleness=0, lengths=EQUAL, costs=Costs(prefill_s=0.0, verify_s=0.0)
    )
    outcome = simulate(schedule)
    generation_s = 500 * schedule.costs.step_s(8)
    assert outcome.generation_s == pytest.approx(generation_s)
    assert outcome.step_s == pytest.approx(generation_s + schedule.training_s + schedule.costs.publish_s)


def test_a_learner_slower_than_any_completion_is_never_kept_waiting_off_policy() -> None:
    schedule = msgspec.structs.replace(SMALL, training_s=60.0)
    assert simulate(schedule).of_optimum(schedule) == pytest.approx(1.0, abs=1e-3)


def test_no_schedule_beats_the_analytical_optimum() -> None:
    for bound in (1, 2, 4):
        for training_s in (1.0, 4.0, 16.0):
            schedule = msgspec.structs.replace(
                SMALL, max_staleness=bound, training_s=training_s, num_versions=60, num_unmeasured=10, room=64
            )
            assert simulate(schedule).of_optimum(schedule) < 1.06, "the drawn lengths may lie a little below their mean"


def test_more_staleness_is_never_slower_than_on_policy() -> None:
    on_policy = simulate(msgspec.structs.replace(SMALL, mode="on_policy", max_staleness=0))
    for bound in (1, 2, 4):
        assert simulate(msgspec.structs.replace(SMALL, max_staleness=bound)).step_s < on_policy.step_s


def test_a_plan_spends_every_gpu_and_its_first_row_is_the_synchronous_one() -> None:
    choices = candidates(16, 32, [1, 2], Hardware(max_sequences=32), num_versions=4)
    assert choices[0].max_staleness == 0
    assert choices[0].num_generating == 16
    assert {choice.max_staleness for choice in choices} == {0, 1, 2}
    assert all(0 < choice.num_generating < 16 for choice in choices[1:])
    assert is_sensible(8, 256)
    assert not is_sensible(4096, 256)


async def test_the_model_agrees_with_the_real_control_plane_over_simulated_device_time(tmp_path: Path) -> None:
    schedule = Schedule(num_engines=4, max_sequences=16, rollout_batch=8, training_s=14.0, num_versions=5)
    measured = await measure(schedule, tmp_path, clock_scale=0.05, num_processes=1)
    assert measured.outcome.step_s == pytest.approx(simulate(schedule).step_s, rel=0.15)
    assert measured.outcome.max_staleness <= schedule.max_staleness
    assert measured.outcome.num_groups == schedule.num_versions * schedule.rollout_batch
    assert measured.num_duplicates == 0
    assert measured.ledger["consumed"] == measured.outcome.num_groups
    assert measured.ledger["lost"] == 0
