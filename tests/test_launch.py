"""The same command again: what becomes of a run that is there already."""

import logging
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from tests.run.stage import Rows, Stage
from vtriune import launch
from vtriune.config.sections.alarms import Alarms, EmptyBatches
from vtriune.config.tree import Checkpoint, Config, Policy
from vtriune.data.schema import DataError
from vtriune.record.trackers import MetricsFile
from vtriune.run.console import Screen
from vtriune.run.controller import Controller
from vtriune.run.folder import Claim, begin, take_back
from vtriune.run.lock import holding
from vtriune.run.schedule import ModeInForce

ROOT = Path(__file__).parents[1]
POLICY = Policy(rollout_batch=6, group_size=2)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path | None]]:
    """Folder and checkpoint of each training that launch begins; what it says goes to the terminal."""
    calls: list[tuple[Path, Path | None]] = []

    def train(config: Config, claimed: Claim) -> int:
        calls.append((claimed.folder, claimed.checkpoint))
        begin(claimed, config, Rows(1000), print)  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr(launch, "_train", train)
    monkeypatch.chdir(ROOT)
    return calls


def start(folder: Path, *words: str) -> int:
    """The digits' file under `folder`, with the length of the run among `words`, and a rate that a longer run can go on with."""
    length = [] if any("run.steps" in word for word in words) else ["run.steps=null"]
    places = [f"run.folder={folder}", "run.name=job", "policy.rollout_batch=6", "optimizer.decay=none"]
    return launch.main(["examples/digits.yaml", *places, *length, *words])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


async def run(folder: Path, **length: Any) -> None:
    await Stage(folder / "job", POLICY, **length).run()


@pytest.mark.parametrize(
    ("length", "words", "more"),
    [
        ({"steps": 3}, ["run.steps=3"], ["run.steps=4"]),
        ({"steps": None, "epochs": 1, "num_rows": 20}, ["run.epochs=1"], ["run.epochs=2"]),
    ],
    ids=["steps", "epochs"],
)
async def test_a_finished_run_says_so_exits_0_and_touches_nothing_until_it_is_made_longer_or_begun_anew(
    tmp_path: Path,
    trained: list[Any],
    capsys: pytest.CaptureFixture[str],
    length: dict[str, Any],
    words: list[str],
    more: list[str],
) -> None:
    await run(tmp_path, **length)
    last = tmp_path / "job" / "checkpoints" / names(tmp_path / "job" / "checkpoints")[-1]
    for again in ([], ["--resume"]):
        assert start(tmp_path, *words, *again) == 0
        assert trained == []
        said = capsys.readouterr().out
        assert str(last) in said
        assert more[0].partition("=")[0] in said
        assert "--fresh" in said
    assert names(tmp_path) == ["job"]
    assert start(tmp_path, *more) == 0
    assert trained == [(tmp_path / "job", last)], "a longer one goes on"
    assert start(tmp_path, *words, "--fresh") == 0
    assert trained[1:] == [(tmp_path / "job", None)]
    assert (tmp_path / "job.1" / "checkpoints" / last.name).is_dir()
    assert names(tmp_path / "job") == ["config", "config.yaml"]


async def test_epochs_whose_last_batches_were_filtered_away_are_finished_too(
    tmp_path: Path, trained: list[Any]
) -> None:
    stage = Stage(
        tmp_path / "job",
        Policy(rollout_batch=6, group_size=2, filter="zero_variance"),
        steps=None,
        epochs=1,
        num_rows=40,
    )
    stage.equal_rewards = lambda lease: lease.group_id % 3 > 0
    controller = await stage.run()
    assert controller.groups.version < controller.num_versions
    assert start(tmp_path, "run.epochs=1") == 0
    assert trained == []


