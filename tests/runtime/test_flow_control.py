"""Bounded queues: a slow receiver slows its senders, nothing is dropped, limits are errors by name.

Each test is a run of its own with small limits.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tests.runtime.actors import Echo
from vtriune import runtime
from vtriune.runtime import BacklogFull, DeadlineExceeded, Limits, MessageRefused, ProcMesh
from vtriune.runtime.node import this_node
from vtriune.transport import wire
from vtriune.transport.wire import Call, Fault, Hello, PeerRef, Reply, Welcome

WAIT_S = 30.0
NUM_PACED = 20_000
LIMITS = Limits(frame_bytes=1 << 20, frames=8, credit_messages=16, credit_bytes=1 << 20, backlog_messages=50)


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    runtime.shutdown()
    runtime.configure(limits=LIMITS)
    mesh = runtime.this_host().spawn_procs(name="narrow", on_failure=print)
    yield mesh
    mesh.stop().get(timeout=WAIT_S)
    runtime.shutdown()
    runtime.configure()


def test_a_slow_receiver_slows_a_blocking_sender_and_loses_nothing(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)
    echo.ping.call_one(0).get(timeout=WAIT_S)
    start = time.perf_counter()
    for mark in range(40):
        echo.block.broadcast(0.02, mark=mark)
    assert time.perf_counter() - start > 0.02 * (40 - LIMITS.credit_messages - 2)
    assert this_node().link(procs.peers[0]).num_outstanding <= LIMITS.credit_messages

    def has_all() -> bool:
        return echo.marks.call_one().get(timeout=WAIT_S) == list(range(40))

    end = time.monotonic() + WAIT_S
    while not has_all():
        assert time.monotonic() < end


def test_bytes_in_flight_are_bounded_too(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)
    half = b"x" * (LIMITS.credit_bytes * 2 // 5)
    first = [echo.hold.call_one(half, 0.4) for _ in range(2)]
    start = time.perf_counter()
    third = echo.hold.call_one(half, 0.0)
    assert time.perf_counter() - start > 0.2
    assert [future.get(timeout=WAIT_S) for future in [*first, third]] == [len(half)] * 3


def test_an_asyncio_sender_awaits_and_beyond_the_backlog_gets_an_error(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)

    async def flood() -> int:
        futures: list[runtime.Future[str]] = []

        def send_all() -> None:
            for _ in range(10_000):
                futures.append(echo.nap.call_one(0.01))

        with pytest.raises(BacklogFull, match=r"wait for narrow rank 0 .*await earlier calls"):
            send_all()
        assert await asyncio.gather(*futures) == ["rested"] * len(futures)
        return len(futures)

    assert LIMITS.backlog_messages <= asyncio.run(flood()) <= LIMITS.backlog_messages + LIMITS.credit_messages + 1


def test_awaited_broadcasts_keep_pace_with_the_receiver(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)

    async def paced() -> list[int]:
        for mark in range(NUM_PACED):
            await echo.note.broadcast(mark)
        return await echo.marks.call_one()

    # Many: what is owed for finished ones goes out in the very moment in which others arrive.
    assert asyncio.run(paced()) == list(range(NUM_PACED))


def test_waiting_for_credit_counts_against_the_deadline(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)
    naps = [echo.nap.call_one(0.6) for _ in range(LIMITS.credit_messages)]
    with pytest.raises(DeadlineExceeded, match="no credit from narrow rank 0"):
        echo.ping.within(0.2).call_one(1)
    assert [nap.get(timeout=WAIT_S) for nap in naps] == ["rested"] * len(naps)


def test_messages_over_a_limit_are_refused_by_name_and_the_connection_lives(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)
    with pytest.raises(MessageRefused, match=r"echo\.sink: an array of 1048577 bytes exceeds the limit of 1048576"):
        echo.sink.call_one(b"x" * (LIMITS.frame_bytes + 1))
    with pytest.raises(MessageRefused, match=r"echo\.stack: 9 large arrays exceed the limit of 8"):
        echo.stack.call_one([np.zeros(10_000, np.uint8)] * 9)
    assert echo.stack.call_one([np.zeros(10_000, np.uint8)] * 8).get(timeout=WAIT_S) == 80_000
    with pytest.raises(runtime.ActorError, match=r"a result of \d+ bytes exceeds"):
        echo.inflate.call_one(LIMITS.frame_bytes + 1).get(timeout=WAIT_S)
    assert echo.ping.call_one(4).get(timeout=WAIT_S) == 4


def test_a_peer_that_ignores_limits_and_credit_is_refused_by_name_and_its_connection_lives(procs: ProcMesh) -> None:
    echo: Any = procs.spawn("echo", Echo)
    echo.ping.call_one(0).get(timeout=WAIT_S)
    context = zmq.Context()
    rude = context.socket(zmq.DEALER)
    rude.linger, rude.rcvtimeo = 0, int(WAIT_S * 1000)
    rude.connect(procs.peers[0].address)
    rude.send(wire.encode(Hello(wire.PROTOCOL, PeerRef("rude", "ipc://x", "rude", 0, "here", 1), 1)))
    assert isinstance(wire.decode(rude.recv()), Welcome)
    ids = itertools.count(1)

    def send(endpoint: str, argument: object, *frames: bytes) -> None:
        body = msgspec.Raw(msgspec.msgpack.encode([argument]))
        rude.send_multipart([wire.encode(Call(next(ids), echo._actor_id, endpoint, body, 1)), *frames])

    def answer() -> wire.Message:
        return wire.decode(rude.recv())

    send("ping", 1, *[b"x"] * (LIMITS.frames + 1))
    assert "ping: more than 8 frames" in fault_text(answer())
    rude.send(b"\xff not msgpack")
    for _ in range(LIMITS.credit_messages + 1):
        send("nap", 0.3)
    assert "nap: 16 calls are unfinished" in fault_text(answer())
    assert [type(answer()) for _ in range(LIMITS.credit_messages)] == [Reply] * LIMITS.credit_messages
    send("ping", "one")
    assert re.search(r"ping, sent by rude rank 0 \(host here, pid 1\): x: Expected `int`", fault_text(answer()))
    send("ping", 5)
    assert isinstance(answer(), Reply)
    rude.send(bytes(LIMITS.frame_bytes + 1))
    assert echo.ping.call_one(4).get(timeout=WAIT_S) == 4
    context.destroy(linger=0)


def fault_text(message: wire.Message) -> str:
    assert isinstance(message, Fault), message
    return message.error.text


def test_a_cancelled_await_cancels_the_callee(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(echo.forever.call_one(), 0.2)

    asyncio.run(give_up())
    end = time.monotonic() + WAIT_S
    while echo.marks.call_one().get(timeout=WAIT_S) != [-1]:
        assert time.monotonic() < end, "the callee's task was not cancelled"


def test_a_deadline_is_inherited_by_the_callees_own_calls(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo)
    assert echo.time_left.call_one().get(timeout=WAIT_S) is None
    left_s = echo.time_left.within(5.0).call_one().get(timeout=WAIT_S)
    assert left_s is not None
    assert 3.0 < left_s <= 5.0
