"""How a real run ends, and what does not end it: signals to all its processes, closed terminals and pipes, full and read-only disks."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.jobs import ROOT, Job
from vtriune import whole_files

ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
"""A terminal of old."""
SHORT = ["run.steps=1000", "evaluation.before=false"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def signal_all(job: Job, number: int) -> None:
    """To every process of the run at once, as systemd and Slurm do."""
    for pid in [*job.family, job.process.pid]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def has_checkpoint_of_its_end(job: Job) -> bool:
    last = max(line["version"] for line in job.lines())
    return (job.run_folder / "checkpoints" / f"step-{last:.0f}" / "manifest.json").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 256 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.decode()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.timeout(420)
def test_a_run_under_nohup_outlives_its_terminal_and_its_reader_and_stops_with_a_checkpoint_when_all_its_processes_are_told(
    start: Callable[..., Job],
) -> None:
    reader, writer = os.pipe()
    with open("/dev/full", "wb") as full:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As `nohup` does.
        try:
            job = start(*SHORT, "tracking.console=rich", env=ASCII, stdout=writer, stderr=full)
        finally:
            signal.signal(signal.SIGHUP, before)
    os.close(writer)
    # `launch … | head -c 1`
    os.read(reader, 1)
    os.close(reader)
    job.wait_for_version(1)
    signal_all(job, signal.SIGHUP)
    version = max(line["version"] for line in job.lines())
    job.wait_for_version(version + 2)
    assert "the console cannot be written (Broken pipe)" in job.log()
    signal_all(job, signal.SIGTERM)
    assert job.finish(60) == 0, job.log()
    assert has_checkpoint_of_its_end(job)
    assert "stopping after the version in hand, with a checkpoint" in job.log()
    assert not (job.run_folder / "failure.json").exists()
    assert job.left_behind() == []


@pytest.mark.long
@pytest.mark.timeout(420)
def test_a_closed_terminal_stops_the_run_with_a_checkpoint_whatever_letters_the_terminal_knew(
    start: Callable[..., Job],
) -> None:
    master, terminal = pty.openpty()
    job = start(*SHORT, env=ASCII, stdin=terminal, stdout=terminal, stderr=terminal, is_controlled=True)
    os.close(terminal)
    shown = bytearray()
    os.set_blocking(master, False)

    def read() -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(master, 1 << 16))
        return any(line["version"] >= 1 for line in job.lines())

    job.wait_for(read, "version 1")
    assert b"versions" in shown
    assert shown.isascii()
    os.close(master)  # The kernel says SIGHUP to whoever has it as their terminal.
    assert job.finish(60) == 0, job.log()
    assert has_checkpoint_of_its_end(job)
    assert "stopping after the version in hand, with a checkpoint" in job.log()
    assert job.left_behind() == []


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_full_disk_ends_the_run_with_one_report_that_names_it_and_the_same_command_goes_on_once_there_is_room(
    start: Callable[..., Job], small_disk: Path
) -> None:
    words = (*SHORT, "checkpoint.every=1", f"run.folder={small_disk}")
    job = start(*words, run_folder=small_disk / "job")
    job.wait_for_version(2)
    fill(small_disk)
    assert job.finish(90) == 1, job.text()
    told = job.output.read_text()
    assert told.count("RUN FAILED") == 1
    assert "groups were lost" not in told
    assert "No space left on device: the run folder on the disk " + str(small_disk) in told
    account = small_disk / "job" / "failure.json"
    assert not account.exists() or json.loads(account.read_text())["error"]
    assert job.left_behind() == []

    (small_disk / "filler").unlink()
    checkpoints = small_disk / "job" / "checkpoints"
    left = [whole_files.aside(place) for place in (checkpoints / "step-99", small_disk / "job" / "config.yaml")]
    left[0].mkdir()
    left[1].write_bytes(b"half")
    again = start(*words, run_folder=small_disk / "job")
    again.wait_for_version(max(line["version"] for line in again.lines()) + 1)
    assert [path for path in left if path.exists()] == []
    assert "resuming from" in again.text()
    # One that cannot come to the end of its version: it has to be told twice.
    os.kill(again.pid_of("learner"), signal.SIGSTOP)
    os.kill(again.process.pid, signal.SIGTERM)
    again.wait_for(lambda: "once more to end at once" in again.text(), "answer")
    time.sleep(1.2)
    os.kill(again.process.pid, signal.SIGHUP)
    os.kill(again.process.pid, signal.SIGTERM)
    assert again.finish(10) == 130, again.text()
    told = again.text().partition("resuming from")[2]
    assert "interrupted; the same command resumes" in told
    assert "Traceback" not in told
    assert again.left_behind() == []


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb") as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"\0" * (1 << 16))
            filler.flush()


@pytest.mark.timeout(120)
def test_a_signal_before_training_ends_the_run_cleanly(start: Callable[..., Job]) -> None:
    job = start(*SHORT)
    job.wait_for(lambda: "rows of 8 sources" in job.text(), "the data")
    job.wait_for(lambda: len(job.family) >= 3, "processes")
    signal_all(job, signal.SIGTERM)
    assert job.finish(30) == 0, job.text()
    assert "nothing to save" in job.text()
    assert "Traceback" not in job.text()
    assert job.left_behind() == []


@pytest.mark.parametrize(
    "obstacle", ["a read-only disk", "a full disk", "a file in the way", "a file in the store's way"]
)
def test_a_folder_that_cannot_be_used_is_said_in_a_sentence(tmp_path: Path, small_disk: Path, obstacle: str) -> None:
    (tmp_path / "file").touch()
    folder, words = small_disk, []
    if obstacle == "a read-only disk":
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    elif obstacle == "a full disk":
        fill(small_disk)
    elif obstacle == "a file in the way":
        folder = tmp_path / "file" / "runs"
    else:
        words = [f"data.store={tmp_path / 'file' / 'stores'}"]
    command = [sys.executable, "-m", "vtriune.launch", "examples/digits.yaml", f"run.folder={folder}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    told = f"data.store: no store of data.train can be built in {tmp_path}" if words else f"run.folder: {folder}"
    assert told in done.stderr
    assert "Traceback" not in done.stderr
