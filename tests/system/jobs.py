"""Runs as subprocesses, for the tests of the whole system."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SMALL = [
    # Batches this small gain nothing by a second thread, and other tests run beside these.
    "cluster.learner.threads=1",
    "policy.rollout_batch=8",
    "policy.group_size=4",
    "cluster.generators.max_sequences=32",
    "evaluation.rows=16",
    "evaluation.every=0",
    "checkpoint.every=0",
    "sampling.max_tokens=32",
]


class Job:
    """One `python -m vtriune.launch` over a file that trains on the digits, with its output in a file unless `streams` say otherwise.

    env            added to the environment
    is_controlled  stdin is a terminal, and is to be the job's controlling one
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        file: str = "examples/digits.yaml",
        run_folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        is_controlled: bool = False,
        **streams: Any,
    ) -> None:
        self.run_folder = run_folder or folder / "job"
        self.output = folder / "output.txt"
        command = [
            sys.executable,
            "-m",
            "vtriune.launch",
            file,
            f"run.folder={folder}",
            "run.name=job",
        ]
        # The stores are shared by all tests of a session: they are keyed by content.
        command += [f"data.store={folder.parent / 'stores'}", *SMALL, *overrides]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if is_controlled else None,
                **{"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT, **streams},
            )
        self.family: dict[int, str] = {}

    def lines(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl that are whole; one may be on its way."""
        path = self.run_folder / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for(self, is_so: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
        end = time.monotonic() + timeout_s
        while not is_so():
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{self.text()}"
            assert time.monotonic() < end, f"no {what} within {timeout_s} s:\n{self.text()}"
            self.family |= {
                child.pid: role_of(child) for child in psutil.Process(self.process.pid).children(recursive=True)
            }
            time.sleep(0.1)

    def wait_for_version(self, version: int, timeout_s: float = 300) -> None:
        self.wait_for(lambda: any(line["version"] >= version for line in self.lines()), f"version {version}", timeout_s)

    def pid_of(self, role: str) -> int:
        return next(pid for pid, name in self.family.items() if role in name and psutil.pid_exists(pid))

    def readers_of_stdin(self) -> list[str]:
        """Which of the job's processes could read what somebody types."""
        assert self.process.stdin is not None
        typed = os.readlink(f"/proc/self/fd/{self.process.stdin.fileno()}")
        found = []
        for pid, name in {self.process.pid: "controller", **self.family}.items():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/0") == typed:
                    found.append(name)
        return found

    def finish(self, timeout_s: float = 240) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text()}") from None

    def text(self) -> str:
        """What it said; what it logged where nobody listens."""
        return (self.output.read_text() or self.log())[-10000:]

    def log(self) -> str:
        path = self.run_folder / "logs" / "controller-0.log"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def end(self) -> None:
        """Whatever a failed test leaves running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def left_behind(self) -> list[int]:
        return [pid for pid in self.family if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether such a process runs; one that has ended and is not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def role_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


def control(run_folder: Path, *words: str) -> dict[str, Any]:
    """`python -m vtriune.control`, as a user calls it; the status it prints."""
    command = [sys.executable, "-m", "vtriune.control", str(run_folder), *words]
    status: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    return status
