"""The pool's hold on its fork server and workers: start the server once, have it fork workers, ask a worker one thing, end it.

Start it in the thread that runs the event loop: the kernel ends the server when the thread that started it ends.
"""

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

from verifiers.pool.frames import Ack, End, FrameError, Job, Result, Setup, Spawn, encode, receive, receive_blocking
from verifiers.pool.worker import EXIT_OUT_OF_MEMORY

SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
START_DEADLINE_S = 120.0
ORDER_DEADLINE_S = 30.0
STDERR_TAIL_BYTES = 2_000
SLOW_NICENESS = 10
LAST_WORDS_S = 2.0


class ForkServerDied(Exception):
    """The fork server did not start, or ended, or does not follow orders; the message repeats its last words."""


class Worker:
    """One worker: its process id, its socket, and the file that catches its standard error."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stderr: IO[bytes]) -> None:
        self.pid, self.reader, self.writer, self.stderr = pid, reader, writer, stderr

    async def ask(self, job: Job) -> Result:
        """Send a job and wait for its result, however long; FrameError where the worker hangs up or answers nonsense."""
        self.writer.write(encode(job))
        await self.writer.drain()
        result = await receive(self.reader, Result)
        if result.number != job.number:
            raise FrameError(f"answered job {result.number} when asked job {job.number}")
        return result

    def yield_cpu(self) -> None:
        """Let every other worker go first. The process id is this worker's until the fork server is told to end it."""
        os.setpriority(os.PRIO_PROCESS, self.pid, SLOW_NICENESS)


class ForkServer:
    """The pool's side of `verifiers.pool.worker`. Orders are given one at a time."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._orders = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control, self._its_end = socket.socketpair()
        self._stderr = _stderr_file()

    async def start(self) -> None:
        """Return when it has imported and tested everything; ForkServerDied where it does not."""
        with self._its_end as control:
            command = [sys.executable, "-P", "-m", "verifiers.worker", str(control.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(  # noqa: ASYNC220  takes milliseconds, and the thread matters (see above)
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[control.fileno()],
                env={**os.environ, **SINGLE_THREADED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        await self._order(self._setup, [], START_DEADLINE_S)

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
        """Kill a worker and all it started, collect it, and say how it had ended if by itself, with its last words."""
        has_hung_up = worker.reader.at_eof()
        worker.writer.close()
        try:
            done = await self._order(End(worker.pid, has_hung_up), [], ORDER_DEADLINE_S)
        except ForkServerDied as error:
            return f"ended with the fork server: {error}"
        finally:
            last_words = _tail(worker.stderr)
            worker.stderr.close()
        how = "" if done.status is None else _describe(done.status)
        return f"{how}; its last words: {last_words}" if last_words else how

    async def close(self) -> None:
        """End the server; the kernel ends its workers with it. Idempotent."""
        self._control.close()
        self._its_end.close()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._stderr.close()

    async def _order(self, order: msgspec.Struct, files: list[int], deadline_s: float) -> Ack:
        # Shielded: an order given must be heard out, or the next one would read this one's answer.
        return await asyncio.shield(self._in_turn(order, files, deadline_s))

    async def _in_turn(self, order: msgspec.Struct, files: list[int], deadline_s: float) -> Ack:
        async with self._orders:
            return await asyncio.to_thread(self._exchange, order, files, deadline_s)

    def _exchange(self, order: msgspec.Struct, files: list[int], deadline_s: float) -> Ack:
        try:
            self._control.settimeout(deadline_s)
            socket.send_fds(self._control, [encode(order)], files)
            done = receive_blocking(self._control, Ack)
        except OSError as error:
            raise ForkServerDied(f"{error!r}{self._last_words()}") from error
        if done is None:
            raise ForkServerDied(f"it hung up{self._last_words()}")
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


def _tail(file: IO[bytes]) -> str:
    if file.closed:
        return ""
    length = os.fstat(file.fileno()).st_size
    tail = os.pread(file.fileno(), STDERR_TAIL_BYTES, max(0, length - STDERR_TAIL_BYTES))
    return tail.decode(errors="replace").strip().rsplit("\n", 1)[-1]


def _describe(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return "ran out of memory" if status == EXIT_OUT_OF_MEMORY else f"exited with status {status}"
