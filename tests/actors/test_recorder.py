"""The recorder: every group archived once, every version one line, whatever arrives when and whoever is killed."""

import asyncio
import contextlib
import json
import resource
import threading
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import actors.recorder
from actors.recorder import Recorder
from tests.data.rows import MODEL
from tests.record.groups import scored, trajectory, verdict
from tests.run.recorded_stage import RecordedStage
from vtriune.config import Config, override
from vtriune.config.tree import Evaluation, Model, Phase, Policy, Record, Tracking
from vtriune.data.processing import Preprocessor
from vtriune.messages import ScoredGroup, StepRecord, TrainOrder
from vtriune.record import archive
from vtriune.record.journal import recover
from vtriune.record.recording import Recording
from vtriune.run.schedule import ModeInForce
from vtriune.runtime import kind_of, this_host


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


def a_step(
    version: int,
    update: int,
    group_ids: list[int],
    metrics: dict[str, float],
    attempts: dict[int, int] | None = None,
    open_from: int = 0,
    evaluated: Iterable[int] = (),
) -> StepRecord:
    """Of a version that was trained in one update on `group_ids`, of version 0 that was not; and of rows that were evaluated."""
    order = TrainOrder(version - 1, [group_ids], "on_policy", 0, 0, "none", [0.0, 0.1], attempts or {}, open_from)
    return StepRecord(version, update, metrics, order if version else None, dict.fromkeys(evaluated, 0))


def finish(recording: Recording, record: StepRecord) -> dict[str, float]:
    metrics, ticket = recording.step(record)
    recording.write_step(ticket)
    recording.forget_step(ticket)
    return metrics


