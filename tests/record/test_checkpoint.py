"""Checkpoint folders: whole or not there, whatever is truncated, tampered with or killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtriune.record.checkpoint import CheckpointError, all_steps, commit, latest_complete, problems, prune, stage

FILES = {
    "run_state.json": b"{}",
    "dcp/rank0.bin": bytes(range(256)) * 50,
    "hf/model.safetensors": b"weights" * 99,
    "hf/empty": b"",
}


def write(folder: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    staging = stage(folder, step)
    for name, content in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(content + str(step).encode())
    return commit(staging)


def test_a_checkpoint_holds_what_was_written_and_a_manifest_of_it(tmp_path: Path, told: list[tuple[str, str]]) -> None:
    path = write(tmp_path, 12)
    assert len(told) == len(FILES), "a step for each file"
    assert path == tmp_path / "step-12"
    assert problems(path) == []
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 12
    assert {name: entry["num_bytes"] for name, entry in manifest["files"].items()} == {
        name: len(content) + 2 for name, content in FILES.items()
    }
    assert all((path / name).read_bytes() == content + b"12" for name, content in FILES.items())


def test_the_newest_by_number_wins(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "nowhere") is None
    assert latest_complete(tmp_path) is None
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert [path.name for path in all_steps(tmp_path)] == ["step-9", "step-20", "step-100"]
    assert latest_complete(tmp_path) == tmp_path / "step-100"


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from([*FILES, "manifest.json"]),
    damage=st.sampled_from(["truncate", "flip", "remove", "extend"]),
    where=st.floats(0, 1),
)
def test_any_damage_to_any_file_is_refused_by_name_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, name: str, damage: str, where: float
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    before, newest = write(folder, 1), write(folder, 2)
    victim = newest / name
    content = victim.read_bytes()
    place = int(where * (len(content) - 1))
    if damage == "truncate":
        victim.write_bytes(content[:place])
    elif damage == "flip":
        victim.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
    elif damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content + b" ")
    if name == "manifest.json" and damage in ("flip", "extend") and not problems(newest):
        # JSON may end in a blank, and a name's blank may become another: nothing of the files is in doubt.
        assert latest_complete(folder) == newest
        return
    caplog.clear()
    assert latest_complete(folder) == before
    assert f"checkpoint {newest} is refused" in caplog.text
    assert name in caplog.text


def test_a_file_that_no_manifest_lists_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    (path / "extra.bin").write_bytes(b"?")
    assert problems(path) == [f"{path / 'extra.bin'} is not in the manifest"]
    assert latest_complete(tmp_path) is None


def test_a_renamed_checkpoint_and_a_link_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    path.rename(tmp_path / "step-4")
    assert "step 3" in problems(tmp_path / "step-4")[0]
    path = write(tmp_path, 5)
    (path / "hf" / "empty").unlink()
    (path / "hf" / "empty").symlink_to(path / "run_state.json")
    assert problems(path) == [f"{path / 'hf/empty'} is a link"]
    staging = stage(tmp_path, 6)
    (staging / "link").symlink_to(path)
    with pytest.raises(CheckpointError, match="must hold its own files"):
        commit(staging)


def test_what_is_still_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    staging = stage(tmp_path, 2)
    (staging / "half").write_bytes(b"half")
    assert latest_complete(tmp_path) == tmp_path / "step-1"
    assert stage(tmp_path, 2) == staging
    assert list(staging.iterdir()) == []
    with pytest.raises(CheckpointError, match="nothing was written"):
        commit(staging)
    with pytest.raises(CheckpointError, match="no staging folder"):
        commit(tmp_path / "step-1")


def test_a_step_written_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    damaged = write(tmp_path, 2)
    (damaged / "run_state.json").write_bytes(b"")
    write(tmp_path, 2, {"run_state.json": b"new"})
    assert problems(damaged) == []
    assert (damaged / "run_state.json").read_bytes() == b"new2"
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_pruning_keeps_the_newest_and_clears_leftovers_but_no_work_in_hand(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    for step in (2, 9):
        (stage(tmp_path, step) / "half").write_bytes(b"half")
    assert [path.name for path in prune(tmp_path, keep=2)] == ["step-1", "step-2", "step-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-9.partial", "step-4", "step-5"]
    assert prune(tmp_path, keep=2) == []
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, keep=0)


@pytest.mark.parametrize("damaged", [{20}, {20, 21}, {3, 20}])
@pytest.mark.parametrize("keep", [1, 2])
def test_pruning_never_removes_the_newest_whole_checkpoint_since_damaged_ones_do_not_count_as_kept(
    tmp_path: Path, damaged: set[int], keep: int
) -> None:
    for step in (1, 3, 19, 20, 21):
        path = write(tmp_path, step)
        if step in damaged:
            (path / "run_state.json").write_bytes(b"[]" + str(step).encode())
    expected = [step for step in (21, 19, 3, 1) if step not in damaged][:keep]
    prune(tmp_path, keep)
    left = {int(path.name.removeprefix("step-")) for path in all_steps(tmp_path)}
    assert set(expected) <= left
    assert left - set(expected) <= damaged
    assert min(left) >= min(expected)
    newest = latest_complete(tmp_path)
    assert newest is not None
    assert newest.name == f"step-{expected[0]}"


def test_a_checkpoint_that_somebody_moved_to_another_disk_and_linked_is_used_and_pruned_or_replaced_as_a_link(
    tmp_path: Path,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (1, 2):
        write(tmp_path, step).rename(elsewhere / f"step-{step}")
        (tmp_path / f"step-{step}").symlink_to(elsewhere / f"step-{step}")
    assert latest_complete(tmp_path) == tmp_path / "step-2"
    write(tmp_path, 2)
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir() if path != elsewhere] == ["step-2"]
    assert not (tmp_path / "step-2").is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["step-1", "step-2"]


def test_pruning_reads_no_checkpoint_that_is_known_to_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {write(tmp_path, step) for step in (1, 2, 3)}
    monkeypatch.setattr("vtriune.record.checkpoint.problems", lambda checkpoint: pytest.fail(f"{checkpoint} was read"))
    assert prune(tmp_path, 2, written) == [tmp_path / "step-1"]


WRITER = """
import sys, pathlib
from vtriune.record.checkpoint import commit, prune, stage
folder = pathlib.Path(sys.argv[1])
print("ready", flush=True)
for step in range(1, 10_000):
    staging = stage(folder, step)
    for name in range(8):
        (staging / f"{name}.bin").write_bytes(str(step).encode() * 20_000)
    commit(staging)
    prune(folder, keep=2)
"""


@pytest.mark.parametrize("round_number", range(12))
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, round_number: int) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    while len(all_steps(tmp_path)) < 2:
        time.sleep(0.005)
    time.sleep(0.0137 * round_number)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    latest = latest_complete(tmp_path)
    assert latest is not None
    # Every folder under a final name is whole, not only the latest: the rename comes last.
    assert all(problems(path) == [] for path in all_steps(tmp_path))
    assert (latest / "0.bin").read_bytes() == latest.name.removeprefix("step-").encode() * 20_000
