"""The nursery of the pool's workers, and the workers: `python -m verifiers.worker --fd N`, started by verifiers.nursery
only.

The nursery imports what verifiers need (sympy takes seconds), checks it on known answers, and from then on forks: a
fresh worker takes milliseconds. It scores nothing and so cannot be poisoned. It dies with the pool, its workers with it
(PR_SET_PDEATHSIG); orphans of a worker become its children (PR_SET_CHILD_SUBREAPER) and end with the worker.

A worker scores one job at a time in its main thread and knows no deadline: it is killed. Its address space and the
files it may write are capped, and it writes to its socket from its first process only, so that code which forks inside
a verifier cannot answer twice.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
from typing import NoReturn

import msgspec

from verifiers.registry import Context, GoldError, SpecError, Task, find, params_of
from verifiers.scoring import configure
from verifiers.types import RewardOptions, RewardSpec
from verifiers.wire import Done, End, Job, Result, Setup, WireError, encode, receive_blocking, receive_with_files

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_FILE_BYTES = 16 * 1024 * 1024
EXIT_OUT_OF_MEMORY = 86
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
    context = Context(options.for_evaluation(), 1.0) if job.progress is None else Context(options, job.progress)
    implementation = find(job.spec.verifier)
    params = params_of(job.spec, implementation)
    outcome = implementation.score_batch([Task(job.response, job.spec.gold, params, context)])[0]
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


class Nursery:
    """The forking side. Its children are workers, and orphans of workers."""

    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self._control, self._setup = control, setup
        self._pids: set[int] = set()

    def run(self) -> int:
        """Follow orders until the pool hangs up; the exit status."""
        gc.collect()
        gc.freeze()
        self._control.sendall(encode(Done(os.getpid())))
        while True:
            order, files = receive_with_files(self._control, 2)
            if order is None:
                return 0
            done = self._end(order.pid) if isinstance(order, End) else self._spawn(files)
            self._control.sendall(encode(done))

    def _spawn(self, files: list[int]) -> Done:
        nursery_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(files, nursery_pid)
        for file in files:
            os.close(file)
        self._pids.add(pid)
        return Done(pid)

    def _become_worker(self, files: list[int], nursery_pid: int) -> NoReturn:
        die_with_parent(nursery_pid)
        os.setsid()
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

    def _end(self, pid: int) -> Done:
        """Kill a worker's session, then whatever else has become this process's child, and collect them all."""
        if pid not in self._pids:
            return Done(pid)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        status = None if ended is None else ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        # The session is there as long as its leader is not collected, unless the fork has not come to setsid yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._kill(pid)
        self._pids.discard(pid)
        while orphans := _children() - self._pids:
            for orphan in orphans:
                self._kill(orphan)
        return Done(pid, status)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as listed:
        return {int(pid) for pid in listed.read().split()}


def serve(control: socket.socket, parent_pid: int) -> int:
    """The nursery's life; the exit status."""
    die_with_parent(parent_pid)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    setup = receive_blocking(control, Setup)
    if setup is None:
        return 0
    setup = msgspec.structs.replace(setup, options=msgspec.structs.replace(setup.options, deadline_s=NO_DEADLINE_S))
    configure(setup.options)
    warm_up(setup)
    return Nursery(control, setup).run()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="The nursery of verifiers.pool; not to be started by hand.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the pool")
    parser.add_argument("--parent", type=int, required=True, help="process id of the pool")
    arguments = parser.parse_args()
    with socket.socket(fileno=arguments.fd) as control, contextlib.suppress(BrokenPipeError, WireError):
        return serve(control, arguments.parent)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
