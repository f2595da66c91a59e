"""Long runs of the runtime: memory over many calls, chaos, and garbage on its socket. Called by `bench.messaging --soak`
and, in small sizes, by the tests. Each raises AssertionError with what it saw."""

from __future__ import annotations

import gc
import os
import queue
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import zmq

from bench.messaging_actors import Echo
from vtriune import runtime
from vtriune.runtime import (
    BacklogFull,
    ConnectionLost,
    DeadlineExceeded,
    MeshFailure,
    MessageRefused,
    RestartPolicy,
    this_host,
)
from vtriune.runtime.node import this_node
from vtriune.transport import wire
from vtriune.transport.wire import Call, Hello, Limits, PeerRef

WAIT_S = 60.0
DEADLINE_S = 5.0
EXPECTED = (MeshFailure, ConnectionLost, DeadlineExceeded, MessageRefused, BacklogFull)


def memory(num_calls: int) -> dict[str, float]:
    """Growth of resident memory, in MB, at caller and callee over `num_calls`, the first tenth being warm-up."""
    procs = this_host().spawn_procs(name="soak")
    echo = procs.spawn("echo", Echo)
    own = psutil.Process()

    def some(count: int) -> None:
        for _ in range(count // 500):
            for future in [echo.ping.within(60.0).call_one(i) for i in range(500)]:
                future.get()

    some(num_calls // 10)
    gc.collect()
    before = own.memory_info().rss, echo.rss_bytes.call_one().get()
    some(num_calls)
    gc.collect()
    after = own.memory_info().rss, echo.rss_bytes.call_one().get()
    procs.stop().get(timeout=WAIT_S)
    return {"caller_growth_MB": (after[0] - before[0]) / 1e6, "callee_growth_MB": (after[1] - before[1]) / 1e6}


def open_descriptors() -> list[str]:
    """What this process's file descriptors refer to."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            # The descriptor of the listing itself.
            continue
    return sorted(found)


def chaos(num_rounds: int, seed: int = 0) -> dict[str, int]:
    """Random faults against four restarting processes under load: every call ends, in time, in a value or an error
    that names the rank; afterwards no process, descriptor or socket file is left over."""
    rng = random.Random(seed)
    runtime.shutdown()
    runtime.configure(limits=Limits(frame_bytes=1 << 20, credit_messages=64, credit_bytes=1 << 20))
    _use_zero_copy()
    this_node()
    before = open_descriptors()
    failures: queue.SimpleQueue[MeshFailure] = queue.SimpleQueue()
    policy = RestartPolicy(num_restarts=10 * num_rounds, backoff_s=0.05, max_backoff_s=0.05)
    procs = this_host().spawn_procs(
        per_host={"procs": 4}, name="chaos", restart=policy, on_failure=failures.put, frozen_after_s=1.0
    )
    echo = procs.spawn("echo", Echo)
    echo.ping.call(0).get(timeout=WAIT_S)
    counts = {"values": 0, "errors": 0}
    for number in range(num_rounds):
        _fault(rng, echo, procs)
        _settle(rng, echo, counts)
        if number % 4 == 3:
            _await_all(echo)
    _await_all(echo)
    procs.stop().get(timeout=WAIT_S)
    left = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("vtriune chaos")]
    assert not left, f"processes left: {left}"
    files = [path.name for path in Path(this_node().folder).iterdir() if path.name != "root"]
    assert not files, f"files left: {files}"
    runtime.shutdown()
    runtime.configure()
    this_node()
    after = open_descriptors()
    assert len(after) <= len(before), f"descriptors before {before}, after {after}"
    return {**counts, "rounds": num_rounds, "restarts": failures.qsize()}


def _use_zero_copy() -> None:
    """Have pyzmq start the context it keeps for zero-copy sends, once per process, before descriptors are counted."""
    procs = this_host().spawn_procs(name="first")
    procs.spawn("echo", Echo).sink.call_one(bytes(1 << 17)).get(timeout=WAIT_S)
    procs.stop().get(timeout=WAIT_S)
    limits = this_node().limits
    runtime.shutdown()
    runtime.configure(limits=limits)


def _fault(rng: random.Random, echo: Echo, procs: runtime.ProcMesh) -> None:
    rank = rng.randrange(4)
    victim = procs.peers[rank]
    kind = rng.choice(["kill", "stop", "drop", "slow", "oversized", "stop and continue"])
    try:
        if kind == "kill":
            os.kill(victim.pid, signal.SIGKILL)
        elif kind == "stop":
            os.kill(victim.pid, signal.SIGSTOP)
        elif kind == "stop and continue":
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(victim.pid, signal.SIGCONT)
        elif kind == "drop":
            with this_node().reactor.lock:
                this_node().link(victim)._connection._lost(is_rejected=False)
        elif kind == "slow":
            for _ in range(5):
                echo.slice(procs=rank).block.broadcast(0.02)
        else:
            try:
                echo.slice(procs=rank).sink.call_one(b"x" * (2 << 20))
            except MessageRefused:
                return
            raise AssertionError("an oversized message was accepted")
    except ProcessLookupError:
        # The victim of an earlier round is just being replaced.
        return


def _settle(rng: random.Random, echo: Echo, counts: dict[str, int]) -> None:
    """A burst of calls to all ranks; each must end within its deadline, give or take a second."""
    start = time.monotonic()
    futures = []
    for i in range(40):
        one = echo.slice(procs=i % 4)
        try:
            futures.append(
                one.sink.within(DEADLINE_S).call_one(b"x" * rng.randrange(100_000))
                if i % 3 == 0
                else one.ping.within(DEADLINE_S).call_one(i)
            )
        except EXPECTED as error:
            if "chaos rank" not in str(error):
                raise AssertionError(f"an error that names no rank: {error}") from error
            counts["errors"] += 1
    for future in futures:
        error = future.exception(timeout=WAIT_S)
        assert error is None or (isinstance(error, EXPECTED) and "chaos rank" in str(error)), error
        counts["values" if error is None else "errors"] += 1
    assert time.monotonic() - start < 2 * DEADLINE_S + 2.0, "calls outlived their deadlines"


def _await_all(echo: Echo) -> None:
    """All ranks answer again."""
    end = time.monotonic() + WAIT_S
    while (error := echo.ping.within(DEADLINE_S).call(1).exception(timeout=WAIT_S)) is not None:
        assert time.monotonic() < end, error
        time.sleep(0.2)


def garbage(num_frames: int, settle_s: float = 0.0, seed: int = 0) -> dict[str, float]:
    """Random and mutated frames from strangers and from a peer that said Hello: nothing crashes, memory stays bounded,
    calls of others go on.

    Calls of actors that nobody has spawned yet are held for five seconds, up to the peer's credit. Growth is from one
    moment without them to another: after a quarter of the frames and after all, `settle_s` later each.
    """
    rng = random.Random(seed)
    procs = this_host().spawn_procs(name="target")
    echo = procs.spawn("echo", Echo)
    context = zmq.Context()
    sockets = []
    for index in range(2):
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.set_hwm(1000)
        socket.connect(procs.peers[0].address)
        if index:
            me = PeerRef("fuzz", "ipc://nowhere", "fuzz", 0, "here", os.getpid())
            socket.send(wire.encode(Hello(wire.PROTOCOL, me, 1)))
        sockets.append(socket)
    call = wire.encode(Call(1, echo._actor_id, "ping", wire.msgspec.Raw(b"\x91\x01"), 1))  # type: ignore[attr-defined]
    before = 0
    for number in range(num_frames):
        if number == num_frames // 4:
            before = _settled_bytes(echo, settle_s)
        socket = sockets[number % 2]
        socket.send_multipart(_frames(rng, call, number))
        while socket.poll(0):
            socket.recv_multipart()
        if number % 50_000 == 0:
            assert echo.ping.call_one(number).get(timeout=WAIT_S) == number
    assert echo.ping.call_one(7).get(timeout=WAIT_S) == 7
    after = _settled_bytes(echo, settle_s)
    context.destroy(linger=0)
    procs.stop().get(timeout=WAIT_S)
    return {"frames": num_frames, "target_growth_MB": (after - before) / 1e6}


def _settled_bytes(echo: Echo, settle_s: float) -> int:
    time.sleep(settle_s)
    return echo.rss_bytes.call_one().get(timeout=WAIT_S)


def _frames(rng: random.Random, call: bytes, number: int) -> list[bytes]:
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.randbytes(rng.randrange(64))]
    mutated = bytearray(call)
    for _ in range(rng.randrange(1, 4)):
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    if kind == 1:
        return [bytes(mutated)]
    if kind == 2:
        return [bytes(mutated[: rng.randrange(len(mutated))]), rng.randbytes(8)]
    valid = Call(number + 2, "no such actor", "ping", wire.msgspec.Raw(rng.randbytes(3)), 1)
    return [wire.encode(valid), *[b"x"] * rng.randrange(3)]


def run(num_calls: int, num_rounds: int, num_frames: int) -> dict[str, Any]:
    """All of it, at the given sizes."""
    results: dict[str, Any] = {}
    for name, action in (
        ("memory", lambda: memory(num_calls)),
        ("chaos", lambda: chaos(num_rounds)),
        ("garbage", lambda: garbage(num_frames, settle_s=6.0)),
    ):
        start = time.monotonic()
        results[name] = {**action(), "seconds": time.monotonic() - start}
    return results
