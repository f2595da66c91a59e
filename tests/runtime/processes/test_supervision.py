"""Death, freezing, restart and shutdown of processes: noticed at once, told once, to whom it concerns."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.runtime.actors import Echo, Group, Owner, Relay
from vtriune.runtime import (
    ConnectionLost,
    DeadlineExceeded,
    MeshFailure,
    ProgressWatchdog,
    RestartPolicy,
    Stall,
    steps,
    this_host,
)
from vtriune.runtime.node import this_node
from vtriune.transport import connection
from vtriune.transport.wire import Back

WAIT_S = 30.0
ROOT = Path(__file__).parents[3]


def eventually(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.02)


def test_kill_9_fails_pending_and_later_calls_at_once_naming_the_rank() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(per_host={"procs": 2}, name="victims", on_failure=failures.put)
    echo = procs.spawn("echo", Echo)
    pid = echo.slice(procs=1).where.call_one().get(timeout=WAIT_S)[2]
    pending = echo.slice(procs=1).nap.call_one(600.0)
    start = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(MeshFailure, match=rf"victims rank 1 \(host .*, pid {pid}\) was killed by SIGKILL"):
        pending.get(timeout=WAIT_S)
    assert time.perf_counter() - start < 2.0
    with pytest.raises(MeshFailure, match="victims rank 1"):
        echo.ping.call(1).get(timeout=WAIT_S)
    assert echo.ping.choose(5).get(timeout=WAIT_S) == 5
    failure = failures.get(timeout=WAIT_S)
    assert (failure.mesh_name, failure.rank, failure.pid) == ("victims", 1, pid)
    assert (failure.cause, failure.signal, failure.exit_code) == ("signal", signal.SIGKILL, None)
    procs.stop().get(timeout=WAIT_S)
    assert failures.empty()


def test_an_exit_reports_its_code_and_last_log_lines(tmp_path: Path) -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="leaver", log_folder=tmp_path, on_failure=failures.put)
    echo = procs.spawn("echo", Echo)
    with pytest.raises(MeshFailure, match="ended with exit code 7"):
        echo.leave.call_one(7).get(timeout=WAIT_S)
    failure = failures.get(timeout=WAIT_S)
    assert failure.exit_code == 7
    assert failure.log_tail[-1] == "last words"
    assert "last words" in failure.report()
    assert (tmp_path / "leaver-0.log").read_text().endswith("last words\n")
    procs.stop().get(timeout=WAIT_S)


SENT_TO_ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def test_signals_that_end_a_job_are_left_to_the_root_from_a_workers_first_moment_on() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    ours, signalled, is_up = psutil.Process(), set[int](), threading.Event()

    def signal_the_newborn() -> None:
        while not is_up.is_set():
            for child in ours.children():
                if child.pid not in known:
                    signalled.add(child.pid)
                    for number in SENT_TO_ALL:
                        os.kill(child.pid, number)

    this_host().spawn_procs(name="first").stop().get(timeout=WAIT_S)
    known = {child.pid for child in ours.children()}
    sender = threading.Thread(target=signal_the_newborn)
    sender.start()
    try:
        procs = this_host().spawn_procs(name="deaf", on_failure=failures.put)
    finally:
        is_up.set()
        sender.join()
    echo = procs.spawn("echo", Echo)
    pid = echo.where.call_one().get(timeout=WAIT_S)[2]
    assert signalled == {pid}
    for number in SENT_TO_ALL:
        os.kill(pid, number)
    assert echo.ping.call_one(5).get(timeout=WAIT_S) == 5
    procs.stop().get(timeout=WAIT_S)
    assert failures.empty()


def test_a_log_is_utf_8_whatever_the_terminal_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }.items():
        monkeypatch.setenv(name, value)
    procs = this_host().spawn_procs(name="teller", log_folder=tmp_path)
    echo = procs.spawn("echo", Echo)
    assert echo.say.call_one("Löwe").get(timeout=WAIT_S) == "utf-8"
    procs.stop().get(timeout=WAIT_S)
    assert (tmp_path / "teller-0.log").read_text(encoding="utf-8").count("Löwe") == 2


def test_a_stopped_process_is_told_apart_from_a_dead_one() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="frozen", on_failure=failures.put, frozen_after_s=1.0)
    echo = procs.spawn("echo", Echo)
    pid = echo.where.call_one().get(timeout=WAIT_S)[2]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(MeshFailure, match=r"frozen rank 0 .* is frozen: stopped by a signal"):
        echo.ping.call_one(1).get(timeout=WAIT_S)
    assert failures.get(timeout=WAIT_S).cause == "frozen"
    assert not psutil.pid_exists(pid)
    procs.stop().get(timeout=WAIT_S)


def test_a_process_whose_heartbeat_falls_silent_is_given_up_even_where_its_state_cannot_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(connection, "SILENCE_S", 0.4)
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="silent", on_failure=failures.put, frozen_after_s=600.0)
    echo = procs.spawn("echo", Echo)
    pid = echo.where.call_one().get(timeout=WAIT_S)[2]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(MeshFailure, match=r"silent rank 0 .* cannot be reached: its socket accepts no connection"):
        echo.ping.call_one(1).get(timeout=WAIT_S)
    assert failures.get(timeout=WAIT_S).cause == "frozen"
    procs.stop().get(timeout=WAIT_S)


def test_a_busy_process_is_not_taken_for_a_frozen_one() -> None:
    procs = this_host().spawn_procs(name="busy", on_failure=print, frozen_after_s=0.5)
    echo = procs.spawn("echo", Echo)
    assert echo.hog.call_one(1.5).get(timeout=WAIT_S) == "let go"
    procs.stop().get(timeout=WAIT_S)


def test_a_process_that_cannot_start_is_an_error_of_spawn_procs(tmp_path: Path) -> None:
    with pytest.raises(MeshFailure, match="did not start"):
        this_host().spawn_procs(name="stillborn", env={"PYTHONHOME": "/nowhere"}, log_folder=tmp_path)


def test_an_owner_actor_supervises_what_it_spawned_and_handles_it() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="owners", on_failure=failures.put)
    owner = procs.spawn("owner", Owner, True)
    assert owner.greet.call_one("x").get(timeout=WAIT_S) == "grand x"
    assert "grandchild rank 0" in owner.kill_child.call_one().get(timeout=WAIT_S)
    eventually(lambda: len(owner.failures.call_one().get(timeout=WAIT_S)) == 1, "__supervise__ is called")
    assert "was killed by SIGKILL" in owner.failures.call_one().get(timeout=WAIT_S)[0]
    procs.stop().get(timeout=WAIT_S)
    assert failures.empty()


def test_what_an_owner_does_not_handle_passes_to_its_own_owner() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="owners", on_failure=failures.put)
    owner = procs.spawn("owner", Owner, False)
    owner.kill_child.call_one().get(timeout=WAIT_S)
    failure = failures.get(timeout=WAIT_S)
    assert (failure.mesh_name, failure.cause) == ("grandchild", "signal")
    procs.stop().get(timeout=WAIT_S)


def test_an_exception_in_a_broadcast_reaches_the_owner() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="casters", on_failure=failures.put)
    echo = procs.spawn("echo", Echo)
    echo.fail.broadcast("nobody listens")
    failure = failures.get(timeout=WAIT_S)
    assert failure.cause == "exception"
    assert "ValueError: nobody listens" in str(failure)
    assert "raise ValueError(text)" in failure.report()
    assert echo.ping.call_one(1).get(timeout=WAIT_S) == 1
    procs.stop().get(timeout=WAIT_S)


def test_a_broadcast_that_does_not_fit_reaches_the_owner_with_sender_endpoint_and_field() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    procs = this_host().spawn_procs(name="picky", on_failure=failures.put)
    echo = procs.spawn("echo", Echo)
    echo.mirror.broadcast(Group("g", [], np.zeros(2, np.float32), 5))  # type: ignore[arg-type]
    assert re.search(
        r"echo\.mirror: .*MessageRefused: .*sent by root rank 0 .*: group\.note: Expected `str \| null`, got `int`",
        str(failures.get(timeout=WAIT_S)),
    )
    assert echo.ping.call_one(1).get(timeout=WAIT_S) == 1
    procs.stop().get(timeout=WAIT_S)


def test_a_mesh_that_asks_for_it_is_restarted_and_references_to_it_stay_valid() -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    policy = RestartPolicy(num_restarts=1, backoff_s=0.1)
    phoenix = this_host().spawn_procs(per_host={"procs": 2}, name="phoenix", restart=policy, on_failure=failures.put)
    others = this_host().spawn_procs(name="others", on_failure=print)
    echo = phoenix.spawn("echo", Echo, "again")
    relay = others.spawn("relay", Relay, echo.slice(procs=0))
    assert relay.ask.call_one("a").get(timeout=WAIT_S) == "again a"
    pid = phoenix.peers[0].pid
    os.kill(pid, signal.SIGKILL)
    first = failures.get(timeout=WAIT_S)
    assert first.is_restarting
    assert "is being restarted" in str(first)

    def asks() -> bool:
        try:
            return relay.ask.call_one("b").get(timeout=WAIT_S) == "again b"
        except Exception as error:
            assert "phoenix rank 0" in str(error)  # noqa: PT017 - until it is back, every call says who is away
            return False

    eventually(asks, "the reference in another actor works again")
    assert echo.where.call().get(timeout=WAIT_S).rank_value(0)[2] == phoenix.peers[0].pid != pid
    assert failures.empty()
    os.kill(phoenix.peers[0].pid, signal.SIGKILL)
    assert not failures.get(timeout=WAIT_S).is_restarting
    for procs in (phoenix, others):
        procs.stop().get(timeout=WAIT_S)


def test_a_reference_from_before_a_restart_works_in_a_process_that_starts_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: queue.Queue[MeshFailure] = queue.Queue()
    policy = RestartPolicy(num_restarts=1, backoff_s=0.1)
    phoenix = this_host().spawn_procs(name="phoenix", restart=policy, on_failure=failures.put)
    echo = phoenix.spawn("echo", Echo, "again")
    assert echo.greet.call_one("a").get(timeout=WAIT_S) == "again a"
    pid = phoenix.peers[0].pid
    os.kill(pid, signal.SIGKILL)
    assert failures.get(timeout=WAIT_S).is_restarting
    eventually(lambda: phoenix.peers[0].pid != pid, "it runs again")
    # As if the reference had been written just before: it names where the dead process was.
    monkeypatch.setattr(this_node(), "whereabouts", lambda peer: peer)
    late = this_host().spawn_procs(name="late", on_failure=print)
    relay = late.spawn("relay", Relay, echo)
    assert relay.ask.call_one("b").get(timeout=WAIT_S) == "again b"
    for procs in (phoenix, late):
        procs.stop().get(timeout=WAIT_S)


def test_a_peer_given_up_for_good_is_reached_again_once_it_is_said_to_be_back() -> None:
    procs = this_host().spawn_procs(name="away", on_failure=print)
    echo = procs.spawn("echo", Echo)
    assert echo.greet.call_one("a").get(timeout=WAIT_S) == "hello a"
    link = this_node().link(procs.peers[0])
    # As in a process that is not its owner, and tried for longer than a restart took.
    link._on_failure = None
    with this_node().reactor.lock:
        link._is_open = False
        link._unreachable()
    with pytest.raises(MeshFailure, match="accepts no connection"):
        echo.greet.call_one("b").get(timeout=WAIT_S)
    this_node().on_back(Back(procs.peers[0]))

    def greets() -> bool:
        try:
            return echo.greet.call_one("c").get(timeout=WAIT_S) == "hello c"
        except MeshFailure:
            return False

    eventually(greets, "it is reached again")
    procs.stop().get(timeout=WAIT_S)


def test_a_dropped_connection_fails_calls_in_flight_and_repeats_no_broadcast() -> None:
    procs = this_host().spawn_procs(name="dropped", on_failure=print)
    echo = procs.spawn("echo", Echo)
    echo.ping.call_one(0).get(timeout=WAIT_S)
    link = this_node().link(procs.peers[0])
    expected: list[int] = []
    for round_ in range(5):
        pending = echo.nap.call_one(600.0)
        for mark in range(round_ * 100, round_ * 100 + 100):
            echo.note.broadcast(mark)
            expected.append(mark)
        with this_node().reactor.lock:
            link._connection._lost(is_rejected=False)
        with pytest.raises(ConnectionLost, match=r"dropped rank 0 .* broke during echo\.nap"):
            pending.get(timeout=WAIT_S)
    assert echo.marks.call_one().get(timeout=WAIT_S) == expected
    procs.stop().get(timeout=WAIT_S)


def test_a_deadline_holds_while_the_callee_is_stopped() -> None:
    procs = this_host().spawn_procs(name="late", on_failure=print)
    echo = procs.spawn("echo", Echo)
    pid = echo.where.call_one().get(timeout=WAIT_S)[2]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded, match=r"echo\.ping took over 0\.5 s at late rank 0"):
        echo.ping.within(0.5).call_one(1).get(timeout=WAIT_S)
    os.kill(pid, signal.SIGCONT)
    assert echo.ping.call_one(2).get(timeout=WAIT_S) == 2
    procs.stop().get(timeout=WAIT_S)


def test_a_stall_report_shows_the_stacks_of_every_process_and_fills_their_logs(tmp_path: Path) -> None:
    stalls: queue.Queue[Stall] = queue.Queue()
    procs = this_host().spawn_procs(per_host={"procs": 2}, name="stuck", log_folder=tmp_path, on_failure=print)
    echo = procs.spawn("echo", Echo)
    blocked = echo.slice(procs=1).block.call_one(60.0)
    echo.slice(procs=0).ping.call_one(1).get(timeout=WAIT_S)
    dog = ProgressWatchdog(0.5, stalls.put)
    report = stalls.get(timeout=WAIT_S).report()
    dog.close()
    assert "== root" in report
    assert "== vtriune stuck-0" in report
    assert "== vtriune stuck-1" in report
    assert "in block" in report
    assert "in block" in (tmp_path / "stuck-1.log").read_text()
    assert "actor-echo" in procs.stacks().get(timeout=WAIT_S).rank_value(0)
    blocked.cancel()
    procs.stop().get(timeout=WAIT_S)


def test_steps_told_within_one_endpoint_are_progress_and_the_end_of_them_a_stall_that_names_the_last() -> None:
    stalls: queue.Queue[Stall] = queue.Queue()
    procs = this_host().spawn_procs(per_host={"procs": 2}, name="toilers", on_failure=print)
    echo = procs.spawn("echo", Echo)
    dog = ProgressWatchdog(2.0, stalls.put)
    # Longer than `stall_s`; each step far shorter, and the last one hangs.
    toiling = echo.slice(procs=1).toil.call_one(35, 0.1)
    toiling.get(timeout=WAIT_S)
    assert stalls.empty()
    hanging = echo.slice(procs=1).toil.call_one(1, 60.0)
    started = time.monotonic()
    while not stalls.qsize():
        # A process that answers gets nothing done by that.
        assert echo.slice(procs=0).ping.call_one(1).get(timeout=WAIT_S) == 1
        assert time.monotonic() - started < WAIT_S
        time.sleep(0.05)
    assert time.monotonic() - started >= 2.0
    report = stalls.get().report()
    dog.close()
    head = report.partition("Where every process stands")[0]
    assert re.search(r"No progress for [23] s", head)
    assert re.search(r"toilers-1 toil: step 1 of 1, [23] s ago", head)
    assert "ping" not in head
    hanging.cancel()
    procs.stop().get(timeout=WAIT_S)


def test_a_step_with_a_deadline_of_its_own_is_no_stall_before_and_one_that_died_excuses_nobody() -> None:
    stalls: queue.Queue[Stall] = queue.Queue()
    procs = this_host().spawn_procs(name="builders", on_failure=print)
    echo = procs.spawn("echo", Echo)
    # A process tells of its steps once a second, and later on a busy machine.
    dog = ProgressWatchdog(4.0, stalls.put)
    building = echo.toil.call_one(1, 60.0, 60.0)
    eventually(lambda: ("builders-0", "toil") in steps.latest(), "the step of the call")
    time.sleep(5.5)
    assert stalls.empty()
    os.kill(procs.peers[0].pid, signal.SIGKILL)
    assert "builders-0 process: has ended" in stalls.get(timeout=10.0).report()
    dog.close()
    with pytest.raises(MeshFailure):
        building.get(timeout=WAIT_S)
    procs.stop().get(timeout=WAIT_S)


def test_steps_of_processes_that_an_actor_spawned_reach_the_root() -> None:
    procs = this_host().spawn_procs(name="parents", on_failure=print)
    procs.spawn("owner", Owner, True)
    eventually(lambda: ("parents-0/grandchild-0", "process") in steps.latest(), "the grandchild's step")
    procs.stop().get(timeout=WAIT_S)


SCRIPT = """
    import os, signal, sys, time
    from vtriune.runtime import Actor, endpoint, this_host
    from tests.runtime.actors import Owner
    from vtriune.runtime.node import this_node

    class Here(Actor):
        @endpoint
        async def pid(self) -> int:
            return os.getpid()

    if __name__ == "__main__":
        procs = this_host().spawn_procs(name="mine")
        owner = procs.spawn("owner", Owner, False)
        here = procs.spawn("here", Here)
        pids = [here.pid.call_one().get(), owner.child_pid.call_one().get()]
        print(this_node().folder, *pids, flush=True)
        {then}