async def test_an_unfinished_run_goes_on_and_one_without_a_checkpoint_is_moved_aside(
    tmp_path: Path, trained: list[Any]
) -> None:
    await run(tmp_path, steps=2)
    assert start(tmp_path, "run.steps=5") == 0
    (tmp_path / "job" / "checkpoints").rename(tmp_path / "job" / "elsewhere")
    assert start(tmp_path, "run.steps=5", "--resume") == 2
    assert start(tmp_path, "run.steps=5") == 0
    assert trained == [(tmp_path / "job", tmp_path / "job" / "checkpoints" / "step-2"), (tmp_path / "job", None)]
    assert (tmp_path / "job.1" / "elsewhere").is_dir()


@pytest.mark.parametrize(
    ("alarm", "code", "why"),
    [
        (EmptyBatches(versions=2, action="log"), 0, "trained to version 3 of 3"),
        (
            EmptyBatches(versions=2, action="stop"),
            3,
            "stopped at version 2 of 3 by alarms.empty_batches: nothing was learned",
        ),
    ],
    ids=["log", "stop"],
)
def test_a_run_says_in_one_line_why_it_ended_and_exits_3_when_an_alarm_stopped_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    alarm: EmptyBatches,
    code: int,
    why: str,
) -> None:
    async def flat_run(config: Config, claimed: Claim, screen: Screen) -> Controller:
        stage = Stage(claimed.folder, msgspec.structs.replace(POLICY, filter="zero_variance"), steps=3)
        stage.config = msgspec.structs.replace(stage.config, alarms=Alarms(empty_batches=alarm))
        stage.equal_rewards = lambda lease: True
        screen.account_for((await stage.open()).groups)
        await stage.controller.run()
        return stage.controller

    monkeypatch.setattr(launch, "_run", flat_run)
    monkeypatch.chdir(ROOT)
    assert start(tmp_path, "run.steps=3", "tracking.console=plain") == code
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith(why)]) == 1
    assert "filtered" in said


def test_a_log_that_cannot_be_written_is_told_once_and_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    handler = launch.LogFile("/dev/full")
    logger = logging.Logger("full")
    logger.addHandler(handler)
    for _ in range(3):
        logger.warning("nothing of this arrives")
    assert capsys.readouterr().err == "/dev/full cannot be written: [Errno 28] No space left on device\n"


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def stopped(folder: Path, *words: str, at: int = 4) -> None:
    """A run of the digits' file and `words` that has ended at a version, with a checkpoint of each."""
    assert start(folder, f"run.steps={at}", *words) == 0
    stage = Stage(folder / "job", POLICY, steps=at)
    stage.config = msgspec.structs.replace(stage.config, checkpoint=Checkpoint(every=1, keep=9))
    await stage.run()
    lines = MetricsFile(folder / "job" / "metrics.jsonl")
    for version in range(1, at + 1):
        lines.append({"version": version})
        (folder / "job" / "rollouts").mkdir(exist_ok=True)
        (folder / "job" / "rollouts" / f"version-{version:06d}.parquet").write_bytes(b"rows")


def damage(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "job" / "checkpoints" / f"step-{step}" / "weights").write_text("torn")


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("run.seed=7", "run.seed: 0 → 7: the order of samples"),
        ("model.freeze=[vit]", 'model.freeze: ["vit", "connector"] → ["vit"]: '),
        ("model.path=examples/digits/other", 'model.path: "examples/digits/model" → "examples/digits/other": '),
    ],
)
async def test_a_change_that_would_be_wrong_is_refused_by_name_and_touches_nothing(
    tmp_path: Path,
    trained: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    named: str,
) -> None:
    await stopped(tmp_path, at=2)
    before = everything(tmp_path / "job")
    trained.clear()
    monkeypatch.setattr(launch, "check", lambda config: None)
    assert start(tmp_path, "run.steps=5", "optimizer.lr=1e-7", word) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "begin a new run" in said
    assert trained == []
    assert everything(tmp_path / "job") == before


