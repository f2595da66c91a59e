"""The process that forks the pool's workers, and the workers. Started by `verifiers.pool.fork_server` only.

The fork server imports what verifiers need (sympy takes seconds), checks it on known answers, and from then on forks: a fresh worker
takes milliseconds. It scores nothing and so cannot be poisoned. It dies with the pool, its workers with it (PR_SET_PDEATHSIG);
orphans of a worker become its children (PR_SET_CHILD_SUBREAPER) and end with the worker.

A worker scores one job at a time in its main thread and knows no deadline: it is killed. Its address space and the files it may
write are capped, and it writes to its socket from its first process only: code which forks in a verifier cannot answer twice.
"""

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import time
from typing import NoReturn

import msgspec

from verifiers.pool.frames import (
    Ack,
    End,
    FrameError,
    Job,
    Result,
    Setup,
    encode,
    receive_blocking,
    receive_with_files,
)
from verifiers.registry import Context, GoldError, SpecError, Task, find, params_of
from verifiers.scoring import configure
from verifiers.types import RewardOptions, RewardSpec

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_FILE_BYTES = 16 * 1024 * 1024
EXIT_OUT_OF_MEMORY = 86
# Whoever ends a job sends them to all its processes; when these end is for the pool to say.
LEFT_TO_POOL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A process that has closed its socket is gone this soon, or does not mean to go.
EXIT_S = 0.5
# A timer inside the worker would only race its owner's deadline.
NO_DEADLINE_S = 86_400.0
# (gold, right answer, wrong answer): none of them is plain, so the whole path runs.
SELF_TEST = {"mathverify": (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{2}{4}}", r"\boxed{\frac{2}{3}}")}


class SelfTestError(RuntimeError):
    """A verifier did not tell a right answer from a wrong one before the first job."""


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when its parent ends; exits where that has happened already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def leave_signals_to_pool() -> None:
    """Have `LEFT_TO_POOL` do nothing here. By a handler, which ends at an exec: what verifiers start can be terminated as ever."""
    for number in LEFT_TO_POOL:
        signal.signal(number, lambda *_: None)


def give_signals_to_forks() -> None:
    """In a fork that a verifier makes, they end the process again: those, too, that come before it has run a first instruction."""

    def take() -> None:
        for number in LEFT_TO_POOL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_POOL)

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_POOL),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_POOL),
        after_in_child=take,
    )


def warm_up(setup: Setup) -> None:
    """Import what jobs will need and check it on known answers; SelfTestError where one is judged wrong."""
    for name in setup.preload:
        find(name)
        if name in SELF_TEST:
            gold, right, wrong = SELF_TEST[name]
            for response, expected in ((right, 1.0), (wrong, 0.0)):
                result = answer(Job(0, response, RewardSpec(ground_truth=gold, verifier=name), 1.0), setup.options)
                if result.outcome is None or result.outcome.accuracy != expected:
                    raise SelfTestError(f"{name} judged {response!r} against {gold!r} as {result}, not {expected}")


def answer(job: Job, options: RewardOptions) -> Result:
    """Score one job. MemoryError is let through: what is left of the process is not to be trusted."""
    implementation = find(job.spec.verifier)
    params = params_of(job.spec, implementation)
    task = Task(job.response, job.spec.gold, params, Context(options, job.progress, job.image_sizes))
    outcome = implementation.score_batch([task])[0]
    if isinstance(outcome, MemoryError):
        raise outcome
    if isinstance(outcome, SpecError | GoldError):
        return Result(job.number, None, str(outcome)[:2_000], is_bad_row=True)
    if isinstance(outcome, Exception):
        return Result(job.number, None, f"{type(outcome).__name__}: {outcome}"[:2_000])
    return Result(job.number, outcome)


def has_children() -> bool:
    """Whether this process has children, running or not collected."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def work(connection: socket.socket, options: RewardOptions) -> int:
    """A worker's life: answer jobs until the pool hangs up; the exit status."""
    own_pid = os.getpid()
    while True:
        job = receive_blocking(connection, Job)
        if job is None:
            return 0
        try:
            result = answer(job, options)
        except MemoryError:
            return EXIT_OUT_OF_MEMORY
        if os.getpid() != own_pid:
            os._exit(0)
        # A job that left processes behind: the pool ends them with this worker.
        connection.sendall(encode(msgspec.structs.replace(result, is_spent=True) if has_children() else result))


class Forker:
    """Forks and ends workers as the pool orders. Its children are workers, and orphans of workers."""

    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self._control, self._setup = control, setup
        self._pids: set[int] = set()

    def run(self) -> int:
        """Follow orders until the pool hangs up; the exit status."""
        gc.collect()
        gc.freeze()
        self._control.sendall(encode(Ack(os.getpid())))
        while True:
            order, files = receive_with_files(self._control, 2)
            if order is None:
                return 0
            done = self._end(order) if isinstance(order, End) else self._spawn(files)
            self._control.sendall(encode(done))

    def _spawn(self, files: list[int]) -> Ack:
        own_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(files, own_pid)
        for file in files:
            os.close(file)
        self._pids.add(pid)
        return Ack(pid)

    def _become_worker(self, files: list[int], parent_pid: int) -> NoReturn:
        die_with_parent(parent_pid)
        os.setsid()
        give_signals_to_forks()
        self._control.close()
        os.dup2(files[1], 2)
        os.close(files[1])
        limit = self._setup.memory_limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with socket.socket(fileno=files[0]) as connection:
            status = work(connection, self._setup.options)
        os._exit(status)

    def _end(self, order: End) -> Ack:
        """Kill a worker's session, then whatever else has become this process's child, and collect them all."""
        pid, until = order.pid, time.monotonic() + (EXIT_S if order.has_hung_up else 0.0)
        if pid not in self._pids:
            return Ack(pid)
        while (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
            if time.monotonic() >= until:
                break
            time.sleep(0.001)
        status = None if ended is None else ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        # The session is there as long as its leader is not collected, unless the fork has not come to setsid yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._kill(pid)
        self._pids.discard(pid)
        while orphans := _children() - self._pids:
            for orphan in orphans:
                self._kill(orphan)
        return Ack(pid, status)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as listed:
        return {int(pid) for pid in listed.read().split()}


def serve(control: socket.socket, parent_pid: int) -> int:
    """The fork server's life; the exit status."""
    leave_signals_to_pool()
    die_with_parent(parent_pid)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    setup = receive_blocking(control, Setup)
    if setup is None:
        return 0
    setup = msgspec.structs.replace(setup, options=msgspec.structs.replace(setup.options, deadline_s=NO_DEADLINE_S))
    configure(setup.options)
    warm_up(setup)
    return Forker(control, setup).run()


def main(fd: str, parent_pid: str) -> int:
    """What `python -m verifiers.worker` does with the file descriptor of the socket to the pool, and the pool's process id."""
    with socket.socket(fileno=int(fd)) as control, contextlib.suppress(BrokenPipeError, FrameError):
        return serve(control, int(parent_pid))
    return 1