"""


def run_script(tmp_path: Path, then: str) -> tuple[subprocess.Popen[str], Path, list[int]]:
    script = tmp_path / "main.py"
    script.write_text(textwrap.dedent(SCRIPT).format(then=then))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert len(line) == 3, process.communicate()[1]
    return process, Path(line[0]), [int(pid) for pid in line[1:]]


def assert_nothing_left(folder: Path, pids: list[int]) -> None:
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), "children have ended")
    eventually(lambda: not folder.exists(), "the socket folder is gone")


def test_kill_9_of_the_root_ends_children_and_grandchildren_and_leaves_no_socket(tmp_path: Path) -> None:
    process, folder, pids = run_script(tmp_path, "time.sleep(600)")
    assert folder.stat().st_mode & 0o777 == 0o700
    process.kill()
    process.communicate()
    assert_nothing_left(folder, pids)


def test_a_script_that_just_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    process, folder, pids = run_script(tmp_path, "sys.exit(3)")
    assert process.wait(timeout=WAIT_S) == 3
    process.communicate()
    assert_nothing_left(folder, pids)


def test_an_unhandled_failure_ends_the_run_with_one_report(tmp_path: Path) -> None:
    process, folder, pids = run_script(tmp_path, "os.kill(pids[0], signal.SIGKILL); time.sleep(600)")
    assert process.wait(timeout=WAIT_S) == 1
    errors = process.communicate()[1]
    assert errors.count("MeshFailure: mine rank 0") == 1, errors
    assert "was killed by SIGKILL" in errors
    assert_nothing_left(folder, pids)


@pytest.mark.parametrize("closing", ["1 / 0", "time.sleep(600)"], ids=["raises", "hangs"])
def test_a_run_that_nobody_saves_ends_though_closing_it_raises_or_hangs(tmp_path: Path, closing: str) -> None:
    then = f"this_node().close = lambda: {closing}; os.kill(pids[0], signal.SIGKILL); time.sleep(600)"
    process, folder, pids = run_script(tmp_path, then)
    eventually(lambda: process.poll() is not None, "the root has ended")
    assert process.returncode == 1
    assert "MeshFailure: mine rank 0" in process.communicate()[1]
    assert_nothing_left(folder, pids)


def test_closing_twice_and_starting_anew_works() -> None:
    before = set(psutil.Process().children(recursive=True))
    procs = this_host().spawn_procs(name="once", on_failure=print)
    assert procs.spawn("echo", Echo).ping.call_one(1).get(timeout=WAIT_S) == 1
    procs.stop().get(timeout=WAIT_S)
    procs.stop().get(timeout=WAIT_S)
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert [child for child in left if "reaper" not in " ".join(child.cmdline())] == []
