"""A kill for memory is told apart from any other SIGKILL: by the kernel's counters, and for real where that can be done."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runtime.actors import Glutton
from vtriune.runtime import MeshFailure, ProcMesh, this_host
from vtriune.runtime.memory_kills import MemoryKills, count
from vtriune.runtime.node import this_node

WAIT_S = 30.0
PID = 4242


class FakeKernel:
    """The files the kernel would show, under `root`."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroups = root / "cgroup"
        (self.proc / str(PID)).mkdir(parents=True)
        self.count("vmstat", 7, self.proc)
        self.set_state("S")

    def set_state(self, letter: str, flags: int = 0x400000) -> None:
        (self.proc / str(PID) / "stat").write_text(f"{PID} (python (3)) {letter} 1 1 1 0 -1 {flags} 9")

    def place(self, *lines: str) -> None:
        (self.proc / str(PID) / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def count(self, file: str, number: int, base: Path | None = None) -> None:
        path = (base or self.cgroups) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"max 12\noom 9\noom_kill {number}\noom_group_kill 0\n")

    def kills(self) -> MemoryKills:
        kills = MemoryKills(self.proc, self.cgroups)
        kills.watch(PID)
        return kills


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


V1 = ("9:name=systemd:/", "4:cpu,memory:/job/worker", "0::/")
V2 = ("0::/job/worker",)
LAYOUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "version 1": (V1, "memory/job/worker/memory.oom_control"),
    "version 2": (V2, "job/worker/memory.events"),
    "version 1, mounted at the container's cgroup": (V1, "memory/memory.oom_control"),
    "version 2, mounted at the container's cgroup": (V2, "memory.events"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kill_counted_in_the_processes_own_cgroup_is_seen_in_every_layout(kernel: FakeKernel, layout: str) -> None:
    lines, file = LAYOUTS[layout]
    kernel.place(*lines)
    kernel.count(file, 3)
    kills = kernel.kills()
    assert not kills.has_risen(PID, 10.0)
    kernel.count(file, 4)
    assert kills.has_risen(PID, 10.0)


def test_a_kill_in_another_cgroup_is_not_taken_for_ours(kernel: FakeKernel) -> None:
    kernel.place(*V2)
    kernel.count("job/worker/memory.events", 0)
    kernel.count("job/other/memory.events", 0)
    kills = kernel.kills()
    kernel.count("job/other/memory.events", 1)
    kernel.count("vmstat", 8, kernel.proc)
    assert not kills.has_risen(PID, 10.0)


def test_without_a_readable_cgroup_the_machines_counter_decides(kernel: FakeKernel) -> None:
    kernel.place(*V2)
    kills = kernel.kills()
    assert not kills.has_risen(PID, 10.0)
    kernel.count("vmstat", 8, kernel.proc)
    assert kills.has_risen(PID, 10.0)


def test_a_kill_of_long_ago_does_not_count(kernel: FakeKernel) -> None:
    kernel.place(*V2)
    kernel.count("job/worker/memory.events", 0)
    kills = kernel.kills()
    kernel.count("job/worker/memory.events", 1)
    kills.sample()
    time.sleep(0.05)
    assert kills.has_risen(PID, 10.0)
    assert not kills.has_risen(PID, 0.01)


@pytest.mark.parametrize(("state", "flags"), [("Z", 0x40000C), ("R", 0x400004)], ids=["dead", "on its way out"])
def test_a_process_that_moved_is_judged_by_where_it_is_and_a_dead_one_by_where_it_was(
    kernel: FakeKernel, state: str, flags: int
) -> None:
    kernel.place(*V2)
    kernel.count("job/worker/memory.events", 0)
    kernel.count("small/memory.events", 5)
    kernel.count("memory.events", 0)
    kills = kernel.kills()
    kernel.place("0::/small")
    kills.sample()
    assert not kills.has_risen(PID, 10.0)
    kernel.set_state(state, flags)
    kernel.place("0::/")
    kills.sample()
    kernel.count("small/memory.events", 6)
    assert kills.has_risen(PID, 10.0)
    kills.forget(PID)
    assert not kills.has_risen(PID, 10.0)


def test_a_counter_that_cannot_be_read_counts_nothing(tmp_path: Path) -> None:
    assert count(tmp_path / "nowhere") == 0
    (tmp_path / "vmstat").write_text("pgfault 1\n")
    assert count(tmp_path / "vmstat") == 0


# ---- for real


def own_memory_cgroup() -> tuple[Path, str]:
    """This process's memory cgroup and the name of its limit; a path that does not exist where there is none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
    return Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB below our own, gone afterwards."""
    parent, limit = own_memory_cgroup()
    folder = parent / f"vtriune-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"this machine lets us make no memory cgroup: {error}")
    try:
        try:
            (folder / limit).write_text(str(64 << 20))
        except OSError as error:
            pytest.skip(f"this machine lets us limit no memory cgroup: {error}")
        yield folder
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text().strip())
        folder.rmdir()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def glutton_in(folder: Path) -> tuple[ProcMesh, Glutton, int, queue.Queue[MeshFailure]]:
    """A worker that was moved into the cgroup, and seen there."""
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="glutton", on_failure=failures.put)
    glutton = procs.spawn("glutton", Glutton)
    pid = glutton.pid.call_one().get(timeout=WAIT_S)
    (folder / "cgroup.procs").write_text(str(pid))
    this_node().watcher.memory_kills.sample()
    return procs, glutton, pid, failures


def test_the_kernels_kill_for_memory_is_named_so(small_cgroup: Path) -> None:
    procs, glutton, pid, failures = glutton_in(small_cgroup)
    assert glutton.eat.call_one(1 << 20).get(timeout=WAIT_S) == 1 << 20
    with pytest.raises(MeshFailure, match=rf"glutton rank 0 .*pid {pid}.* was killed by SIGKILL \(out of memory\)"):
        glutton.eat.call_one(256 << 20).get(timeout=WAIT_S)
    failure = failures.get(timeout=WAIT_S)
    assert (failure.cause, failure.signal) == ("oom", signal.SIGKILL)
    procs.stop().get(timeout=WAIT_S)


def test_a_kill_by_hand_in_the_same_cgroup_is_not_called_out_of_memory(small_cgroup: Path) -> None:
    procs, _, pid, failures = glutton_in(small_cgroup)
    os.kill(pid, signal.SIGKILL)
    assert failures.get(timeout=WAIT_S).cause == "signal"
    procs.stop().get(timeout=WAIT_S)
