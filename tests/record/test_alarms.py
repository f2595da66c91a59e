"""The table of alarms over lines of `metrics.jsonl`: what rings, when, and once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.config.sections.alarms import Alarms, EmptyBatches, LostShare, ZeroAccuracy
from vtriune.record.alarms import NUM_LOST, AlarmTable, Figures

TAUGHT = {"batch/groups": 6.0, "updates/done": 1.0, "group/zero_variance": 0.5, "reward/accuracy": 0.4}
EMPTY = {"batch/groups": 0.0, "updates/done": 0.0}
FLAT = {**TAUGHT, "group/zero_variance": 1.0}
SKIPPED = {**TAUGHT, "updates/done": 0.0}
NOTHING_RIGHT = {**TAUGHT, "reward/accuracy": 0.0}
EVALUATED_TO_NOTHING = {"eval/greedy/reward/accuracy": 0.0}


def rung(table: AlarmTable, *lines: Figures) -> list[list[str]]:
    """The names that begin to ring at each line."""
    return [[alarm.name for alarm in table.take(line)] for line in lines]


@pytest.mark.parametrize("bad", [EMPTY, FLAT, SKIPPED], ids=["empty", "all rewards equal", "no step made"])
def test_versions_that_taught_nothing_ring_once_and_again_after_one_that_did(bad: Figures) -> None:
    table = AlarmTable(Alarms(empty_batches=EmptyBatches(versions=2)))
    lines = [bad, bad, bad, TAUGHT, bad, bad]
    assert rung(table, *lines) == [[], ["empty_batches"], [], [], [], ["empty_batches"]]


def test_accuracy_is_counted_apart_in_training_and_evaluation_and_what_was_not_measured_changes_nothing() -> None:
    table = AlarmTable(Alarms(zero_accuracy=ZeroAccuracy(versions=2)))
    lines = [EVALUATED_TO_NOTHING, NOTHING_RIGHT, EMPTY, NOTHING_RIGHT, TAUGHT, EVALUATED_TO_NOTHING]
    assert rung(table, *lines) == [[], [], [], ["zero_accuracy"], [], ["zero_accuracy"]]


def test_an_evaluation_is_wrong_only_when_no_kind_of_sampling_has_an_answer() -> None:
    table = AlarmTable(Alarms(zero_accuracy=ZeroAccuracy(versions=1)))
    half = {"eval/sampled/reward/accuracy": 0.1, "eval/greedy/reward/accuracy": 0.0}
    assert rung(table, half, {**half, "eval/sampled/reward/accuracy": 0.0}) == [[], ["zero_accuracy"]]


def test_more_lost_groups_than_the_share_of_the_window_ring() -> None:
    table = AlarmTable(Alarms(lost_share=LostShare(share=0.05, window=100)))
    counts = [5.0, 6.0, 7.0, 2.0, 6.0]
    assert rung(table, *({NUM_LOST: count} for count in counts)) == [[], ["lost_share"], [], [], ["lost_share"]]
    assert rung(AlarmTable(Alarms(lost_share=LostShare(share=0.0))), {NUM_LOST: 1.0}) == [["lost_share"]]


LINES = st.lists(
    st.sampled_from([TAUGHT, EMPTY, FLAT, NOTHING_RIGHT, EVALUATED_TO_NOTHING, {NUM_LOST: 50.0}, {NUM_LOST: 0.0}])
)


@given(LINES, LINES)
def test_a_resumed_runs_alarms_ring_where_the_uninterrupted_ones_do(
    before: list[Figures], after: list[Figures]
) -> None:
    section = Alarms(lost_share=LostShare(action="log"))
    through, resumed = AlarmTable(section), AlarmTable(section)
    rung(through, *before)
    resumed.recall(before)
    assert rung(through, *after) == rung(resumed, *after)


def test_an_alarm_that_stopped_the_run_stops_it_again_when_it_holds_after_the_resume() -> None:
    table = AlarmTable(Alarms(empty_batches=EmptyBatches(versions=2, action="stop")))
    table.recall([EMPTY, EMPTY])
    assert rung(table, EMPTY, EMPTY) == [["empty_batches"], []]
    fixed = AlarmTable(Alarms(empty_batches=EmptyBatches(versions=2, action="stop")))
    fixed.recall([EMPTY, EMPTY])
    assert rung(fixed, TAUGHT, EMPTY) == [[], []]
