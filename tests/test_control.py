"""The control socket: who may steer a run, and what a wrong request gets."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.run.stage import Stage
from vtriune.config import ConfigError, check
from vtriune.config.tree import Model, Policy
from vtriune.control import Address, ControlReply, ControlServer, Request, ask, main
from vtriune.data.schema import DataError
from vtriune.run.schedule import ModeInForce

ROOT = Path(__file__).parents[1]


class Run:
    """Records what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def status(self) -> dict[str, Any]:
        return {"version": 3}

    def stop(self) -> None:
        self.told.append("stop")

    def switch(self, wanted: ModeInForce) -> None:
        self.told.append(wanted)

    def request_checkpoint(self) -> None:
        self.told.append("checkpoint")

    def weigh(self, source: str, weight: float) -> None:
        if source == "nowhere":
            raise DataError("data.mixture: no source nowhere")
        self.told.append((source, weight))


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
    assert ask(tmp_path, "status").status == {"version": 3, "refused_requests": 0}
    ask(tmp_path, "checkpoint")
    ask(tmp_path, "switch", mode="off_policy", max_staleness=1)
    ask(tmp_path, "switch", mode="off_policy")
    ask(tmp_path, "stop")
    assert run.told == ["checkpoint", ModeInForce("off_policy", 1), ModeInForce("off_policy", 2), "stop"]


def test_a_weight_reaches_the_run_by_the_command_line_and_what_is_none_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "weight", "my/set", "2.5"]) == 0
    assert run.told == [("my/set", 2.5)]
    assert main([str(tmp_path), "weight", "nowhere", "1"]) == 1
    assert "no source nowhere" in capsys.readouterr().err
    for words in (["weight", "a"], ["weight", "a", "much"], ["weight", "a", "-1"], ["weight", "a", "nan"]):
        assert main([str(tmp_path), *words]) == 2
        assert "write weight SOURCE VALUE" in capsys.readouterr().err
    assert run.told == [("my/set", 2.5)]


async def test_a_switch_that_the_file_could_not_ask_for_is_refused_with_the_same_sentence(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Policy(rollout_batch=4, in_flight="continue"))
    stage.config = msgspec.structs.replace(stage.config, model=Model(freeze=["llm"]))
    controller = await stage.open()
    with ControlServer(controller, tmp_path) as server:
        serving = asyncio.create_task(server.serve())
        for mode, bound, sentence in (
            ("off_policy", 1, "continue keeps image features of an older ViT"),
            ("on_policy", 2, "max_staleness: 2 with mode on_policy; on-policy data is never stale"),
        ):
            reply = await asyncio.to_thread(ask, tmp_path, "switch", mode=mode, max_staleness=bound)
            assert sentence in (reply.error or "")
            policy = Policy(mode=mode, max_staleness=bound, in_flight="continue")  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=sentence):
                check(msgspec.structs.replace(stage.config, policy=policy))
        for bound in (-1, 10**20):
            reply = await asyncio.to_thread(ask, tmp_path, "switch", mode="off_policy", max_staleness=bound)
            assert "max_staleness" in (reply.error or "")
        assert (await asyncio.to_thread(ask, tmp_path, "switch", mode="on_policy")).error is None
        serving.cancel()
    assert controller.status()["requested"] == {"mode": "on_policy", "max_staleness": 0}


def test_a_request_without_the_runs_token_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    assert path.stat().st_mode & 0o777 == 0o600
    address = msgspec.json.decode(path.read_bytes(), type=Address)
    path.write_bytes(msgspec.json.encode(Address(address.address, "guess", address.pid)))
    assert ask(tmp_path, "stop").error == "wrong token"
    assert run.told == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
COMMANDS = st.sampled_from(["status", "switch", "checkpoint", "stop", "weigh", "sit"])
MODES = st.sampled_from(["on_policy", "off_policy", "both"])


@pytest.fixture
def client(run: Run, tmp_path: Path) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A socket that can send what `ask` never would, and the run's token."""
    address = msgspec.json.decode((tmp_path / "control.json").read_bytes(), type=Address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address.address)
        yield socket, address.token


