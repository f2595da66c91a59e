"""The pool's hold on one worker: start it, ask it one thing at a time, kill it.

A worker leads a session of its own, so that ending it ends whatever it forked. Must be created in the thread that runs
the event loop and lives as long as the pool does: the kernel ends a worker when the thread that started it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from typing import IO

from verifiers.wire import Job, Ready, Result, Setup, WireError, encode, receive
from verifiers.worker import EXIT_OUT_OF_MEMORY

SINGLE_THREADED = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
STDERR_TAIL_BYTES = 2_000


class WorkerDied(Exception):
    """The worker ended, or was ended, before it answered; the message says how and repeats its last words."""


class WorkerProcess:
    """One worker: a process, a socket, and the file that catches its standard error."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr
        self._reader = asyncio.StreamReader()
        self._writer: asyncio.StreamWriter | None = None
        self.num_answered = 0

    @classmethod
    async def start(cls, setup: Setup, deadline_s: float) -> WorkerProcess:
        """A worker that has answered its self-test; WorkerDied where it has not within `deadline_s`."""
        ours, theirs = socket.socketpair()
        # Appending, so that reading its tail here does not move the place where the worker writes.
        stderr = tempfile.TemporaryFile("a+b")  # noqa: SIM115  closed by end()
        command = [sys.executable, "-P", "-m", "verifiers.worker", "--fd", str(theirs.fileno())]
        environment = {**os.environ, **SINGLE_THREADED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            process = subprocess.Popen(  # noqa: ASYNC220  a few milliseconds, and the thread matters (see above)
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        worker = cls(process, stderr)
        try:
            worker._reader, worker._writer = await asyncio.open_unix_connection(sock=ours)
            async with asyncio.timeout(deadline_s):
                await worker._send(setup)
                await receive(worker._reader, Ready)
        except (WireError, OSError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            raise await worker.died(f"did not start within {deadline_s:g} s" if late else str(error)) from error
        except asyncio.CancelledError:
            await worker.end()
            raise
        return worker

    async def _send(self, message: Setup | Job) -> None:
        if self._writer is None:
            raise WireError("the worker is not connected")
        self._writer.write(encode(message))
        await self._writer.drain()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, job: Job) -> Result:
        """Send a job and wait for its result; WorkerDied where the worker ends first. No deadline of its own."""
        try:
            await self._send(job)
            result = await receive(self._reader, Result)
        except (WireError, OSError) as error:
            raise await self.died(str(error)) from error
        if result.number != job.number:
            raise await self.died(f"answered job {result.number} when asked job {job.number}")
        self.num_answered += 1
        return result

    async def died(self, what: str) -> WorkerDied:
        """End the worker and describe its end: its own exit where it has one, else `what`."""
        for _ in range(20):
            status = self._exit_status()
            if status is not None:
                break
            await asyncio.sleep(0.01)
        length = os.fstat(self._stderr.fileno()).st_size
        tail = os.pread(self._stderr.fileno(), STDERR_TAIL_BYTES, max(0, length - STDERR_TAIL_BYTES))
        last_words = tail.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        await self.end()
        end = what if status is None else _describe(status)
        return WorkerDied(f"worker {self.pid} {end}" + (f"; its last words: {last_words}" if last_words else ""))

    def _exit_status(self) -> int | None:
        """The exit status of a worker that ended by itself, negative for a signal. It stays uncollected: its group is
        still ours to end.
        """
        if self._process.returncode is not None:
            return self._process.returncode
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    async def end(self) -> None:
        """Kill the worker and all it started, and collect it. Idempotent; it holds whatever the worker is doing."""
        if self._process.returncode is None:
            # The group's number is ours until its leader is collected. No such group: the worker was not its leader
            # yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._writer is not None:
            self._writer.close()
        self._stderr.close()


def _describe(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    if status == EXIT_OUT_OF_MEMORY:
        return "ran out of memory"
    return f"exited with status {status}"
