"""kill -9 at 50 random moments, in the middle of checkpoints too: the run is the uninterrupted one, sample by sample and bit by bit."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.system import recorded_run as program
from vtriune.record import archive
from vtriune.record.checkpoint import latest_complete, problems

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]
"""The kills take less than a minute of processor time; a machine that is busy with other things may take many for them."""

ROOT = Path(__file__).parents[2]
NUM_KILLS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    program.record(folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder: Path) -> program.Outcome:
    """Both runs, `uninterrupted` and `killed`, as they ended."""
    output = start(folder, "kill", str(NUM_KILLS), "0")
    return msgspec.json.decode(output.splitlines()[-1], type=program.Outcome)


def start(folder: Path, *arguments: str) -> str:
    """Run the program over `folder`; its output."""
    command = [sys.executable, "-m", "tests.system.recorded_run", str(folder), *arguments]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def consumed(folder: Path, name: str) -> list[tuple[int, int, int]]:
    """(version, group, row) in the order in which the learner consumed them."""
    files = archive.files(folder / "runs" / name / "rollouts", "version")
    return [
        (number, archived.group.group.lease.group_id, archived.group.group.lease.sample.row)
        for number, path in files
        for archived in archive.read(path)
    ]


def whole_state(folder: Path, name: str) -> dict[str, Any]:
    """Parameters, Adam's moments and the generators of random numbers of the last checkpoint."""
    checkpoint = folder / "runs" / name / "checkpoints" / f"step-{program.NUM_VERSIONS}"
    assert problems(checkpoint) == []
    dcp_to_torch_save(checkpoint / "dcp", folder / f"{name}.pt")
    found: dict[str, Any] = torch.load(folder / f"{name}.pt")
    return found


def test_the_run_was_killed_fifty_times_all_along_its_way_and_in_the_middle_of_checkpoints(
    outcome: program.Outcome,
) -> None:
    assert outcome.num_kills == NUM_KILLS
    assert outcome.num_half_written >= NUM_KILLS // 5
    assert outcome.resumed_from == sorted(outcome.resumed_from)
    assert len(set(outcome.resumed_from)) >= 10


def test_the_sequence_of_samples_is_that_of_the_uninterrupted_run(folder: Path, outcome: program.Outcome) -> None:
    sequence = consumed(folder, "uninterrupted")
    assert consumed(folder, "killed") == sequence
    per_epoch = program.NUM_ROWS
    assert len(sequence) == program.NUM_EPOCHS * per_epoch
    for epoch in range(program.NUM_EPOCHS):
        rows = Counter(row for _, _, row in sequence[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert rows == Counter(range(per_epoch))
    assert sorted(group for _, group, _ in sequence) == list(range(len(sequence)))


def test_parameters_and_adams_moments_are_those_of_the_uninterrupted_run_bit_for_bit(
    folder: Path, outcome: program.Outcome
) -> None:
    expected, found = whole_state(folder, "uninterrupted"), whole_state(folder, "killed")
    leaves, theirs = flat(expected), flat(found)
    assert leaves.keys() == theirs.keys()
    assert any("exp_avg" in name for name in leaves)
    for name, value in leaves.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name], name
    start = load_file(folder / "model" / "model.safetensors")
    weights = [
        load_file(folder / "runs" / name / "checkpoints" / f"step-{program.NUM_VERSIONS}" / "hf" / "model.safetensors")
        for name in ("uninterrupted", "killed")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert weights[0].keys() == start.keys()
    assert any(not torch.equal(weights[0][key], start[key]) for key in start)


def test_nothing_half_written_is_left_at_the_end(folder: Path, outcome: program.Outcome) -> None:
    checkpoints = folder / "runs" / "killed" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []
    latest = latest_complete(checkpoints)
    assert latest is not None
    assert latest.name == f"step-{program.NUM_VERSIONS}"


@pytest.mark.timeout(300)
def test_off_policy_with_staleness_0_is_the_on_policy_run_group_by_group_and_bit_by_bit(
    folder: Path, outcome: program.Outcome
) -> None:
    assert program.config_of(folder, program.STALENESS_0).policy.mode == "off_policy"
    assert consumed(folder, program.STALENESS_0) == consumed(folder, "uninterrupted")
    found = flat(whole_state(folder, program.STALENESS_0))
    for name, value in flat(whole_state(folder, "uninterrupted")).items():
        assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name], name


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("hf/model.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
    "tampered": ("hf/model.safetensors", lambda path: flip(path, -5)),
    "missing": ("learner.json", Path.unlink),
    "manifest": ("manifest.json", lambda path: flip(path, 40)),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x01
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_by_name_and_the_run_goes_on_from_the_one_before(
    folder: Path, outcome: program.Outcome
) -> None:
    last = f"step-{program.NUM_VERSIONS}"
    for name, (file, damage) in DAMAGES.items():
        shutil.copytree(folder / "runs" / "killed", folder / "runs" / name)
        damage(folder / "runs" / name / "checkpoints" / last / file)
    start(folder, "finish", *DAMAGES)
    sequence = consumed(folder, "uninterrupted")
    expected = flat(whole_state(folder, "uninterrupted"))
    for name, (file, _) in DAMAGES.items():
        refused = folder / "runs" / name / "checkpoints" / last
        text = (folder / f"{name}.txt").read_text()
        assert f"{last} is damaged and left out: {refused / file}" in text
        assert consumed(folder, name) == sequence
        found = flat(whole_state(folder, name))
        assert all(torch.equal(value, found[key]) for key, value in expected.items() if isinstance(value, torch.Tensor))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}.{key}").items()}
