"""Runs as subprocesses, for the tests of the whole system."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    """One `python -m vtriune.launch` over a file that trains on the digits, with its output in a file."""

    def __init__(self, folder: Path, *overrides: str, file: str = "examples/digits.yaml") -> None:
        self.run_folder = folder / "job"
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
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
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

    def finish(self, timeout_s: float = 240) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text()}") from None

    def text(self) -> str:
        return self.output.read_text()[-6000:]

    def end(self) -> None:
        """Whatever a failed test leaves running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def left_behind(self) -> list[int]:
        return [
            pid
            for pid in self.family
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]


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
