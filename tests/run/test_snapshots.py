"""Checkpoints are written beside the run: named when whole, one at a time, waited for at the end, their failure the run's."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.run.stage import FakeLearner, Stage, mesh_of
from vtriune.config.tree import Checkpoint, Config, Policy, Run
from vtriune.record.checkpoint import CheckpointError, all_steps, latest_complete
from vtriune.roles import Learner, Recorder
from vtriune.run.ledger import Ledger
from vtriune.run.snapshots import STATE_FILE, RunState, Snapshots, read_state


class SlowWriter:
    """A learner whose copy is quick and whose write lasts until `finish` is set."""

    def __init__(self) -> None:
        self.finish = asyncio.Event()
        self.calls: list[str] = []
        self.error: Exception | None = None

    async def save(self, folder: str) -> None:
        self.calls.append("save")
        (Path(folder) / "weights").write_text("half")

    async def saved(self) -> None:
        await self.finish.wait()
        self.calls.append("saved")
        if self.error is not None:
            raise self.error


class SlowRecorder:
    """A recorder whose archives are on disk once `finish` is set; at once, unless told otherwise."""

    def __init__(self, *, is_slow: bool = False) -> None:
        self.finish = asyncio.Event()
        if not is_slow:
            self.finish.set()

    async def recorded(self) -> None:
        await self.finish.wait()


def state(version: int) -> RunState:
    return RunState(version, version, Ledger().state(), {}, [], 9)


def snapshots(folder: Path) -> Snapshots:
    return Snapshots(folder, Checkpoint(every=1, keep=2))


async def test_the_run_goes_on_while_a_checkpoint_is_written_and_it_has_no_name_until_it_is_whole(
    tmp_path: Path,
) -> None:
    writer, taker = SlowWriter(), snapshots(tmp_path)
    await taker.write(state(1), mesh_of(Learner, writer), mesh_of(Recorder, SlowRecorder()))
    await asyncio.sleep(0.02)
    await taker.settle(waits=False)
    assert writer.calls == ["save"]
    assert all_steps(tmp_path) == []
    writer.finish.set()
    await taker.settle(waits=True)
    assert latest_complete(tmp_path) == tmp_path / "step-1"


async def test_a_checkpoint_waits_for_the_archives_and_lines_of_its_versions(tmp_path: Path) -> None:
    writer, recorder, taker = SlowWriter(), SlowRecorder(is_slow=True), snapshots(tmp_path)
    writer.finish.set()
    await taker.write(state(1), mesh_of(Learner, writer), mesh_of(Recorder, recorder))
    await asyncio.sleep(0.05)
    assert writer.calls == ["save", "saved"]
    assert all_steps(tmp_path) == []
    recorder.finish.set()
    await taker.settle(waits=True)
    assert latest_complete(tmp_path) == tmp_path / "step-1"


async def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    writer, taker = SlowWriter(), snapshots(tmp_path)
    await taker.write(state(1), mesh_of(Learner, writer), mesh_of(Recorder, SlowRecorder()))
    second = asyncio.create_task(taker.write(state(2), mesh_of(Learner, writer), mesh_of(Recorder, SlowRecorder())))
    await asyncio.sleep(0.02)
    assert writer.calls == ["save"]
    assert not second.done()
    writer.finish.set()
    await second
    assert writer.calls[:3] == ["save", "saved", "save"]
    assert (tmp_path / "step-1").is_dir()
    await taker.settle(waits=True)
    assert latest_complete(tmp_path) == tmp_path / "step-2"


def test_a_checkpoint_from_before_the_number_of_rows_was_kept_is_finished_by_steps_alone(tmp_path: Path) -> None:
    kept = msgspec.to_builtins(msgspec.structs.replace(state(4), cursor={"num_drawn": 24}, num_rows=24))
    for fields, is_known in ((kept, True), ({key: kept[key] for key in kept if key != "num_rows"}, False)):
        (tmp_path / STATE_FILE).write_bytes(msgspec.json.encode(fields))
        found = read_state(tmp_path)
        assert found.is_end_of(Config(run=Run(epochs=1), policy=Policy(rollout_batch=6))) is is_known
        assert found.is_end_of(Config(run=Run(steps=4)))
        assert not found.is_end_of(Config(run=Run(steps=5)))


async def test_a_write_that_broke_is_raised_by_name_at_the_next_occasion_and_only_once(tmp_path: Path) -> None:
    writer, taker = SlowWriter(), snapshots(tmp_path)
    writer.error = OSError(28, "No space left on device")
    await taker.write(state(7), mesh_of(Learner, writer), mesh_of(Recorder, SlowRecorder()))
    writer.finish.set()
    await asyncio.sleep(0.02)
    with pytest.raises(CheckpointError, match=r"step-7.*No space left on device"):
        await taker.settle(waits=False)
    await taker.settle(waits=True)
    assert all_steps(tmp_path) == []


async def test_a_checkpoint_that_cannot_be_sealed_fails_by_name_too(tmp_path: Path) -> None:
    class Linker(SlowWriter):
        async def save(self, folder: str) -> None:
            (Path(folder) / "weights").symlink_to(tmp_path)

    writer, taker = Linker(), snapshots(tmp_path)
    writer.finish.set()
    await taker.write(state(3), mesh_of(Learner, writer), mesh_of(Recorder, SlowRecorder()))
    with pytest.raises(CheckpointError, match=r"step-3.*links"):
        await taker.settle(waits=True)


async def test_a_run_whose_checkpoint_broke_ends_with_that_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FakeLearner, "saved", broken)
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2), steps=50, checkpoint_every=2)
    with pytest.raises(CheckpointError, match=r"step-2.*Input/output error"):
        await stage.run()
    assert stage.controller.groups.version < 10
    assert latest_complete(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("moment", ["saved", "save"])
async def test_a_failure_elsewhere_comes_when_the_checkpoint_in_hand_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whether it is being written beside the run, or copied while the run stands still."""
    began, written = asyncio.Event(), getattr(FakeLearner, moment)

    async def slow(self: Any, folder: str) -> None:
        began.set()
        await asyncio.sleep(0.1)
        await written(self, folder)

    async def slow_to_end(self: Any) -> None:
        began.set()
        await asyncio.sleep(0.1)

    monkeypatch.setattr(FakeLearner, moment, slow if moment == "save" else slow_to_end)

    async def fail() -> None:
        await began.wait()
        raise RuntimeError("a verifier died for good")

    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2), steps=1000, checkpoint_every=2)
    controller = await stage.open()
    with pytest.raises(RuntimeError, match="a verifier died for good"):
        await controller.run(fail())
    assert latest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-2"


