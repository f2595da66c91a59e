"""Who gets in over TCP: the run's own processes and nobody else. Each test is a run of its own on loopback."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.runtime.actors import Echo
from vtriune import runtime
from vtriune.runtime.node import Node, this_node
from vtriune.transport import wire
from vtriune.transport.security import RunKeys, Security, new_keys
from vtriune.transport.wire import Hello, Limits, PeerRef

WAIT_S = 30.0


@pytest.fixture(scope="module")
def secured() -> Iterator[tuple[runtime.ProcMesh, Echo]]:
    runtime.shutdown()
    runtime.configure(bind="127.0.0.1")
    procs = runtime.this_host().spawn_procs(per_host={"procs": 2}, name="secured", on_failure=print)
    yield procs, procs.spawn("echo", Echo)
    procs.stop().get(timeout=WAIT_S)
    runtime.shutdown()
    runtime.configure()


def test_calls_work_over_curve_and_every_socket_is_tcp_with_it(secured: tuple[runtime.ProcMesh, Echo]) -> None:
    procs, echo = secured
    assert echo.greet.call("x").get(timeout=WAIT_S).to_list() == ["hello x"] * 2
    assert all(peer.address.startswith("tcp://127.0.0.1:") for peer in [*procs.peers, this_node().me])


def test_keys_are_on_no_command_line_and_in_no_environment(secured: tuple[runtime.ProcMesh, Echo]) -> None:
    keys = this_node().keys
    assert keys is not None
    for peer in secured[0].peers:
        seen = Path(f"/proc/{peer.pid}/environ").read_bytes() + Path(f"/proc/{peer.pid}/cmdline").read_bytes()
        for key in (keys.server_public, keys.server_secret, keys.client_public, keys.client_secret):
            assert key not in seen
    assert keys.client_secret.decode() not in repr(keys)


def answer_to(address: str, keys: RunKeys | None, message: bytes) -> bytes | None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if keys is not None:
        socket.curve_serverkey, socket.curve_publickey = keys.server_public, keys.client_public
        socket.curve_secretkey = keys.client_secret
    try:
        socket.connect(address)
        socket.send(message)
        return socket.recv() if socket.poll(700) else None
    finally:
        socket.close()
        context.term()


def test_strangers_get_nothing_and_are_counted(secured: tuple[runtime.ProcMesh, Echo]) -> None:
    node = this_node()
    keys = node.keys
    assert keys is not None
    hello = wire.encode(Hello(wire.PROTOCOL, PeerRef("x", "x", "x", 0, "x", 1), 1))
    strangers = {
        "no keys": None,
        "keys of another run": new_keys(),
        "the right server key, a client key of its own": RunKeys(keys.server_public, b"", *zmq.curve_keypair()),
    }
    for who, theirs in strangers.items():
        before = node.inbox.num_refused
        assert answer_to(node.me.address, theirs, hello) is None, who
        assert wait_until(lambda before=before: node.inbox.num_refused > before), who
    assert answer_to(node.me.address, keys, hello) is not None
    assert secured[1].ping.choose(3).get(timeout=WAIT_S) == 3


def wait_until(condition: object) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_hello_of_another_protocol_version_is_refused_with_both_versions(
    secured: tuple[runtime.ProcMesh, Echo],
) -> None:
    future = wire.encode(Hello(wire.PROTOCOL + 1, PeerRef("x", "x", "x", 0, "x", 1), 1))
    answer = answer_to(this_node().me.address, this_node().keys, future)
    assert answer is not None
    assert f"protocol {wire.PROTOCOL + 1} is not {wire.PROTOCOL}" in wire.decode(answer).reason  # type: ignore[union-attr]


def test_a_worker_restarts_on_its_tcp_address(secured: tuple[runtime.ProcMesh, Echo]) -> None:
    policy = runtime.RestartPolicy(num_restarts=1, backoff_s=0.1)
    procs = runtime.this_host().spawn_procs(name="again", on_failure=print, restart=policy)
    echo = procs.spawn("echo", Echo)
    assert echo.ping.call_one(1).get(timeout=WAIT_S) == 1
    old = procs.peers[0].pid
    os.kill(old, 9)

    def is_back() -> bool:
        return echo.ping.call_one(2).exception(timeout=WAIT_S) is None

    assert wait_until(is_back)
    assert procs.peers[0].pid != old
    procs.stop().get(timeout=WAIT_S)


def test_the_allow_list_denies_every_request_but_the_right_one() -> None:
    context = zmq.Context()
    keys = new_keys()
    security = Security(context, keys)
    from zmq.utils.z85 import decode

    right = [b"1.0", b"7", b"vtriune", b"127.0.0.1", b"", b"CURVE", decode(keys.client_public)]
    assert security.answer(right)[1:3] == [b"7", b"200"]
    for position, forged in [(0, b"2.0"), (2, b"other"), (5, b"NULL"), (5, b"PLAIN"), (6, b"\0" * 32)]:
        assert security.answer([*right[:position], forged, *right[position + 1 :]])[2] == b"400"
    for request in ([], right[:6], [*right, b"more"]):
        assert security.answer(request)[2] == b"400"
    security.close()
    context.term()


def test_tcp_without_keys_and_wildcards_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the run's keys"):
        Node("n", "m", 0, "tcp://127.0.0.1:0", Limits())
    runtime.shutdown()
    with pytest.raises(ValueError, match="name the address of one interface"):
        runtime.configure(bind="0.0.0.0")
