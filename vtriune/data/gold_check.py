"""Scores every row's gold answer with its own verifier, in child processes that can be killed.

A gold answer is data: math-verify may spin on one for ever, and a signal does not interrupt a loop in C. So a child scores and
its parent watches: a deadline per answer, SIGKILL, a fresh child, and the row is named. Called by `validate.Checks`; the child
is `python -m vtriune.data.gold_check`, fed over pipes with length-prefixed JSON, and it ends with its parent.
"""

import ctypes
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import msgspec

from verifiers import RewardOptions, RewardSpec, check_gold, configure

_LENGTH = struct.Struct("<I")
_FIRST_DEADLINE_S = 120.0
"""For the first answer of each verifier in a child: its libraries load and its kernels may have to be compiled."""
_MEMORY_BYTES = 8 * 2**30
_PR_SET_PDEATHSIG = 1
_MAX_REMEMBERED = 200_000


class GoldChecker:
    """`num_workers` children, started on first use; `begin` may be called again and again, `close` ends them.

    Answers are remembered by specification: a data set of a million counted things has few distinct golds.
    """

    def __init__(self, options: RewardOptions, num_workers: int) -> None:
        self._children = [_Child(options) for _ in range(num_workers)]
        self._threads: ThreadPoolExecutor | None = None
        self._known: dict[bytes, str | None] = {}

    def begin(self, specs: Sequence[RewardSpec]) -> Callable[[], list[str | None]]:
        """Start checking; the returned function waits and says why each specification cannot be trained on, in order.

        None where the gold answer scores 1. One batch at a time: collect before the next `begin`.
        """
        keys = [msgspec.json.encode(spec) for spec in specs]
        if len(self._known) > _MAX_REMEMBERED:
            self._known.clear()
        items = [(key, spec) for key, spec in dict(zip(keys, specs, strict=True)).items() if key not in self._known]
        if self._threads is None:
            # The threads outlive their batches: a child dies with the thread that started it (PR_SET_PDEATHSIG).
            self._threads = ThreadPoolExecutor(max_workers=len(self._children), thread_name_prefix="gold-check")
        shares = [items[start :: len(self._children)] for start in range(len(self._children))]
        answers = self._threads.map(_Child.check_all, self._children, shares)

        def collect() -> list[str | None]:
            for share in answers:
                self._known.update(share)
            return [self._known[key] for key in keys]

        return collect

    def close(self) -> None:
        """End the children and the threads that wait for them; a later `begin` starts new ones. Idempotent."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        for child in self._children:
            child.end()


class _Child:
    """One child process and the answers it still owes; used by one thread at a time."""

    def __init__(self, options: RewardOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._warm: set[str] = set()

    def check_all(self, items: Sequence[tuple[bytes, RewardSpec]]) -> list[tuple[bytes, str | None]]:
        return [(key, self._check(key, spec)) for key, spec in items]

    def _check(self, key: bytes, spec: RewardSpec) -> str | None:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        deadline_s = 2 * self._options.deadline_s + (0 if spec.verifier in self._warm else _FIRST_DEADLINE_S)
        try:
            process.stdin.write(_LENGTH.pack(len(key)) + key)
            process.stdin.flush()
            answer = _read_within(process.stdout.fileno(), deadline_s)
        except (BrokenPipeError, EOFError):
            self.end()
            return f"checking the gold answer {spec.gold[:100]!r} ended the checking process (exit code {process.returncode})"
        except TimeoutError:
            self.end()
            return f"checking the gold answer {spec.gold[:100]!r} took longer than {deadline_s:g} s"
        self._warm.add(spec.verifier)
        result: str | None = msgspec.json.decode(answer, type=str | None)
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(
                [*command, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert self._process.stdin is not None
            setup = msgspec.json.encode(self._options)
            self._process.stdin.write(_LENGTH.pack(len(setup)) + setup)
            self._warm = set()
        return self._process

    def end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                # Closing flushes what the killed child never read.
                continue


def _read_within(descriptor: int, deadline_s: float) -> bytes:
    """One length-prefixed message; TimeoutError after `deadline_s`, EOFError when the writer is gone."""
    until, data = time.monotonic() + deadline_s, b""
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError
        chunk = os.read(descriptor, 65536)
        if not chunk:
            raise EOFError
        data += chunk
    return data[_LENGTH.size :]


def _read_exactly(stream: BinaryIO) -> bytes | None:
    """One length-prefixed message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def _serve(parent: int) -> None:
    """The child's life: options first, then one specification after another until the parent closes the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # The parent died before the kernel could be asked to tell.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # Answers leave on a descriptor of their own: whatever a verifier prints goes to stderr and garbles nothing.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    setup = _read_exactly(sys.stdin.buffer)
    if setup is None:
        return
    configure(msgspec.json.decode(setup, type=RewardOptions))
    while (request := _read_exactly(sys.stdin.buffer)) is not None:
        answer = msgspec.json.encode(check_gold(msgspec.json.decode(request, type=RewardSpec)))
        answers.write(_LENGTH.pack(len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