async def test_a_failed_run_does_not_wait_for_ever_for_its_checkpoint_nor_tells_of_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vtriune.run.snapshots.FINISH_S", 0.05)
    said: list[str] = []
    for is_hanging in (True, False):
        writer, taker = SlowWriter(), Snapshots(tmp_path, Checkpoint(), said.append)
        await taker.write(state(1), mesh_of(Learner, writer), mesh_of(Recorder, SlowRecorder()))
        if not is_hanging:
            writer.error = OSError(28, "No space left on device")
            writer.finish.set()
        await taker.finish()
        await taker.finish()
    assert said[0] == said[2] == "the run has failed; the checkpoint in hand is finished first, within 0 s"
    assert "it took too long" in caplog.text
    assert "No space left on device" in caplog.text
    assert all_steps(tmp_path) == []


async def test_the_end_of_a_run_waits_for_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(self: Any) -> None:
        await asyncio.sleep(0.2)

    monkeypatch.setattr(FakeLearner, "saved", slow)
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2), steps=3)
    await stage.run()
    assert latest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-3"


async def test_a_stop_waits_for_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(self: Any) -> None:
        await asyncio.sleep(0.1)

    monkeypatch.setattr(FakeLearner, "saved", slow)
    stage = Stage(tmp_path, Policy(mode="on_policy", rollout_batch=6, group_size=2), steps=1000)
    controller = await stage.stopped_at(2)
    assert latest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"step-{controller.groups.version}"


async def test_a_file_that_says_nothing_of_checkpoints_loses_ten_versions_at_most(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, Checkpoint())
    assert [version for version in range(1, 31) if snapshots.is_due(version, is_last=False)] == [10, 20, 30]
