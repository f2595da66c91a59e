"""The control socket: who may steer a run, and what a wrong request gets."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vtriune.control import Address, ControlServer, ask, main
from vtriune.schedule import Stance


class Run:
    """Records what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def status(self) -> dict[str, Any]:
        return {"version": 3}

    def stop(self) -> None:
        self.told.append("stop")

    def switch(self, wanted: Stance) -> None:
        self.told.append(wanted)

    def request_checkpoint(self) -> None:
        self.told.append("checkpoint")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run, ready = Run(), threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        with ControlServer(run, tmp_path) as server:
            ready.set()
            await server.serve()

    def work() -> None:
        task = loop.create_task(serve())
        loop.call_soon_threadsafe(lambda: None)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        finally:
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    yield run
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    thread.join(10)
    assert not thread.is_alive()
    assert not (tmp_path / "control.json").exists()


def test_status_stop_checkpoint_and_switch_reach_the_run(run: Run, tmp_path: Path) -> None:
    assert ask(tmp_path, "status").status == {"version": 3}
    ask(tmp_path, "checkpoint")
    ask(tmp_path, "switch", mode="off_policy", max_staleness=1)
    ask(tmp_path, "switch", mode="off_policy")
    ask(tmp_path, "stop")
    assert run.told == ["checkpoint", Stance("off_policy", 1), Stance("off_policy", 2), "stop"]


def test_an_impossible_switch_is_refused_and_changes_nothing(run: Run, tmp_path: Path) -> None:
    assert "impossible" in (ask(tmp_path, "switch", mode="on_policy", max_staleness=2).error or "")
    assert run.told == []


def test_a_request_without_the_runs_token_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    assert path.stat().st_mode & 0o777 == 0o600
    address = msgspec.json.decode(path.read_bytes(), type=Address)
    path.write_bytes(msgspec.json.encode(Address(address.address, "guess", address.pid)))
    assert ask(tmp_path, "stop").error == "wrong token"
    assert run.told == []


def test_the_command_line_says_when_nothing_runs_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "status"]) == 1
    assert "no run is going on" in capsys.readouterr().err
    assert main([str(tmp_path), "mood=good"]) == 2
