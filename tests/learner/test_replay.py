"""A replay gives the learner the archived groups in the order of the run, with the controller's orders."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import learner.rank
import learner.rank_processes
import learner.replay
from learner.actor import LearnerActor
from learner.archived_run import ArchivedBatch, ReplayError, read_run
from learner.checkpointing import SavedTensors
from learner.replay import main, store_folders
from tests.learner import runs, worlds
from tests.system import recorded_run as program
from tests.system.test_kills import flat
from vtriune.config import Config, to_yaml
from vtriune.messages import ScoredGroup, TrainOrder, TrainReport
from vtriune.record import archive
from vtriune.record.archive import Archived
from vtriune.record.checkpoint import commit, stage


def renamed(scored: ScoredGroup, group_id: int) -> ScoredGroup:
    lease = msgspec.structs.replace(scored.group.lease, group_id=group_id)
    return msgspec.structs.replace(scored, group=msgspec.structs.replace(scored.group, lease=lease))


def a_run(folder: Path, num_versions: int = 3) -> list[TrainOrder]:
    """An archive of versions with four groups each in an order of their own; returns what was ordered."""
    world, rng = worlds.World(), np.random.default_rng(0)
    orders = []
    for version in range(1, num_versions + 1):
        made = worlds.random_groups(world, rng, 4, images="none")
        groups = [renamed(group, 10 * version + 3 - index) for index, group in enumerate(made)]
        ids = [group.group.lease.group_id for group in groups]
        order = runs.order_of(
            groups,
            version=version - 1,
            updates=[ids[:version], ids[version:]],
            mode="off_policy",
            bound=version,
            correction="icepop",
        )
        notes = {archive.ORDER: msgspec.json.encode(order).decode()}
        archive.write(
            folder / "rollouts", "version", version, (Archived(version - 1, group) for group in groups), notes
        )
        orders.append(order)
    return orders


def test_versions_come_in_order_with_what_was_ordered_whatever_the_run_is_configured_to(tmp_path: Path) -> None:
    ordered = a_run(tmp_path)
    batches = list(read_run(tmp_path))
    assert [batch.order for batch in batches] == ordered
    assert [[g.group.lease.group_id for g in batch.groups] for batch in batches] == [o.group_ids for o in ordered]


def test_an_archive_that_does_not_say_what_was_ordered_or_lacks_a_group_is_refused_by_name(tmp_path: Path) -> None:
    (order,) = a_run(tmp_path, 1)
    (_, path), *_ = archive.files(tmp_path / "rollouts", "version")
    groups = list(archive.read(path))
    archive.write(tmp_path / "rollouts", "version", 1, groups)
    with pytest.raises(ReplayError, match=r"version-000001.*does not say what was ordered.*run the training again"):
        list(read_run(tmp_path))
    archive.write(tmp_path / "rollouts", "version", 1, groups[1:], {archive.ORDER: msgspec.json.encode(order).decode()})
    with pytest.raises(ReplayError, match=r"groups \[13\] were trained on"):
        list(read_run(tmp_path))


def test_a_run_archived_without_log_probs_is_refused_by_name(tmp_path: Path) -> None:
    a_run(tmp_path, 1)
    (_, path), *_ = archive.files(tmp_path / "rollouts", "version")
    groups, notes = list(archive.read(path)), archive.notes_of(path)
    archive.write(tmp_path / "rollouts", "version", 1, groups, notes, keeps_logprobs=False)
    with pytest.raises(ReplayError, match=r"version-000001\.parquet: written under record\.logprobs: false"):
        list(read_run(tmp_path))


def test_a_run_without_archive_with_a_gap_a_damaged_file_or_without_stores_is_refused_by_name(tmp_path: Path) -> None:
    config = worlds.config_with(run={"steps": 3}, data={"store": str(tmp_path / "stores")})
    with pytest.raises(ReplayError, match="no archived version"):
        list(read_run(tmp_path))
    a_run(tmp_path)
    (tmp_path / "rollouts" / "version-000002.parquet").unlink()
    with pytest.raises(ReplayError, match=r"version-000003.*expected version 2"):
        list(read_run(tmp_path))
    with pytest.raises(ReplayError, match="no store of samples"):
        store_folders(config)
    first = tmp_path / "rollouts" / "version-000001.parquet"
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(ReplayError, match=r"version-000001\.parquet: is damaged"):
        list(read_run(tmp_path))


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main([str(tmp_path), "policy.update_batch=2", "loss.dual_clip=3"]) == 2
    assert "policy.update_batch=2: a replay trains what was ordered" in capsys.readouterr().err
    (tmp_path / "config.yaml").touch()
    for arguments in ([], ["--until", "3"], ["--locate", str(tmp_path)]):
        assert main([str(tmp_path), *arguments]) == 2
        assert "no archived version; name the folder of a run that trained" in capsys.readouterr().err


@pytest.mark.parametrize(("overrides", "correction"), [([], "icepop"), (["loss.correction=auto"], "decoupled")])
def test_the_correction_is_the_ordered_one_unless_an_override_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], correction: str
) -> None:
    a_run(tmp_path)
    (tmp_path / "config.yaml").write_text("loss: {correction: tis}\n")
    trained: list[TrainOrder] = []

    def train(config_of: Any, batches: Iterable[ArchivedBatch], out: Path, *, saves: bool) -> Iterator[TrainReport]:
        trained.extend(batch.order for batch in batches)
        return iter(())

    monkeypatch.setattr(learner.replay, "replay", train)
    assert main([str(tmp_path), *overrides, "--until", "2"]) == 0
    assert [order.correction for order in trained] == [correction] * 2


@pytest.mark.parametrize("version", ["0", "4", "-1"])
def test_a_version_that_is_not_archived_is_refused_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    a_run(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert main([str(tmp_path), "--until", version]) == 2
    assert "rollouts holds versions 1 to 3; name one of them" in capsys.readouterr().err


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of several updates a batch on stale groups, and then of one update on fresh ones."""
    folder = tmp_path_factory.mktemp("switched")
    program.record(folder)
    (folder / "stores" / "world").mkdir(parents=True)
    (folder / "stores" / "world" / "index.json").touch()
    command = [sys.executable, "-m", "tests.system.recorded_run", str(folder), "finish", program.SWITCHED]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env={**os.environ, **threads}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "runs" / program.SWITCHED
    (run / "config.yaml").write_text(to_yaml(program.config_of(folder, program.SWITCHED)))
    return run


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Every parameter and moment of a checkpoint."""
    dcp_to_torch_save(checkpoint / "dcp", target)
    return {name: leaf for name, leaf in flat(torch.load(target)).items() if not name.startswith(".rng")}


@pytest.fixture(scope="module")
def replayed(switched: Path) -> tuple[Path, int, str]:
    """Where the command's replay of the run `switched` was written, its exit code and what it printed."""
    out, printed = switched.parent / "replayed", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        world, _ = program.make_world()
        patch.setattr(learner.rank.LearnerRank, "_source", lambda _: world)
        code = main([str(switched), "--out", str(out)])
    return out, code, printed.getvalue()


