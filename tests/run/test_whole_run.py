"""Whole runs that are interrupted at any moment equal the run left alone."""

import subprocess
import sys

import pytest
from hypothesis import Phase

from tests.run import whole_run
from vtriune.data.loader import Cursor
from vtriune.run.controller import Controller
from vtriune.run.groups import Groups
from vtriune.run.snapshots import RunState
from vtriune.run.window import Window


def test_three_hundred_interrupted_runs_equal_the_run_left_alone() -> None:
    whole_run.check(300)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_ten_thousand_interrupted_runs_equal_the_run_left_alone() -> None:
    command = [sys.executable, "-m", "tests.run.whole_run", "--sequences", "5000", "--seed"]
    halves = [subprocess.Popen([*command, seed], stderr=subprocess.PIPE, text=True) for seed in ("1", "2")]
    errors = [half.communicate()[1] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], "\n".join(errors)


def forgets_the_switch(self: Controller, state: RunState, *, keeps_switch: bool) -> None:
    """What is in force after a resume is what the file says."""


def restores_free_slots(self: Window, version: int, bounds: dict[int, int], num_filtered: int) -> None:
    """Open groups come back without their slots: more are admitted than the bound allows."""
    self.version, self.num_filtered = version, num_filtered


def keeps_no_place(self: Cursor, state: dict[str, object]) -> None:
    """The data begin anew."""


def says_what_is_in_force(self: Groups, batch: list[int]) -> int:
    """A batch's bound is that of the mode, whatever its groups were admitted under."""
    return self._window.limits.max_staleness


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (Controller, "_restore_mode", forgets_the_switch),
        (Window, "restore", restores_free_slots),
        (Cursor, "load_state_dict", keeps_no_place),
        (Groups, "bound", says_what_is_in_force),
    ],
)
def test_a_run_that_breaks_a_promise_is_caught(
    owner: type, name: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, ExceptionGroup)):
        whole_run.check(300, phases=[Phase.generate])
