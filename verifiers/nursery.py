"""The pool's hold on its nursery and workers: start the nursery once, have it fork workers, ask a worker one thing, end
it.

Start it in the thread that runs the event loop: the kernel ends the nursery when the thread that started it ends.
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

import msgspec

from verifiers.wire import Done, End, Job, Result, Setup, Spawn, WireError, encode, receive, receive_blocking
from verifiers.worker import EXIT_OUT_OF_MEMORY

SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
START_DEADLINE_S = 120.0
ORDER_DEADLINE_S = 30.0
STDERR_TAIL_BYTES = 2_000
SLOW_NICENESS = 10
LAST_WORDS_S = 2.0


class NurseryDied(Exception):
    """The nursery did not start, or ended, or does not follow orders; the message repeats its last words."""


class WorkerDied(Exception):
    """A worker ended, or was ended, before it answered; the message says how and repeats its last words."""


class Worker:
    """One worker: its process id, its socket, and the file that catches its standard error."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stderr: IO[bytes]) -> None:
        self.pid = pid
        self.reader, self.writer, self.stderr = reader, writer, stderr

    async def ask(self, job: Job) -> Result:
        """Send a job and wait for its result; WireError where the worker hangs up or answers nonsense. No deadline of
        its own.
        """
        self.writer.write(encode(job))
        await self.writer.drain()
        result = await receive(self.reader, Result)
        if result.number != job.number:
            raise WireError(f"answered job {result.number} when asked job {job.number}")
        return result

    def yield_cpu(self) -> None:
        """Let every other worker go first. The process id is this worker's until the nursery is told to end it."""
        os.setpriority(os.PRIO_PROCESS, self.pid, SLOW_NICENESS)


class WorkerNursery:
    """The pool's side of `verifiers.worker`. Orders are given one at a time."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._orders = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._stderr: IO[bytes] | None = None

    async def start(self) -> None:
        """Return when the nursery has imported and tested everything; NurseryDied where it does not."""
        ours, theirs = socket.socketpair()
        self._control, self._stderr = ours, _stderr_file()
        command = [
            sys.executable,
            "-P",
            "-m",
            "verifiers.worker",
            "--fd",
            str(theirs.fileno()),
            "--parent",
            str(os.getpid()),
        ]
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220  takes milliseconds, and the thread matters (see above)
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **SINGLE_THREADED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        await self._order(self._setup, [], START_DEADLINE_S)

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def spawn(self) -> Worker:
        """A fresh worker, in milliseconds."""
        ours, theirs = socket.socketpair()
        stderr = _stderr_file()
        try:
            with theirs:
                done = await self._order(Spawn(), [theirs.fileno(), stderr.fileno()], ORDER_DEADLINE_S)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        # Cancelled or failed: without its socket a worker that was forked after all hangs up and ends.
        except BaseException:
            ours.close()
            stderr.close()
            raise
        return Worker(done.pid, reader, writer, stderr)

    async def end(self, worker: Worker) -> str:
        """Kill a worker and all it started, collect it, and say how it ended if it had ended by itself, with its last
        words.
        """
        worker.writer.close()
        try:
            done = await self._order(End(worker.pid), [], ORDER_DEADLINE_S)
        except NurseryDied as error:
            return f"ended with the nursery: {error}"
        finally:
            last_words = _tail(worker.stderr)
            worker.stderr.close()
        how = "" if done.status is None else _describe(done.status)
        return f"{how}; its last words: {last_words}" if last_words else how

    async def close(self) -> None:
        """End the nursery; the kernel ends its workers with it. Idempotent."""
        if self._control is not None:
            self._control.close()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._stderr is not None:
            self._stderr.close()

    async def _order(self, order: msgspec.Struct, files: list[int], deadline_s: float) -> Done:
        # Shielded: an order given must be heard out, or the next one would read this one's answer.
        return await asyncio.shield(self._in_turn(order, files, deadline_s))

    async def _in_turn(self, order: msgspec.Struct, files: list[int], deadline_s: float) -> Done:
        async with self._orders:
            return await asyncio.to_thread(self._exchange, order, files, deadline_s)

    def _exchange(self, order: msgspec.Struct, files: list[int], deadline_s: float) -> Done:
        control = self._control
        if control is None or control.fileno() < 0:
            raise NurseryDied("it is closed")
        try:
            control.settimeout(deadline_s)
            socket.send_fds(control, [encode(order)], files)
            done = receive_blocking(control, Done)
        except (OSError, WireError) as error:
            raise NurseryDied(f"{error!r}{self._last_words()}") from error
        if done is None:
            raise NurseryDied(f"it hung up{self._last_words()}")
        return done

    def _last_words(self) -> str:
        # Its socket closes before its traceback is written.
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS_S)
        words = _tail(self._stderr)
        return f"; its last words: {words}" if words else ""


def _stderr_file() -> IO[bytes]:
    # Appending, so that reading its tail does not move the place where the worker writes.
    return tempfile.TemporaryFile("a+b")


def _tail(file: IO[bytes] | None) -> str:
    if file is None or file.closed:
        return ""
    length = os.fstat(file.fileno()).st_size
    tail = os.pread(file.fileno(), STDERR_TAIL_BYTES, max(0, length - STDERR_TAIL_BYTES))
    return tail.decode(errors="replace").strip().rsplit("\n", 1)[-1]


def _describe(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return "ran out of memory" if status == EXIT_OUT_OF_MEMORY else f"exited with status {status}"