def test_a_step_writes_its_line_and_its_groups_in_the_order_consumed(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(4):
        recording.add(group(number, number / 4, source="ab"[number % 2]))
    metrics = finish(recording, a_step(1, 2, [2, 0], {"loss": 0.5, "staleness/max": 7.0}))
    assert (metrics["version"], metrics["update"], metrics["loss"]) == (1, 2, 0.5)
    assert metrics["reward/mean"] == metrics["source/a/reward/mean"] == 0.125
    assert metrics["staleness/max"] == 7.0
    assert lines(tmp_path) == [metrics]
    assert ids(tmp_path, "version") == {1: [2, 0]}
    assert {item.consumed_version for item in archive.read(tmp_path / "rollouts/version-000001.parquet")} == {0}
    finish(recording, a_step(2, 3, [3, 1], {}))
    recording.close()
    assert ids(tmp_path, "version") == {1: [2, 0], 2: [3, 1]}
    assert [path.name for path in (tmp_path / "rollouts").iterdir() if path.suffix != ".parquet"] == []


def test_a_versions_archive_says_what_was_ordered_also_when_the_filter_left_nothing(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.add(group(7))
    steps = [a_step(1, 1, [7], {}, {7: 0}), a_step(2, 1, [], {})]
    for step in steps:
        finish(recording, step)
    notes = [archive.notes_of(path) for _, path in archive.files(tmp_path / "rollouts", "version")]
    assert [msgspec.json.decode(note[archive.ORDER], type=TrainOrder) for note in notes] == [s.order for s in steps]
    assert ids(tmp_path, "version") == {1: [7], 2: []}


def test_groups_that_no_step_consumed_are_archived_at_the_end(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(3):
        recording.add(group(number))
    finish(recording, a_step(1, 1, [1], {}))
    recording.close()
    recording.close()
    assert ids(tmp_path, "unconsumed") == {1: [0, 2]}
    assert {item.consumed_version for item in archive.read(tmp_path / "rollouts/unconsumed-000001.parquet")} == {None}


def test_an_archive_beyond_its_bound_loses_its_oldest_files_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    recording = Recording(tmp_path, kept=Record(max_gib=1e-6))
    counted = []
    for version in (1, 2, 3):
        recording.add(group(version))
        counted.append(finish(recording, a_step(version, version, [version], {}))["archive/num_removed"])
    assert counted == [0.0, 0.0, 1.0], "a line is written before its own version is archived"
    assert ids(tmp_path, "version") == {3: [3]}
    assert "version-000002.parquet is removed: the archive would take more than record.max_gib" in caplog.text


def test_without_log_probs_the_archive_holds_none_and_the_line_is_the_same(tmp_path: Path) -> None:
    written = []
    for keeps in (True, False):
        recording = Recording(tmp_path / str(keeps), kept=Record(logprobs=keeps))
        recording.add(group(1))
        written.append(finish(recording, a_step(1, 1, [1], {})))
        assert archive.has_logprobs(tmp_path / str(keeps) / "rollouts/version-000001.parquet") == keeps
    assert written[0] == written[1]


def test_a_group_that_arrives_twice_is_kept_once_and_counted(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.add(group(5, 1.0))
    recording.add(group(5, 0.0))
    metrics = finish(recording, a_step(1, 1, [5], {}))
    assert (metrics["archive/num_duplicates"], metrics["reward/mean"]) == (1.0, 0.5)


@pytest.mark.parametrize("trained", [0, 1])
def test_of_two_attempts_the_one_that_was_trained_on_is_archived_as_consumed(tmp_path: Path, trained: int) -> None:
    recording = Recording(tmp_path)
    for attempt in (1, 0):
        recording.add(group(5, float(attempt), attempt=attempt))
    assert not recording.is_complete(a_step(1, 1, [5], {}, {5: 2}))
    metrics = finish(recording, a_step(1, 1, [5], {}, {5: trained}))
    assert (metrics["reward/mean"], metrics["archive/num_missing"]) == (trained / 2, 0.0)
    recording.close()
    for kind, attempt in (("version", trained), ("unconsumed", 1 - trained)):
        (item,) = archive.read(tmp_path / f"rollouts/{kind}-000001.parquet")
        assert item.group.group.lease.attempt == attempt


def test_a_step_without_one_of_its_groups_says_so(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    recording.add(group(1))
    record = a_step(1, 1, [1, 2], {})
    assert not recording.is_complete(record)
    assert finish(recording, record)["archive/num_missing"] == 1.0


def test_evaluations_are_measured_by_kind_and_kept_in_files_of_their_own(tmp_path: Path) -> None:
    recording = Recording(tmp_path, kinds=["sampled", "greedy"])
    for number, (reward, temperature) in enumerate([(1.0, 0.0), (0.5, 1.0), (0.0, 1.0)]):
        held_out = scored([verdict(reward)], group_id=-1 - number, purpose="evaluate", temperature=temperature)
        recording.add(held_out)
    assert not recording.is_complete(a_step(0, 0, [], {}, evaluated=[-1, -2, -3, -4]))
    record = a_step(0, 0, [], {}, evaluated=[-1, -2, -3])
    assert recording.is_complete(record)
    metrics = finish(recording, record)
    assert metrics["eval/greedy/reward/mean"] == 1.0
    assert metrics["eval/reward/mean"] == metrics["eval/sampled/source/digits/reward/mean"] == 0.25
    assert "reward/mean" not in metrics
    assert ids(tmp_path, "evaluation") == {0: [-1, -2, -3]}
    assert ids(tmp_path, "version") == {}


@given(order=st.permutations(range(6)))
@settings(max_examples=15)
def test_the_figures_and_the_file_of_an_evaluation_do_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    rewards = [0.1, 0.2, 0.3, 1e-9, 0.7, 0.31]
    lines = []
    with TemporaryDirectory() as folder:
        for name, numbers in (("leased", range(6)), ("arrived", order)):
            recording = Recording(Path(folder) / name)
            for number in numbers:
                row = scored(
                    [verdict(rewards[number])],
                    group_id=-1 - number,
                    purpose="evaluate",
                    temperature=0.0,
                    source="ab"[number % 2],
                )
                recording.add(row)
            lines.append(
                finish(recording, a_step(0, 0, [], {"eval/greedy/num_rows": 6.0}, evaluated=range(-1, -7, -1)))
            )
            assert ids(Path(folder) / name, "evaluation") == {0: [-1, -2, -3, -4, -5, -6]}
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("threshold", "share"), [(0.5, 1.0), (0.9, 0.5)])
async def test_the_threshold_of_correct_is_the_files(tmp_path: Path, threshold: float, share: float) -> None:
    recorder = Recorder(override(CONFIG, [f"rewards.correct_threshold={threshold}"]), str(tmp_path))
    overlaps = [verdict(0.5, **{"label_first_iou@50": overlap}) for overlap in (0.7, 0.95)]
    await recorder.record_group(scored(overlaps, group_id=1))
    await recorder.record_group(scored(overlaps, group_id=-1, purpose="evaluate", temperature=0.0))
    metrics = await recorder.record_step(a_step(1, 1, [1], {}, evaluated=[-1]))
    assert (metrics["correct/rate"], metrics["eval/correct/rate"]) == (share, share)
    await recorder.close()


def test_a_step_has_an_example_of_what_was_trained_on_else_of_what_was_left_out_and_one_of_its_evaluation(
    tmp_path: Path,
) -> None:
    recording = Recording(tmp_path)
    long = trajectory(3, text="b" * 100 + "e" * 100)
    recording.add(scored([verdict(1.0), verdict(1.0)], [long, long], group_id=0))
    recording.add(group(1))
    recording.add(group(-1, purpose="evaluate", temperature=0.0))
    finish(recording, a_step(1, 1, [1], {}, open_from=2, evaluated=[-1]))
    samples = {purpose: example.header.sample_id for purpose, example in recording.examples.items()}
    assert samples == {"train": "sample-1", "evaluate": "sample--1"}
    recording.add(scored([verdict(1.0), verdict(1.0)], [long, long], group_id=2))
    finish(recording, a_step(2, 2, [], {}, open_from=3))
    assert recording.examples.keys() == {"train"}
    assert recording.examples["train"].response == f"{'b' * 80} … {'e' * 80}"
    finish(recording, a_step(3, 3, [], {}, open_from=3))
    assert recording.examples == {}
    recording.close()


def test_what_no_later_step_will_name_is_archived_and_younger_groups_wait(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(20):
        recording.add(group(number))
        recording.add(group(-1 - number, purpose="evaluate"))
    finish(recording, a_step(1, 1, [3, 19], {}, open_from=8, evaluated=range(-20, 0)))
    assert ids(tmp_path, "unconsumed") == {1: [0, 1, 2, 4, 5, 6, 7]}
    assert recording.is_complete(a_step(2, 2, list(range(8, 19)), {}))
    recording.add(group(4, attempt=1))
    assert finish(recording, a_step(2, 2, list(range(8, 19)), {}, open_from=20))["archive/num_missing"] == 0.0
    assert ids(tmp_path, "unconsumed")[2] == [4], "a delivery that came late ends with the step after it"
    recording.close()


def test_a_held_out_row_counts_once_and_in_its_own_evaluation_however_late_another_attempt_at_it_comes(
    tmp_path: Path,
) -> None:
    recording = Recording(tmp_path)
    for group_id, attempt, reward in ((-1, 0, 1.0), (-2, 1, 0.5), (-2, 0, 0.0)):
        held_out = scored([verdict(reward)], group_id=group_id, attempt=attempt, purpose="evaluate", temperature=0.0)
        recording.add(held_out)
    record = msgspec.structs.replace(a_step(1, 1, [], {}), evaluated={-1: 0, -2: 1})
    assert finish(recording, record)["eval/reward/mean"] == 0.75
    recording.add(scored([verdict(0.0)], group_id=-3, purpose="evaluate", temperature=0.0))
    line = finish(recording, a_step(2, 2, [], {}))
    assert not any(key.startswith("eval/") for key in line), (
        "a row that was left out came late, and no row is evaluated here"
    )
    assert finish(recording, a_step(3, 3, [], {}, evaluated=[-4]))["archive/num_missing"] == 1.0
    assert ids(tmp_path, "evaluation") == {1: [-1, -2]}
    assert ids(tmp_path, "unconsumed") == {1: [-2], 2: [-3]}
    recording.close()


def test_a_killed_recorders_groups_are_found_again(tmp_path: Path) -> None:
    killed = Recording(tmp_path)
    for number in range(5):
        killed.add(group(number))
    finish(killed, a_step(1, 1, [0], {}))
    # Killed after the files of version 2 were closed and before the journal forgot their groups.
    _, ticket = killed.step(a_step(2, 2, [2], {}, open_from=3))
    killed.write_step(ticket)
    resumed = Recording(tmp_path)
    assert ids(tmp_path, "unconsumed") == {1: [1], 2: [3, 4]}
    assert ids(tmp_path, "version") == {1: [0], 2: [2]}
    assert recover(tmp_path / "rollouts" / "journal") == []
    resumed.close()


def test_what_another_kill_left_under_the_same_name_is_told_apart_by_its_tokens(tmp_path: Path) -> None:
    for seed in (1, 2, 2):
        killed = Recording(tmp_path)
        killed.add(scored([verdict(1.0)], [trajectory(seed=seed)], group_id=-1, purpose="evaluate"))
    Recording(tmp_path).close()
    assert ids(tmp_path, "unconsumed") == {1: [-1], 2: [-1]}, "the third was archived as the second"


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for number in range(5):
        recording.add(group(number))
    for version in (1, 2, 3):
        finish(recording, a_step(version, version, [version], {}))
    assert recording.truncate_after(1) == 1, "above the attempt of what is archived unconsumed"
    assert [line["version"] for line in lines(tmp_path)] == [1]
    assert ids(tmp_path, "version") == {1: [1]}
    assert ids(tmp_path, "unconsumed") == {1: [0, 4]}
    recording.add(group(2))
    finish(recording, a_step(2, 2, [2], {}))
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
    recorder.initialized.get()
    for number in range(3):
        recorder.record_group.call(group(number)).get()
    metrics = recorder.record_step.call_one(a_step(1, 1, [0, 1], {"loss": 0.25})).get()
    assert (metrics["loss"], metrics["reward/mean"], metrics["version"]) == (0.25, 0.5, 1)
    recorder.close.call().get()
    assert lines(tmp_path) == [metrics]
    assert ids(tmp_path, "version") == {1: [0, 1]}
    assert ids(tmp_path, "unconsumed") == {1: [2]}


def _in_process(folder: Path) -> Recorder:
    return Recorder(CONFIG, str(folder))


async def test_a_run_leaves_texts_to_the_tokenizer_of_its_model(tmp_path: Path) -> None:
    preprocessor = Preprocessor(MODEL, 3136, 12544, 512)
    ids = np.asarray(
        [*preprocessor.tokenizer("<answer>3</answer>")["input_ids"], *preprocessor.end_token_ids], np.int32
    )
    spoken = replace(trajectory(len(ids), preprocessor.decode(ids)), token_ids=ids)
    recorder = Recorder(replace(CONFIG, model=Model(path=str(MODEL))), str(tmp_path))
    await recorder.record_group(scored([verdict(1.0)], [spoken], group_id=1))
    await recorder.record_step(a_step(1, 1, [1], {}))
    await recorder.close()
    path = tmp_path / "rollouts" / "version-000001.parquet"
    assert pq.read_table(path)["text"].to_pylist() == [None]
    (item,) = archive.read(path)
    assert [t.text for t in item.group.group.trajectories] == [spoken.text]
    assert "<answer>3</answer>" in spoken.text


async def test_a_step_waits_for_a_group_that_is_on_its_way(tmp_path: Path) -> None:
    recorder = _in_process(tmp_path)
    step = asyncio.create_task(recorder.record_step(a_step(1, 1, [1], {})))
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
    assert (await recorder.record_step(a_step(1, 1, [1], {})))["archive/num_missing"] == 1
    assert "version 1: not all of its groups arrived" in caplog.text
    await recorder.close()


async def test_a_line_is_written_when_its_archive_is_on_disk_and_whoever_asks_waits_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), archive.write

    def slow(*arguments: Any, **options: Any) -> Path:
        may_write.wait(30)
        return write(*arguments, **options)

    monkeypatch.setattr(archive, "write", slow)
    recorder = _in_process(tmp_path)
    await recorder.record_group(group(1))
    line = await recorder.record_step(a_step(1, 1, [1], {"loss": 0.5}))
    asked = [asyncio.create_task(call) for call in (recorder.recorded(), recorder.record_step(a_step(2, 1, [], {})))]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in asked)
    assert not (tmp_path / "metrics.jsonl").exists(), "the line of a version that has no archive"
    may_write.set()
    await asyncio.gather(*asked)
    assert lines(tmp_path)[0] == line
    assert next(iter(ids(tmp_path, "version"))) == 1
    await recorder.close()
    assert [each["version"] for each in lines(tmp_path)] == [1, 2]


async def test_an_archive_that_cannot_be_written_fails_what_follows_and_its_groups_are_found_again(
    tmp_path: Path,
) -> None:
    recorder = _in_process(tmp_path)
    await recorder.record_group(group(1))
    (tmp_path / "rollouts" / "version-000001.parquet").mkdir()
    await recorder.record_step(a_step(1, 1, [1], {}))
    for call in (recorder.record_step(a_step(2, 2, [], {})), recorder.recorded(), recorder.close()):
        with pytest.raises(OSError, match=r"version-000001\.parquet"):
            await call
    assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "rollouts" / "version-000001.parquet").rmdir()
    await _in_process(tmp_path).close()
    assert ids(tmp_path, "unconsumed") == {1: [1]}


@contextlib.contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may become larger, as on a disk with so much room: the kernel writes what fits and refuses the rest."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_a_group_that_found_no_room_ends_the_run_and_those_before_and_after_it_are_found_again(
    tmp_path: Path,
) -> None:
    recorder = _in_process(tmp_path)
    await recorder.record_group(group(1))
    size = (tmp_path / "rollouts" / "journal").stat().st_size
    with full_disk(size + size // 2), pytest.raises(Exception, match="File too large") as raised:
        await recorder.record_group(group(2))
    assert kind_of(raised.value) == "fatal"
    await recorder.record_group(group(3))
    assert [each.group.lease.group_id for each in recover(tmp_path / "rollouts" / "journal")] == [1, 3]


EIGHT = {"mode": "off_policy", "max_staleness": 8}
WIDE = Policy(rollout_batch=6, group_size=2, max_oversample=1.0, look_ahead=1)


@pytest.mark.parametrize("how", ["file", "schedule", "live switch"])
async def test_under_any_bound_every_group_is_with_the_recorder_until_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(actors.recorder, "ARRIVAL_S", 0.05)
    changes: dict[str, Any] = {"file": EIGHT, "schedule": {"schedule": [Phase(**EIGHT)]}, "live switch": {}}[how]
    run = RecordedStage(tmp_path, msgspec.structs.replace(WIDE, **changes), steps=12, training_s=0.05, num_generators=8)
    controller = await run.open()
    if how == "live switch":
        controller.switch(ModeInForce(**EIGHT))
    await controller.run()
    await run.close()
    assert max(run.consumed.values()) == 8
    assert [line["archive/num_missing"] for line in lines(tmp_path)] == [0.0] * 12
    assert sorted(chain(*ids(tmp_path, "version").values())) == sorted(run.consumed)
    assert not set(chain(*ids(tmp_path, "unconsumed").values())) & set(run.consumed)


async def test_filtered_groups_leave_the_recorder_with_the_steps_and_not_at_the_end_of_the_run(tmp_path: Path) -> None:
    run = RecordedStage(tmp_path, msgspec.structs.replace(WIDE, filter="zero_variance", max_oversample=2.0), steps=30)
    run.equal_rewards = lambda lease: lease.group_id % 3 == 0
    controller = await run.open()
    await controller.run()
    await run.close()
    unconsumed = ids(tmp_path, "unconsumed")
    assert len(unconsumed) > 20
    assert max(len(groups) for groups in unconsumed.values()) <= 12, "what is generated for one batch, at most"
    assert not set(chain(*unconsumed.values())) & set(run.consumed)


async def test_a_run_in_which_no_answer_is_right_says_so_once_with_one_of_its_answers(tmp_path: Path) -> None:
    run = RecordedStage(tmp_path, WIDE, steps=5)
    run.verdicts = lambda lease: [verdict(0.0)] * lease.num_completions  # type: ignore[method-assign]
    await run.run()
    await run.close()
    [line] = [line for line in run.said if "zero_accuracy" in line]
    assert "no response had an accuracy above 0 in the last 2 versions; for example" in line
    assert "of rows.parquet" in line
