"""What the configuration asks for at a given progress."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune.config.tree import Config, Phase, Policy, Run
from vtriune.run.schedule import ModeInForce, Progress, WorkDone, mode_in_force, num_versions, planned_length
from vtriune.run.window import derive_limits


def test_the_schedule_gives_each_stretch_its_mode() -> None:
    policy = Policy(schedule=[Phase(until=0.7, mode="off_policy", max_staleness=4), Phase(mode="on_policy")])
    assert mode_in_force(policy, 0.0) == ModeInForce("off_policy", 4)
    assert mode_in_force(policy, 0.69) == ModeInForce("off_policy", 4)
    assert mode_in_force(policy, 0.7) == ModeInForce("on_policy", 0)
    assert mode_in_force(policy, 1.0) == ModeInForce("on_policy", 0)


def test_off_policy_without_a_bound_means_two_versions_in_the_file_in_a_phase_and_in_the_window() -> None:
    assert mode_in_force(Policy(mode="off_policy"), 0.5) == ModeInForce("off_policy", 2)
    assert mode_in_force(Policy(schedule=[Phase(mode="off_policy")]), 0.5) == ModeInForce("off_policy", 2)
    assert derive_limits("off_policy", None, None, 4).max_staleness == 2
    assert mode_in_force(Policy(mode="on_policy"), 0.5) == ModeInForce("on_policy", 0)


@given(st.integers(0, 8), st.none() | st.integers(1, 500), st.integers(1, 64))
def test_limits_keep_within_the_mode_whatever_look_ahead_is_set(bound: int, look_ahead: int | None, batch: int) -> None:
    limits = ModeInForce("off_policy", bound).limits(Policy(look_ahead=look_ahead, rollout_batch=batch))
    assert -(-(limits.look_ahead - 1) // batch) <= bound


@pytest.mark.parametrize(("rows", "epochs", "expected"), [(20, 1, 4), (18, 1, 3), (20, 3, 10)])
def test_epochs_are_counted_in_rollout_batches(rows: int, epochs: int, expected: int) -> None:
    config = Config(run=Run(epochs=epochs), policy=Policy(rollout_batch=6))
    assert num_versions(config, rows) == expected


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (Run(steps=1), "versions: 1, of 1024 groups × 8 completions, which show each of 256 rows 4 ×"),
        (Run(epochs=1), "versions: 1, of at most 1024 groups × 8 completions, which show each of 256 rows 1 ×"),
        (Run(epochs=5), "versions: 2, of at most 1024 groups × 8 completions, which show each of 256 rows 5 ×"),
        (Run(steps=10), "versions: 10, of 1024 groups × 8 completions, which show each of 256 rows 40 ×"),
    ],
)
def test_a_run_says_how_often_it_shows_each_row(length: Run, words: str) -> None:
    assert planned_length(Config(run=length, policy=Policy(rollout_batch=1024)), 256) == words


@given(st.integers(1, 500), st.integers(1, 4), st.integers(1, 64), st.integers(1, 64), st.data())
def test_after_a_resume_with_another_batch_the_length_is_what_was_done_and_what_is_left(
    rows: int, epochs: int, before: int, after: int, data: st.DataObject
) -> None:
    versions = data.draw(st.integers(0, rows * epochs // before))
    done = WorkDone(versions, versions * before)
    config = Config(run=Run(epochs=epochs), policy=Policy(rollout_batch=after))
    num_left = num_versions(config, rows, done) - versions
    assert (num_left - 1) * after < rows * epochs - done.samples <= num_left * after


PLANS = st.builds(Progress, st.sampled_from(["versions", "samples"]), st.integers(1, 10_000))


@st.composite
def legs(draw: st.DrawFn) -> list[tuple[Progress, WorkDone]]:
    """What a run planned at each of its starts, and the work that was done when that start ended: resumed with other lengths."""
    found, done = [], WorkDone(0, 0)
    for plan in draw(st.lists(PLANS, min_size=1, max_size=5)):
        done = WorkDone(done.versions + draw(st.integers(0, 500)), done.samples + draw(st.integers(0, 5000)))
        found.append((plan, done))
    return found


@given(legs(), st.integers(1, 8), st.integers(0, 64))
def test_progress_never_falls_and_ends_at_exactly_one_however_often_the_length_is_changed(
    run: list[tuple[Progress, WorkDone]], updates: int, batch: int
) -> None:
    line, done, seen = run[0][0], WorkDone(0, 0), [0.0]
    for plan, until in run:
        line = plan.resumed(line, done)
        seen += [line.at(done), line.at(until)]
        done = until
        batches = line.through(batch, updates, done)
        assert batches == sorted(batches)
        assert (batches[0], batches[-1]) == (line.at(done), line.at(WorkDone(done.versions + 1, done.samples + batch)))
    assert seen == sorted(seen)
    assert line.at(WorkDone(line.total, line.total)) == 1.0


@given(PLANS, st.integers(0, 10_000))
def test_a_resume_of_the_same_length_goes_on_as_if_uninterrupted(plan: Progress, done: int) -> None:
    assert plan.resumed(plan, WorkDone(done, done)) == plan


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 16))
def test_update_i_of_n_ends_at_its_share_of_the_version(versions: int, version: int, updates: int) -> None:
    done = WorkDone(version % versions, 0)
    progress = Progress("versions", versions).through(8, updates, done)
    assert progress[0] == done.versions / versions
    assert progress[1:] == [(done.versions + (i + 1) / updates) / versions for i in range(updates)]


def test_a_run_made_longer_goes_on_linearly_from_where_it_stood() -> None:
    line = Progress("versions", 20).resumed(Progress("versions", 10), WorkDone(5, 0))
    assert [line.at(WorkDone(version, 0)) for version in (5, 8, 11, 20)] == pytest.approx([0.5, 0.6, 0.7, 1.0])
    over_samples = Progress("samples", 300).resumed(Progress("versions", 10), WorkDone(5, 100))
    assert [over_samples.at(WorkDone(0, samples)) for samples in (100, 200, 300)] == [0.5, 0.75, 1.0]
