"""What signals ask of a run, told to a small program."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio, sys
from vtriune.run.stop_signals import StopSignals

async def main():
    with StopSignals(lambda text: print(text, flush=True)) as signals:
        if sys.argv[1] == "begun":
            signals.stop = lambda: print("asked to stop", flush=True)
        print("ready", flush=True)
        await asyncio.sleep(60)

try:
    asyncio.run(main())
except asyncio.CancelledError:
    print("cancelled", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@contextmanager
def program(stage: str, ignored: signal.Signals | None = None) -> Iterator["subprocess.Popen[str]"]:
    """One that waits, with the signals of a run; it is ready to be told."""
    before = signal.signal(ignored, signal.SIG_IGN) if ignored else None
    command = [sys.executable, "-c", PROGRAM, stage]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ignored:
        signal.signal(ignored, before)
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.parametrize("first", [INT, TERM, HUP])
def test_the_first_asks_to_stop_what_follows_within_a_second_is_the_same_request_and_a_later_one_ends_it(
    first: signal.Signals,
) -> None:
    with program("begun") as process:
        for number in (first, TERM, HUP, INT):
            os.kill(process.pid, number)
        assert "with a checkpoint" in next_line(process)
        assert next_line(process) == "asked to stop"
        time.sleep(1.1)
        os.kill(process.pid, HUP)
        time.sleep(0.3)
        assert process.poll() is None, "SIGHUP asks for no more"
        os.kill(process.pid, TERM if first == INT else INT)
        assert next_line(process) == "interrupted"
        assert process.wait(10) == 0


def test_before_training_there_is_nothing_to_save_and_the_work_is_cancelled() -> None:
    with program("not begun") as process:
        os.kill(process.pid, TERM)
        assert "there is nothing to save" in next_line(process)
        assert next_line(process) == "cancelled"


@pytest.mark.parametrize("ignored", [HUP, INT])
def test_what_was_ignored_at_the_start_stays_ignored(ignored: signal.Signals) -> None:
    with program("begun", ignored) as process:
        os.kill(process.pid, ignored)
        time.sleep(0.3)
        os.kill(process.pid, TERM)
        assert "with a checkpoint" in next_line(process)
        time.sleep(1.1)
        os.kill(process.pid, ignored)
        time.sleep(0.3)
        assert process.poll() is None
