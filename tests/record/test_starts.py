"""Which start of a run trained a version."""

from pathlib import Path

from vtriune.record.starts import keep, start_of, starts


def test_a_version_was_trained_by_the_last_start_that_went_on_from_below_it(tmp_path: Path) -> None:
    assert starts(tmp_path) == []
    (tmp_path / "config").mkdir()
    for name in (
        "start-001-at-version-0",
        "start-002-at-version-9",
        "start-003-at-version-5",
        "start-010-at-version-12",
    ):
        (tmp_path / "config" / f"{name}.yaml").touch()
    (tmp_path / "config" / "notes.yaml").touch()
    found = starts(tmp_path)
    assert [start.number for start in found] == [1, 2, 3, 10]
    # What the second start made from version 10 on, the third made again.
    assert [start_of(version, found).number for version in (1, 5, 6, 10, 12, 13)] == [1, 1, 3, 3, 3, 10]


def test_each_start_is_kept_and_the_newest_is_the_runs_configuration(tmp_path: Path) -> None:
    for version in (0, 9, 0):
        keep(tmp_path, version, f"at {version}".encode())
    found = starts(tmp_path)
    assert [(start.number, start.version, start.path.read_text()) for start in found] == [
        (1, 0, "at 0"), (2, 9, "at 9"), (3, 0, "at 0"),
    ]  # fmt: skip
    assert (tmp_path / "config.yaml").read_text() == "at 0"
    # A run that was stopped before its first version goes on from 0, under what its last start there said.
    assert start_of(0, found).number == 3


def test_a_run_whose_first_configuration_was_not_kept_is_taken_to_have_begun_under_the_oldest_that_was(
    tmp_path: Path,
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "start-001-at-version-7.yaml").touch()
    assert start_of(3, starts(tmp_path)).version == 7
