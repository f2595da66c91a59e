"""The recorder: every group archived once, every version one line, whatever arrives when and whoever is killed."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import actors.recorder
from actors.recorder import Recorder, Recording
from tests.metrics.groups import scored, verdict
from vtriune.config import Config
from vtriune.config.tree import Evaluation, Policy, Tracking
from vtriune.data import archive
from vtriune.data.journal import recover
from vtriune.messages import ScoredGroup, StepRecord
from vtriune.runtime import this_host


def group(group_id: int, reward: float = 1.0, *, source: str = "a", **changes: Any) -> ScoredGroup:
    return scored([verdict(reward), verdict(0.0)], group_id=group_id, source=source, **changes)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def ids(folder: Path, kind: archive.Kind) -> dict[int, list[int]]:
    """Group ids in each file of a kind."""
    return {
        number: [item.group.group.lease.group_id for item in archive.read(path)]
        for number, path in archive.files(folder / "rollouts", kind)
    }


def finish(recording: Recording, record: StepRecord) -> dict[str, float]:
    metrics, ticket = recording.step(record)
    recording.write_step(ticket)
    recording.forget_step(ticket)
    return metrics


def test_a_step_writes_its_line_and_its_groups_in_the_order_consumed(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(4):
        recording.add(group(number, number / 4, source="ab"[number % 2]))
    metrics = finish(recording, StepRecord(1, 2, [2, 0], {"loss": 0.5, "staleness/max": 7.0}))
    assert (metrics["version"], metrics["update"], metrics["loss"]) == (1, 2, 0.5)
    assert metrics["reward/mean"] == metrics["source/a/reward/mean"] == 0.125
    assert metrics["staleness/max"] == 7.0
    assert lines(tmp_path) == [metrics]
    assert ids(tmp_path, "version") == {1: [2, 0]}
    assert {item.consumed_version for item in archive.read(tmp_path / "rollouts/version-000001.parquet")} == {0}
    finish(recording, StepRecord(2, 3, [3, 1], {}))
    recording.close()
    assert ids(tmp_path, "version") == {1: [2, 0], 2: [3, 1]}
    assert [path.name for path in (tmp_path / "rollouts").iterdir() if path.suffix != ".parquet"] == []


def test_groups_that_no_step_consumed_are_archived_at_the_end(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(3):
        recording.add(group(number))
    finish(recording, StepRecord(1, 1, [1], {}))
    recording.close()
    recording.close()
    assert ids(tmp_path, "unconsumed") == {1: [0, 2]}
    assert {item.consumed_version for item in archive.read(tmp_path / "rollouts/unconsumed-000001.parquet")} == {None}


def test_a_group_that_arrives_twice_is_kept_once_and_counted(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.add(group(5, 1.0))
    recording.add(group(5, 0.0))
    metrics = finish(recording, StepRecord(1, 1, [5], {}))
    assert (metrics["archive/num_duplicates"], metrics["reward/mean"]) == (1.0, 0.5)


@pytest.mark.parametrize("trained", [0, 1])
def test_of_two_attempts_the_one_that_was_trained_on_is_archived_as_consumed(tmp_path: Path, trained: int) -> None:
    recording = Recording(tmp_path)
    for attempt in (1, 0):
        recording.add(group(5, float(attempt), attempt=attempt))
    assert not recording.is_complete(StepRecord(1, 1, [5], {}, {5: 2}))
    metrics = finish(recording, StepRecord(1, 1, [5], {}, {5: trained}))
    assert (metrics["reward/mean"], metrics["archive/num_missing"]) == (trained / 2, 0.0)
    recording.close()
    for kind, attempt in (("version", trained), ("unconsumed", 1 - trained)):
        (item,) = archive.read(tmp_path / f"rollouts/{kind}-000001.parquet")
        assert item.group.group.lease.attempt == attempt


def test_a_step_without_one_of_its_groups_says_so(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.add(group(1))
    record = StepRecord(1, 1, [1, 2], {})
    assert not recording.is_complete(record)
    assert finish(recording, record)["archive/num_missing"] == 1.0


def test_evaluations_are_measured_by_kind_and_kept_in_files_of_their_own(tmp_path: Path) -> None:
    recording = Recording(tmp_path, kinds=["sampled", "greedy"])
    for number, (reward, temperature) in enumerate([(1.0, 0.0), (0.5, 1.0), (0.0, 1.0)]):
        held_out = scored([verdict(reward)], group_id=-1 - number, purpose="evaluate", temperature=temperature)
        recording.add(held_out)
    assert not recording.is_complete(StepRecord(0, 0, [], {"eval/sampled/num_rows": 3.0, "eval/greedy/num_rows": 1.0}))
    record = StepRecord(0, 0, [], {"eval/sampled/num_rows": 2.0, "eval/greedy/num_rows": 1.0})
    assert recording.is_complete(record)
    metrics = finish(recording, record)
    assert metrics["eval/greedy/reward/mean"] == 1.0
    assert metrics["eval/reward/mean"] == metrics["eval/sampled/source/digits/reward/mean"] == 0.25
    assert "reward/mean" not in metrics
    assert ids(tmp_path, "evaluation") == {0: [-1, -2, -3]}
    assert ids(tmp_path, "version") == {}


def test_waiting_groups_are_bounded_and_the_oldest_are_archived(tmp_path: Path) -> None:
    recording = Recording(tmp_path, max_pending=8)
    for number in range(20):
        recording.add(group(number))
    finish(recording, StepRecord(1, 1, [19], {}))
    recording.close()
    left = [group_id for groups in ids(tmp_path, "unconsumed").values() for group_id in groups]
    assert left == list(range(19))


def test_an_evaluation_of_any_size_pushes_no_training_group_out(tmp_path: Path) -> None:
    recording = Recording(tmp_path, max_pending=8)
    recording.add(group(0))
    for number in range(1, 30):
        recording.add(group(-number, purpose="evaluate"))
    metrics = finish(recording, StepRecord(1, 1, [0], {}))
    assert metrics["archive/num_missing"] == 0.0
    assert metrics["batch/num_groups"] == 1.0


def test_a_killed_recorders_groups_are_found_again(tmp_path: Path) -> None:
    killed = Recording(tmp_path)
    for number in range(4):
        killed.add(group(number))
    finish(killed, StepRecord(1, 1, [0], {}))
    # Killed after the file of version 2 was closed and before the journal forgot its groups.
    _, ticket = killed.step(StepRecord(2, 2, [1], {}))
    killed.write_step(ticket)
    resumed = Recording(tmp_path)
    assert ids(tmp_path, "unconsumed") == {1: [2, 3]}
    assert ids(tmp_path, "version") == {1: [0], 2: [1]}
    assert recover(tmp_path / "rollouts" / "journal") == []
    resumed.close()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(5):
        recording.add(group(number))
    for version in (1, 2, 3):
        finish(recording, StepRecord(version, version, [version], {}))
    recording.truncate_after(1)
    assert [line["version"] for line in lines(tmp_path)] == [1]
    assert ids(tmp_path, "version") == {1: [1]}
    assert ids(tmp_path, "unconsumed") == {1: [0, 4]}
    recording.add(group(2))
    finish(recording, StepRecord(2, 2, [2], {}))
    assert ids(tmp_path, "version") == {1: [1], 2: [2]}


CONFIG = Config(
    policy=Policy(rollout_batch=4),
    evaluation=Evaluation(sampling=["greedy"]),
    tracking=Tracking(wandb="off"),
)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Any]:
    """The actor in a process of its own, called over its socket."""
    procs = this_host().spawn_procs({"procs": 1}, name="recorder")
    try:
        yield procs.spawn("recorder", Recorder, CONFIG, str(tmp_path))
    finally:
        procs.stop().get()


def test_the_actor_records_over_its_socket(recorder: Any, tmp_path: Path) -> None:
    recorder.ready.call().get()
    for number in range(3):
        recorder.record_group.call(group(number)).get()
    metrics = recorder.record_step.call_one(StepRecord(1, 1, [0, 1], {"loss": 0.25})).get()
    assert (metrics["loss"], metrics["reward/mean"], metrics["version"]) == (0.25, 0.5, 1)
    recorder.close.call().get()
    assert lines(tmp_path) == [metrics]
    assert ids(tmp_path, "version") == {1: [0, 1]}
    assert ids(tmp_path, "unconsumed") == {1: [2]}


def _in_process(folder: Path) -> Recorder:
    return Recorder(CONFIG, str(folder))


async def test_a_step_waits_for_a_group_that_is_on_its_way(tmp_path: Path) -> None:
    recorder = _in_process(tmp_path)
    step = asyncio.create_task(recorder.record_step(StepRecord(1, 1, [1], {})))
    await asyncio.sleep(0.05)
    assert not step.done()
    await recorder.record_group(group(1))
    assert (await step)["archive/num_missing"] == 0
    await recorder.close()
    assert ids(tmp_path, "version") == {1: [1]}


async def test_a_step_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(actors.recorder, "ARRIVAL_S", 0.05)
    recorder = _in_process(tmp_path)
    assert (await recorder.record_step(StepRecord(1, 1, [1], {})))["archive/num_missing"] == 1
    assert "version 1: not all of its groups arrived" in caplog.text
    await recorder.close()


async def test_an_archive_that_cannot_be_written_fails_the_next_step(tmp_path: Path) -> None:
    recorder = _in_process(tmp_path)
    await recorder.record_group(group(1))
    (tmp_path / "rollouts" / "version-000001.parquet").mkdir()
    await recorder.record_step(StepRecord(1, 1, [1], {}))
    with pytest.raises(OSError, match=r"version-000001\.parquet"):
        await recorder.record_step(StepRecord(2, 2, [], {}))
