"""The account of a failed run."""

import errno
import json
import os
from pathlib import Path

import pytest

from vtriune.run.failure_report import describe, render, write
from vtriune.runtime import MeshFailure
from vtriune.transport.wire import FailureNote


def test_a_killed_process_is_named_with_signal_pid_and_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "learner-1.log").write_text("".join(f"line {n}\n" for n in range(50)))
    failure = describe(MeshFailure(FailureNote("learner", 1, "here", 77, "signal", signal=9)), tmp_path)
    assert (failure.role, failure.rank, failure.pid, failure.signal) == ("learner", 1, 77, "SIGKILL")
    assert failure.last_log_lines[-1] == "line 49"
    path = tmp_path / "failure.json"
    assert write(failure, tmp_path) == f"full account: {path}"
    assert json.loads(path.read_text())["signal"] == "SIGKILL"
    block = render(failure)
    assert "RUN FAILED in learner 1 on here, pid 77" in block
    assert "line 49" in block


def test_of_several_errors_the_first_one_is_reported_with_its_traceback(tmp_path: Path) -> None:
    try:
        try:
            raise ValueError("the cause")
        except ValueError as error:
            raise ExceptionGroup("tasks", [ExceptionGroup("inner", [error]), RuntimeError("later")]) from None
    except ExceptionGroup as group:
        failure = describe(group, tmp_path)
    assert failure.error == "ValueError: the cause"
    assert "raise ValueError" in failure.traceback
    assert failure.role == "controller"


def test_an_account_that_cannot_be_written_is_told_with_the_reason_and_raises_nothing(tmp_path: Path) -> None:
    failure = describe(ValueError("the cause"), tmp_path)
    (tmp_path / "failure.json").mkdir()
    for folder in (tmp_path, tmp_path / "gone"):
        told = write(failure, folder)
        assert f"could not be written to {folder / 'failure.json'}: " in told
        assert "ValueError: the cause" in told


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_an_error_without_a_text_and_a_name_that_is_no_unicode_have_an_account_too(tmp_path: Path) -> None:
    for error in (Mute(), OSError(2, "no such file", "\udcff")):
        failure = describe(error, tmp_path)
        assert type(error).__name__ in render(failure) or "FileNotFoundError" in render(failure)
        assert write(failure, tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_of_a_full_disk_the_account_says_where_there_is_how_much_room(tmp_path: Path, number: int) -> None:
    block = render(describe(OSError(number, os.strerror(number)), tmp_path))
    assert f"{os.strerror(number)}: the run folder on the disk " in block
    assert "MiB free" in block
    assert "MiB free" not in render(describe(OSError(5, "Input/output error"), tmp_path))
