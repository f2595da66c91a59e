"""The account of a failed run."""

import json
from pathlib import Path

from vtriune.failure import describe, render, write
from vtriune.runtime import MeshFailure
from vtriune.transport.wire import FailureNote


def test_a_killed_process_is_named_with_signal_pid_and_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "learner-1.log").write_text("".join(f"line {n}\n" for n in range(50)))
    failure = describe(MeshFailure(FailureNote("learner", 1, "here", 77, "signal", signal=9)), tmp_path)
    assert (failure.role, failure.rank, failure.pid, failure.signal) == ("learner", 1, 77, "SIGKILL")
    assert failure.last_log_lines[-1] == "line 49"
    path = write(failure, tmp_path)
    assert json.loads(path.read_text())["signal"] == "SIGKILL"
    block = render(failure, path)
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