async def test_every_other_change_is_said_and_the_configuration_of_each_start_is_kept(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    await stopped(tmp_path, "loss.kind=grpo")
    assert start(tmp_path, "run.steps=9", "loss.kind=cispo", "policy.group_size=5") == 0
    said = capsys.readouterr().out
    for line in ("run.steps: 4 → 9", 'loss.kind: "grpo" → "cispo"', "policy.group_size: 8 → 5"):
        assert f"{line}\n" in said
    assert start(tmp_path, "run.steps=9", "loss.kind=cispo", "policy.group_size=5", "--resume-from", "3") == 0
    kept = tmp_path / "job" / "config"
    assert names(kept) == ["start-001-at-version-0.yaml", "start-002-at-version-4.yaml", "start-003-at-version-3.yaml"]
    sizes = [yaml.safe_load((kept / name).read_text())["policy"]["group_size"] for name in names(kept)]
    assert sizes == [8, 5, 5]
    assert (tmp_path / "job" / "config.yaml").read_text() == (kept / names(kept)[-1]).read_text()
    assert "policy.group_size: 8 → 5\n" in capsys.readouterr().out, "version 3 was trained under the first start"


async def test_a_run_whose_checkpoints_are_all_damaged_is_not_touched_and_the_ways_on_are_named(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    await stopped(tmp_path, at=2)
    damage(tmp_path, 1, 2)
    before = everything(tmp_path / "job")
    trained.clear()
    assert start(tmp_path, "run.steps=5") == 2
    said = capsys.readouterr().err
    assert "--resume-from step-N" in said
    assert "--fresh" in said
    assert all(f"step-{step} is damaged" in said and f"step-{step}/weights" in said for step in (1, 2))
    assert trained == []
    assert names(tmp_path) == ["job"]
    assert everything(tmp_path / "job") == before
    assert start(tmp_path, "run.steps=5", "--fresh") == 0
    assert names(tmp_path) == ["job", "job.1"]
    assert f"moved aside to {tmp_path / 'job.1'}" in capsys.readouterr().out


async def test_a_damaged_newest_checkpoint_is_named_and_left_behind_with_what_was_made_after_the_one_before(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    await stopped(tmp_path)
    damage(tmp_path, 4)
    assert start(tmp_path, "run.steps=5") == 0
    assert "step-4 is damaged and left out: " in capsys.readouterr().out
    folder, checkpoint = trained[-1]
    assert checkpoint == folder / "checkpoints" / "step-3"
    aside = take_back(folder, 3)
    assert aside == folder / "after-step-3.1"
    assert set(everything(aside)) >= {"checkpoints/step-4/weights", "rollouts/version-000004.parquet", "metrics.jsonl"}
    assert names(folder / "checkpoints") == ["step-1", "step-2", "step-3"]
    assert take_back(folder, 3) is None


async def test_a_run_goes_on_from_the_checkpoint_that_is_named_and_what_it_made_after_it_is_set_aside(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    await stopped(tmp_path)
    damage(tmp_path, 1)
    for word, reason in (("step-9", "step-1, step-2, step-3, step-4"), ("1", "step-1/weights")):
        assert start(tmp_path, "run.steps=4", "--resume-from", word) == 2
        assert reason in capsys.readouterr().err
    assert start(tmp_path, "run.steps=4", "--resume-from", "step-2") == 0, "the run is finished, but was not at step 2"
    folder, checkpoint = trained[-1]
    assert checkpoint == folder / "checkpoints" / "step-2"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = everything(folder)
    aside = take_back(folder, 2)
    assert aside is not None
    assert (aside / "metrics.jsonl").read_text() == "".join(lines[2:])
    moved = {f"{aside.name}/{name}" for name in everything(aside)} - {f"{aside.name}/metrics.jsonl"}
    assert len(moved) > 4
    assert {name.removeprefix(f"{aside.name}/") for name in moved} == before.keys() - everything(folder).keys()
    assert names(folder / "checkpoints") == ["step-1", "step-2"]


async def test_a_dry_run_says_what_a_start_would_do_or_who_runs_and_touches_nothing(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "rehearse", lambda config: Rows(1000, stored.pop() if stored else "train"))
    stored: list[str] = []
    await stopped(tmp_path, at=2)
    before = everything(tmp_path)
    capsys.readouterr()
    assert start(tmp_path, "run.steps=5", "optimizer.lr=1e-7", "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"a start goes on from {tmp_path / 'job' / 'checkpoints' / 'step-2'}\n" in said
    assert "optimizer.lr: " in said
    assert start(tmp_path, "run.steps=5", "run.seed=3", "--dry-run") == 2
    stored = ["others"]
    assert start(tmp_path, "run.steps=5", "--dry-run") == 2, "a start would refuse these data"
    assert "data.train: " in capsys.readouterr().err
    assert start(tmp_path, "run.steps=5", "--fresh", "--dry-run") == 0
    assert "moving an earlier run aside" in capsys.readouterr().out
    with holding(tmp_path / "job"):
        assert start(tmp_path, "run.steps=5", "--dry-run") == 0
    assert "is being run by pid" in capsys.readouterr().out
    assert everything(tmp_path / "job") == {
        name.removeprefix("job/"): content for name, content in before.items() if name.startswith("job/")
    }


async def test_a_changed_mode_overrules_the_live_switch_of_the_checkpoint_and_nothing_else_does(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(tmp_path, "run.steps=2") == 0
    stage = Stage(tmp_path / "job", POLICY, steps=2)
    controller = await stage.open()
    controller.switch(ModeInForce("off_policy", 1))
    await controller.run()
    claims: list[Claim] = []
    monkeypatch.setattr(launch, "_train", lambda config, claimed: claims.append(claimed) or 0)  # type: ignore[func-returns-value]
    assert start(tmp_path, "run.steps=4") == 0
    assert start(tmp_path, "run.steps=4", "policy.mode=off_policy") == 0
    assert [claimed.keeps_switch for claimed in claims] == [True, False]
    checkpoint = claims[0].checkpoint
    assert checkpoint is not None
    for claimed, mode in zip(claims, ("off_policy", "on_policy"), strict=True):
        resumed = await stage.open()
        await resumed.resume(checkpoint, keeps_switch=claimed.keeps_switch)
        assert resumed.in_force.mode == mode


async def test_a_live_switch_that_the_changed_file_forbids_is_refused_before_anything_starts(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    thawed = ["model.freeze=[]", "policy.in_flight=drain"]
    assert start(tmp_path, "run.steps=2", *thawed) == 0
    stage = Stage(tmp_path / "job", POLICY, steps=2)
    controller = await stage.open()
    controller.switch(ModeInForce("off_policy", 1))
    await controller.run()
    assert start(tmp_path, "run.steps=4", *thawed) == 0
    assert start(tmp_path, "run.steps=4", "model.freeze=[]", "policy.in_flight=continue") == 2
    assert "off_policy is in force by a live switch, which a change of policy.mode overrules" in capsys.readouterr().err


async def test_other_data_are_refused_before_any_process_starts_and_before_anything_is_written(
    tmp_path: Path, trained: list[Any]
) -> None:
    await stopped(tmp_path, at=2)
    before = everything(tmp_path / "job")
    checkpoint = tmp_path / "job" / "checkpoints" / "step-2"
    with pytest.raises(DataError, match=r"data\.train: .*run\.name"):
        begin(Claim(tmp_path / "job", checkpoint), Config(), Rows(9, "others"), print)  # type: ignore[arg-type]
    assert everything(tmp_path / "job") == before


async def test_a_folder_that_keeps_no_configuration_is_not_compared_and_says_so_and_an_unreadable_one_is_refused(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    await stopped(tmp_path, at=2)
    shutil.rmtree(tmp_path / "job" / "config")
    (tmp_path / "job" / "config.yaml").write_text("run: {")
    assert start(tmp_path, "run.steps=5") == 2
    assert "config.yaml: what the run was trained under cannot be read" in capsys.readouterr().err
    (tmp_path / "job" / "config.yaml").unlink()
    assert start(tmp_path, "run.steps=5", "run.seed=0") == 0
    assert "keeps no configuration of an earlier start" in capsys.readouterr().out