def answer_to(socket: "zmq.Socket[bytes]", *frames: bytes) -> ControlReply:
    socket.send_multipart([b"", *frames])
    assert socket.poll(10_000), f"no answer to {frames!r}"
    delimiter, reply = socket.recv_multipart()
    assert delimiter == b""
    return msgspec.json.decode(reply, type=ControlReply)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=64), min_size=1, max_size=4))
@example(frames=[b"{}", b"{}"])
def test_any_bytes_in_any_number_of_frames_are_refused_and_the_next_request_is_served(
    client: Any, tmp_path: Path, frames: list[bytes]
) -> None:
    socket, token = client
    assert answer_to(socket, *frames).error
    assert answer_to(socket, msgspec.json.encode(Request(token, "status"))).status


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    token=st.none() | st.text(st.characters(exclude_categories=())),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "command": COMMANDS | JSON,
            "mode": MODES | JSON,
            "max_staleness": JSON,
            "weight": JSON,
            "source": JSON,
            "more": JSON,
        },
    ),
)
@example(token="Löwe", fields={"command": "stop"})
@example(token="\ud800", fields={"command": "stop"})
@example(token=None, fields={"command": "switch", "mode": "off_policy", "max_staleness": 10**30})
def test_any_fields_of_any_kind_are_answered_and_no_token_but_the_runs_steers_it(
    run: Run, client: Any, token: str | None, fields: dict[str, Any]
) -> None:
    socket, ours = client
    told = len(run.told)
    reply = answer_to(socket, json.dumps({"token": ours if token is None else token, **fields}).encode())
    assert (reply.error is None) != (reply.status is None)
    if token is not None:
        assert reply.error
        assert len(run.told) == told
    assert answer_to(socket, msgspec.json.encode(Request(ours, "status"))).status


def test_clients_that_vanish_flood_send_too_much_or_fail_the_run_are_counted_and_end_nothing(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = msgspec.json.decode((tmp_path / "control.json").read_bytes(), type=Address)
    with zmq.Context() as context:
        for frames in ([b"x" * 100_000], [b"no delimiter"], [b"no", b"delimiter"], [b"", b"nonsense"]):
            with context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 1000)
                socket.connect(address.address)
                # One whose message is too large is cut off: nobody takes its others.
                with contextlib.suppress(zmq.Again):
                    for _ in range(3000):
                        socket.send_multipart(frames, zmq.NOBLOCK)
    run.status = lambda: {"a": 1 / 0}  # type: ignore[method-assign]
    assert (
        ask(tmp_path, "status", timeout_s=30).error == "the request failed: ZeroDivisionError; the run's log says more"
    )
    del run.status
    status = ask(tmp_path, "status", timeout_s=30).status
    assert status
    assert status["refused_requests"] > 1000
    # Nor do they fill the disk under the run's log.
    assert 0 < len([record for record in caplog.records if "requests refused" in record.message]) < 40


SERVES = """
import asyncio, sys
from pathlib import Path
from vtriune.control import ControlServer
with ControlServer(None, Path(sys.argv[1])) as server:
    print("serves", flush=True)
    asyncio.run(server.serve())
"""


def test_of_a_run_that_was_killed_the_command_line_says_so_at_once_and_nothing_of_its_socket_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        command = [sys.executable, "-c", SERVES, str(tmp_path)]
        env = {**os.environ, "TMPDIR": sockets}
        with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "serves\n"
            server.kill()
        started = time.monotonic()
        assert main([str(tmp_path), "status"]) == 1
        assert time.monotonic() - started < 5
        assert f"the run with pid {server.pid} is gone" in capsys.readouterr().err
        while os.listdir(sockets) and time.monotonic() < started + 10:
            time.sleep(0.05)
        assert os.listdir(sockets) == []


def test_the_command_line_says_when_nothing_runs_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "status"]) == 1
    assert "no run is going on" in capsys.readouterr().err
    for words in (
        ["mood=good"],
        ["mode=off_policy", "mode=on_policy"],
        ["mode=off_policy", "max_staleness=²"],
        ["stop", "now"],
    ):
        assert main([str(tmp_path), *words]) == 2
        assert f"cannot read {' '.join(words)!r}" in capsys.readouterr().err
    (tmp_path / "control.json").write_bytes(b"{")
    assert main([str(tmp_path), "status"]) == 1
