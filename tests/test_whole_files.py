"""Whole or not there: whatever step fails, whatever moment a kill comes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from verifiers import whole_files as of_verifiers
from vtriune import whole_files

OLD, NEW = b"old" * 1000, b"new" * 2000
STEPS = ("fsync", "replace")
"""What the operating system is asked for."""


class Full(OSError):
    """What the operating system answers in these tests."""


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Arms the n-th step of those that are still to come; the list it returns names the steps that were asked for."""

    def arm(number: int) -> list[str]:
        asked: list[str] = []

        def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                asked.append(name)
                if len(asked) == number + 1:
                    raise Full(28, "No space left on device")
                return real(*args, **kwargs)

            return step

        for name in STEPS:
            monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
        return asked

    return arm


def content(place: Path) -> bytes:
    return (place / "inner" / "file").read_bytes() if place.is_dir() else place.read_bytes()


def fill(partial: Path, *, is_folder: bool) -> None:
    if is_folder:
        (partial / "inner").mkdir(parents=True)
        partial = partial / "inner" / "file"
    with partial.open("wb") as file:
        file.write(NEW)


@pytest.mark.parametrize("module", [whole_files, of_verifiers], ids=["vtriune", "verifiers"])
@pytest.mark.parametrize("number", range(4))
def test_whatever_step_fails_the_file_is_the_old_or_the_whole_new_one_and_nothing_is_left_aside(
    tmp_path: Path, module: Any, number: int, fail_at: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    place.write_bytes(OLD)
    asked = fail_at(number)
    with contextlib.suppress(Full), module.replacing(place) as partial:
        fill(partial, is_folder=False)
    monkeypatch.undo()
    # The file is flushed before it gets its name, the folder after.
    steps = ["fsync", "replace", "fsync"]
    assert asked == steps[: number + 1]
    assert content(place) == (NEW if number > steps.index("replace") else OLD)
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("number", range(6))
def test_a_folder_appears_with_all_that_is_in_it_on_disk_or_not_at_all(
    tmp_path: Path, number: int, fail_at: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "folder"
    asked = fail_at(number)
    with contextlib.suppress(Full), whole_files.replacing(place) as partial:
        fill(partial, is_folder=True)
    monkeypatch.undo()
    # File, inner folder, folder; the rename; the folder around it.
    steps = ["fsync", "fsync", "fsync", "replace", "fsync"]
    assert asked == steps[: number + 1]
    assert list(tmp_path.iterdir()) == ([place] if number > steps.index("replace") else [])
    assert not place.exists() or content(place) == NEW


@pytest.mark.parametrize("module", [whole_files, of_verifiers], ids=["vtriune", "verifiers"])
def test_an_error_of_the_writer_leaves_the_old_file_and_nothing_aside(tmp_path: Path, module: Any) -> None:
    place = tmp_path / "file"
    place.write_bytes(OLD)
    with contextlib.suppress(ZeroDivisionError), module.replacing(place) as partial:
        fill(partial, is_folder=False)
        raise ZeroDivisionError
    assert (place.read_bytes(), list(tmp_path.iterdir())) == (OLD, [place])


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_an_earlier_kill_left_aside_is_no_part_of_the_next(tmp_path: Path, is_folder: bool) -> None:
    place = tmp_path / "place"
    left = whole_files.aside(place)
    left.mkdir()
    (left / "half").write_bytes(b"half")
    with whole_files.replacing(place) as partial:
        fill(partial, is_folder=is_folder)
    assert content(place) == NEW
    assert [path.name for path in tmp_path.rglob("*")] == (["place", "inner", "file"] if is_folder else ["place"])


def test_writers_at_a_time_have_places_of_their_own_and_the_dead_ones_are_cleared(tmp_path: Path) -> None:
    place, host = tmp_path / "shared.bin", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = tmp_path / f".shared.bin.{host}-{os.getppid()}.partial"
    elsewhere = tmp_path / f".shared.bin.{host}-other-{dead.pid}.partial"
    for path in (alive, elsewhere, tmp_path / f".shared.bin.{host}-{dead.pid}.partial"):
        path.write_bytes(b"half")
    with whole_files.replacing(place, is_shared=True) as partial:
        assert partial not in (alive, whole_files.aside(place))
        fill(partial, is_folder=False)
    assert set(tmp_path.iterdir()) == {place, alive, elsewhere}


def test_a_folder_that_is_there_already_stays(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    (place / "earlier").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"), whole_files.replacing(place) as partial:
        fill(partial, is_folder=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "earlier"]


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("module", [whole_files, of_verifiers], ids=["vtriune", "verifiers"])
def test_permissions_are_those_of_an_ordinary_open(tmp_path: Path, module: Any) -> None:
    with module.replacing(tmp_path / "file") as partial:
        fill(partial, is_folder=False)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


WRITER = """
import pathlib, sys
from vtriune import whole_files
place = pathlib.Path(sys.argv[1])
for number in range(10**9):
    whole_files.write(place, str(number).encode().zfill(9) * 20_000)
"""


@pytest.mark.parametrize("round_number", range(6))
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path, round_number: int) -> None:
    place = tmp_path / "file"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(place)])
    while not place.exists():
        time.sleep(0.005)
    time.sleep(0.0071 * round_number)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    data = place.read_bytes()
    assert data == data[:9] * 20_000
    assert set(tmp_path.iterdir()) <= {place, whole_files.aside(place)}


def test_what_killed_writers_left_anywhere_below_a_folder_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "file", tmp_path / "checkpoints" / "step-1" / "weights", tmp_path / "report.partial"]
    for path in (*kept, *(whole_files.aside(path) for path in kept)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(OLD)
    left = whole_files.aside(tmp_path / "checkpoints" / "step-2")
    (left / "dcp").mkdir(parents=True)
    whole_files.aside(left / "dcp" / "shard").write_bytes(OLD)
    whole_files.clear(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert not left.exists()
