"""A worker process of the pool: `python -m verifiers.worker --fd N`, started by verifiers.worker_process and by nothing
else.

It scores one job at a time in its main thread and knows no deadline: its owner kills it. It dies with its owner
(PR_SET_PDEATHSIG), its address space and the files it may write are capped, and it writes to its socket from the
process that was started only, so that code which forks inside a verifier cannot answer twice.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import socket

import msgspec

from verifiers.registry import Context, Implementation, Task, find, params_of
from verifiers.scoring import configure
from verifiers.types import RewardOptions, RewardSpec
from verifiers.wire import Job, Ready, Result, Setup, encode, receive_blocking

PR_SET_PDEATHSIG = 1
MAX_FILE_BYTES = 16 * 1024 * 1024
EXIT_OUT_OF_MEMORY = 86
# A timer inside the worker would only race its owner's deadline.
NO_DEADLINE_S = 86_400.0
# (verifier, gold, right answer, wrong answer): none of them is plain, so the whole path runs.
SELF_TEST = {"mathverify": (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{2}{4}}", r"\boxed{\frac{2}{3}}")}


class SelfTestError(RuntimeError):
    """A verifier did not tell a right answer from a wrong one before the first job."""


def confine(memory_limit_bytes: int, owner_pid: int) -> None:
    """Tie this process to its owner and cap what it may take. Exits where the owner is gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner_pid:
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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
    implementation: Implementation = find(job.spec.verifier)
    params = params_of(job.spec, implementation)
    outcome = implementation.score_batch([Task(job.response, job.spec.gold, params, context)])[0]
    if isinstance(outcome, MemoryError):
        raise outcome
    if isinstance(outcome, Exception):
        return Result(job.number, None, f"{type(outcome).__name__}: {outcome}"[:2_000])
    return Result(job.number, outcome)


def serve(connection: socket.socket) -> int:
    """Answer jobs until the owner hangs up; the exit status."""
    setup = receive_blocking(connection, Setup)
    if setup is None:
        return 0
    own_pid = os.getpid()
    confine(setup.memory_limit_bytes, os.getppid())
    options = msgspec.structs.replace(setup.options, deadline_s=NO_DEADLINE_S)
    configure(options)
    warm_up(msgspec.structs.replace(setup, options=options))
    connection.sendall(encode(Ready(own_pid)))
    while True:
        job = receive_blocking(connection, Job)
        if job is None:
            return 0
        try:
            frame = encode(answer(job, options))
        except MemoryError:
            return EXIT_OUT_OF_MEMORY
        if os.getpid() != own_pid:
            os._exit(0)
        connection.sendall(frame)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A worker of verifiers.pool; not to be started by hand.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the pool")
    with socket.socket(fileno=parser.parse_args().fd) as connection:
        return serve(connection)


if __name__ == "__main__":
    os._exit(main())
