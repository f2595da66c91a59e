"""Checkpoints are written beside the run: named when whole, one at a time, waited for at the end, their failure the run's."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.vtriune.stage import FakeLearner, Mesh, Stage
from vtriune.checkpoint import CheckpointError, all_steps, latest_complete
from vtriune.config.tree import Checkpoint, Policy
from vtriune.ledger import Ledger
from vtriune.run_state import RunState, Snapshots


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


def state(version: int) -> RunState:
    return RunState(version, version, Ledger().state(), {}, 0)


def snapshots(folder: Path) -> Snapshots:
    return Snapshots(folder, Checkpoint(every=1, keep=2))


async def test_the_run_goes_on_while_a_checkpoint_is_written_and_it_has_no_name_until_it_is_whole(
    tmp_path: Path,
) -> None:
    writer, taker = SlowWriter(), snapshots(tmp_path)
    await taker.write(state(1), Mesh(writer))
    await asyncio.sleep(0.02)
    await taker.settle(waits=False)
    assert writer.calls == ["save"]
    assert all_steps(tmp_path) == []
    writer.finish.set()
    await taker.settle(waits=True)
    assert latest_complete(tmp_path) == tmp_path / "step-1"


async def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    writer, taker = SlowWriter(), snapshots(tmp_path)
    await taker.write(state(1), Mesh(writer))
    second = asyncio.create_task(taker.write(state(2), Mesh(writer)))
    await asyncio.sleep(0.02)
    assert writer.calls == ["save"]
    assert not second.done()
    writer.finish.set()
    await second
    assert writer.calls[:3] == ["save", "saved", "save"]
    assert (tmp_path / "step-1").is_dir()
    await taker.settle(waits=True)
    assert latest_complete(tmp_path) == tmp_path / "step-2"


async def test_a_write_that_broke_is_raised_by_name_at_the_next_occasion_and_only_once(tmp_path: Path) -> None:
    writer, taker = SlowWriter(), snapshots(tmp_path)
    writer.error = OSError(28, "No space left on device")
    writer.finish.set()
    await taker.write(state(7), Mesh(writer))
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
    await taker.write(state(3), Mesh(writer))
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
    assert stage.controller.window.version < 10
    assert latest_complete(tmp_path / "checkpoints") is None


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
    controller = await stage.open()
    running = asyncio.create_task(controller.run())
    while controller.window.version < 2:
        await asyncio.sleep(0.001)
    controller.stop()
    async with asyncio.timeout(30):
        await running
    assert latest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"step-{controller.window.version}"