@pytest.mark.timeout(300)
def test_a_replay_of_several_updates_on_stale_groups_is_the_run_bit_for_bit_in_parameters_and_moments(
    switched: Path, replayed: tuple[Path, int, str], tmp_path: Path
) -> None:
    out, code, printed = replayed
    lines = lines_of(out)
    assert len(lines) == program.NUM_SWITCHED
    assert max(line["staleness/max"] for line in lines) > 0
    checkpoint = switched / "checkpoints" / f"step-{program.NUM_SWITCHED}"
    expected = state_of(checkpoint, tmp_path / "run.pt")
    found = state_of(out / "checkpoint", tmp_path / "replay.pt")
    assert found.keys() == expected.keys()
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    differing = [name for name, value in tensors.items() if not torch.equal(value, found[name])]
    assert differing == []
    # The command says so, having compared every parameter and moment of torch's own reading.
    saved = SavedTensors(checkpoint)
    assert {f".{name}" for name in saved} == tensors.keys()
    assert any("exp_avg" in name for name in saved)
    assert all(torch.equal(saved[name], tensors[f".{name}"]) for name in saved)
    assert code == 0
    assert f"against {checkpoint}: the same bit for bit, {len(saved)} tensors" in printed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("factor", [1, 2])
def test_a_replay_is_resumed_where_the_run_was_under_what_each_start_was_configured_to(
    switched: Path, replayed: tuple[Path, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int
) -> None:
    world, _ = program.make_world()
    loaded: list[str] = []
    monkeypatch.setattr(learner.rank.LearnerRank, "_source", lambda _: world)
    load = learner.rank.LearnerRank.load
    monkeypatch.setattr(
        learner.rank.LearnerRank, "load", lambda rank, folder: (loaded.append(folder), load(rank, folder))
    )
    run = copied(switched, tmp_path / "run")
    first = (run / "config.yaml").read_text()
    (run / "config").mkdir()
    # The second start trained versions 3 to 5, of which the third made 4 and 5 again.
    for number, version, rate in ((1, 0, 0.01), (2, 2, 0.01 * factor), (3, 3, 0.01)):
        text = first.replace("lr: 0.01", f"lr: {rate}")
        (run / "config" / f"start-{number:03}-at-version-{version}.yaml").write_text(text)
    (run / "config.yaml").write_text("nothing reads this: 1")
    assert main([str(run), "--until", "4"]) == 0
    assert loaded == [str(run / "replay" / "resumed")] * 2
    lines, expected = lines_of(run / "replay"), lines_of(replayed[0])[:4]
    rates = [line["lr/llm"] / other["lr/llm"] for line, other in zip(lines, expected, strict=True)]
    assert rates == pytest.approx([1, 1, factor, 1])
    if factor == 1:
        for line in (*lines, *expected):
            for key in [key for key in line if key.startswith("time/")]:
                del line[key]
        assert lines == expected


class RecordedRank(LearnerActor):
    """A rank over the world's prompts."""

    def __init__(self, config: Config, store_folders: list[str]) -> None:
        super().__init__(config, store_folders)
        self._rank._source = lambda: program.make_world()[0]  # type: ignore[method-assign, assignment, return-value]


@pytest.mark.timeout(300)
def test_a_replay_trains_on_as_many_ranks_as_the_configuration_says(
    switched: Path, replayed: tuple[Path, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner.rank_processes, "LearnerActor", RecordedRank)
    arguments = [str(switched), "--out", str(tmp_path), "--until", "2", "--save", "cluster.learner.procs=2"]
    assert main(arguments) == 0
    assert {path.name for path in (tmp_path / "checkpoint" / "dcp").iterdir()} >= {"__0_0.distcp", "__1_0.distcp"}
    for one, two in zip(lines_of(replayed[0]), lines_of(tmp_path), strict=False):
        for key in ("loss", "grad_norm", "tokens/trained", "lr/llm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3), key


@pytest.mark.timeout(300)
def test_a_checkpoint_that_is_not_what_the_archive_gives_is_an_error_unless_an_override_explains_it(
    switched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, _ = program.make_world()
    monkeypatch.setattr(learner.rank.LearnerRank, "_source", lambda _: world)
    run = copied(switched, tmp_path / "run")
    last = run / "checkpoints" / f"step-{program.NUM_SWITCHED}"
    shutil.copytree(last, run / "checkpoints" / "step-2")
    assert main([str(run), "--until", "2"]) == 2
    assert "step-2/manifest.json is of format 1 and step 30" in capsys.readouterr().err
    sealed(run / "checkpoints", 2, last)
    assert main([str(run), "--until", "2"]) == 1
    assert "tensors differ\n  model." in capsys.readouterr().out
    assert main([str(run), "--until", "1"]) == 0
    assert "parameters and moments" not in capsys.readouterr().out
    assert main([str(run), "--until", "2", "--save", "optimizer.lr=0.02"]) == 0
    assert "tensors differ\n  model." in capsys.readouterr().out


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target


def sealed(checkpoints: Path, version: int, source: Path) -> None:
    """A whole checkpoint of `version` with another's content."""
    staging = stage(checkpoints, version)
    shutil.copytree(source, staging, dirs_exist_ok=True)
    commit(staging)


def archived_otherwise(run: Path, version: int, change: Callable[[list[Archived]], list[Archived]]) -> None:
    """Write a version's file anew with changed groups."""
    path = run / "rollouts" / f"version-{version:06d}.parquet"
    notes = {archive.ORDER: archive.notes_of(path)[archive.ORDER]}
    archive.write(path.parent, "version", version, change(list(archive.read(path))), notes)


def test_two_runs_are_located_by_their_archives_then_by_their_parameters(
    switched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = f"step-{program.NUM_SWITCHED}"
    other = copied(switched, tmp_path / "other")
    assert main([str(switched), "--locate", str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"trained on the same up to version {program.NUM_SWITCHED}" in printed
    assert f"against {other}/checkpoints/{last}: the same bit for bit" in printed

    # Other parameters after the same training: only the tensors say so.
    dcp = other / "checkpoints" / last / "dcp"
    state = {name: value.clone() for name, value in SavedTensors(dcp.parent).items()}
    state["model.lm_head.weight"][0, 0] += 1
    torch.distributed.checkpoint.save(state, checkpoint_id=dcp, no_dist=True)
    sealed(other / "checkpoints", program.NUM_SWITCHED, dcp.parent)
    assert main([str(switched), "--locate", str(other)]) == 1
    printed = capsys.readouterr().out
    assert "first difference" not in printed
    assert "1 of " in printed
    assert "model.lm_head.weight: 1 of 3072 values, by up to 1" in printed

    # A log-prob one bit away, in a run whose rate is another.
    def one_bit(groups: list[Archived]) -> list[Archived]:
        groups[2].group.group.trajectories[1].logprobs.view(np.int32)[0] ^= 1
        return groups

    archived_otherwise(other, 4, one_bit)
    config = (other / "config.yaml").read_text().replace("lr: 0.01", "lr: 0.02")
    (other / "config.yaml").write_text(config)
    assert main([str(switched), "--locate", str(other)]) == 1
    printed = capsys.readouterr().out
    (_, _, third, *_) = archive.read(other / "rollouts" / "version-000004.parquet")
    header = third.group.group.lease.header
    assert "configuration: optimizer.lr: 0.01 here, 0.02 there" in printed
    place = f"version 4, update 2, group {third.group.group.lease.group_id} ({header.source}, sample {header.sample_id}: row "
    assert f"first difference: {place}" in printed
    assert "completion 1, token 0: log-prob -" in printed
    assert "parameters are not compared: no version up to 3 has a checkpoint in both" in printed
    assert main([str(switched), "--locate", str(other), "--until", "3"]) == 0
    assert "trained on the same up to version 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(switched), "--locate", str(other), "optimizer.lr=0.1"])
    assert "it takes no overrides" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_falling_rate_goes_on_falling_with_progress_through_a_switch_from_four_updates_a_batch_to_one(
    switched: Path,
) -> None:
    warmup = program.config_of(switched.parents[1], program.SWITCHED).optimizer.warmup
    for line in lines_of(switched):
        num_updates = 4 if line["policy/is_off_policy"] else 1
        # The last update of version v begins at this share of the run.
        begin = (line["version"] - 1 / num_updates) / program.NUM_SWITCHED
        if begin > warmup:
            left = (1 - begin) / (1 - warmup)
            assert line["lr/llm"] == pytest.approx(1e-2 * 0.5 * (1 - math.cos(math.pi * left)), rel=0.02, abs=1e-5), (
                line["version"]
            )
    modes = [line["policy/is_off_policy"] for line in lines_of(switched)]
    assert modes == sorted(modes, reverse=True)
    assert set(modes) == {0.0, 1.0}
