"""The paper's comparisons: arms that load, a table that is resumed, intervals as scipy has them, verdicts by one rule."""

import itertools
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from msgspec.structs import replace

from examples.digits import ablations, claims, gains, held_out
from examples.digits.arms import ABLATIONS, ARMS, BOXES, Claim
from examples.digits.build import SOURCES
from examples.digits.intervals import Effect, effect
from tests.record.groups import scored, trajectory, verdict
from vtriune.config import check, load
from vtriune.record import archive, open_run
from vtriune.record.archive import Archived

ROOT = Path(__file__).parents[2]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and table in a folder of their own; data and model as fixed bytes."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(ablations, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ablations, "MODEL_FOLDER", tmp_path / "model")
    monkeypatch.setattr(ablations, "DATA_FOLDER", tmp_path / "data")
    return tmp_path


class Launched:
    """Stands in for the product's command: writes what a finished run leaves, and remembers what was asked."""

    def __init__(self, house: Path, gain: float = 0.25) -> None:
        self.house, self.gain, self.asked, self.exit_code = house, gain, [], 0

    def __call__(self, words: list[str]) -> int:
        self.asked.append(words)
        if self.exit_code:
            return self.exit_code
        name = next(word.partition("=")[2] for word in words if word.startswith("run.name="))
        write_run(self.house / "runs" / name, self.gain, seed=len(self.asked))
        return 0


def write_run(folder: Path, gain: float, seed: int = 0, num_rows: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "examples" / "digits.yaml", folder / "config.yaml")
    rng = np.random.default_rng(seed)
    for version, added in ((0, 0.0), (60, gain)):
        groups = []
        for number, (source, kind, row) in enumerate(itertools.product(SOURCES.values(), (0.0, 1.0), range(num_rows))):
            value = min(1.0, max(0.0, rng.normal(0.3 + added, 0.05)))
            ious = dict.fromkeys(held_out.IOUS, value) if source in BOXES else {}
            group = scored(
                [verdict(value, **ious)], source=source, group_id=number, purpose="evaluate", temperature=kind
            )
            groups.append(Archived(None, named(group, f"{source}-{row:03d}")))
        archive.write(folder / "rollouts", "evaluation", version, groups)
    for version in (31, 61):
        answer = trajectory(text="<answer>[{'bbox_2d': [0, 0, 9, 9], 'label': 'a'}]</answer>" if gain else "No box.")
        archive.write(folder / "rollouts", "version", version, [Archived(None, scored([verdict(1.0)], [answer]))])
    lines = [{"version": v, "reward/mean": 0.1 * v, "grad_norm": 1.0, "grad_norm/vit": 2.0} for v in range(1, 8)]
    for line in lines:
        line |= {f"source/{source}/component/label_first_iou@50": 0.05 * line["version"] for source in BOXES}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def named(group, sample_id):
    lease = group.group.lease
    lease = replace(lease, header=replace(lease.header, sample_id=sample_id))
    return replace(group, group=replace(group.group, lease=lease))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_run_that_the_shipped_file_allows(arm, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ablations.command(arm, 1, 60)
    config = load(words[0], words[1:])
    check(config)
    assert config.run.steps == 60
    assert config.evaluation.rows == ablations.NUM_HELD_OUT


def test_arms_of_different_names_are_different_runs_and_claims_speak_of_arms_that_their_ablation_runs():
    assert len(set(ARMS.values())) == len(ARMS)
    assert len({ablations.run_name(arm, 0, 60) for arm in ARMS}) == len(ARMS)
    for ablation in ABLATIONS.values():
        for claim in ablation.claims:
            assert {claim.better, claim.worse} <= set(ablation.arms)


def test_jobs_are_runs_at_a_time_and_each_leaves_its_line(house, monkeypatch):
    launch, beside = Launched(house), threading.Barrier(2, timeout=60)

    def launched(words):
        beside.wait()
        return launch(words)

    monkeypatch.setattr(ablations, "launch_run", launched)
    monkeypatch.setattr(ablations, "TABLE", house / "claims")
    monkeypatch.setattr(sys, "argv", ["ablations", "prompt_pool", "kl", "--seeds", "2", "--jobs", "2"])
    ablations.main()
    arms = ("shipped", "no prompt pool", "kl")
    assert sorted(map(claims.key, claims.read(house / "claims"))) == sorted((a, s, 30) for a in arms for s in (0, 1))


def test_a_result_that_is_there_is_not_made_again_and_one_of_other_data_is_replaced_and_said(house):
    launch, table = Launched(house), house / "claims"
    assert ablations.run("shipped", 0, 60, launch, table).startswith("done")
    assert ablations.run("shipped", 0, 60, launch, table) == "is in the table"
    assert ablations.run("shipped", 1, 60, launch, table).startswith("done")
    assert len(launch.asked) == 2
    (house / "model" / "model.safetensors").write_bytes(b"other weights")
    assert ablations.run("shipped", 0, 60, launch, table).startswith("replaced: of other data")
    lines = claims.read(table)
    assert sorted(map(claims.key, lines)) == [("shipped", 0, 60), ("shipped", 1, 60)]
    assert len({line["fingerprint"] for line in lines}) == 2


def test_a_run_that_did_not_end_leaves_no_line_and_says_how_to_go_on(house):
    launch, table = Launched(house), house / "claims"
    launch.exit_code = 3
    with pytest.raises(SystemExit, match="exit code 3; the same command goes on"):
        ablations.run("kl", 0, 30, launch, table)
    assert claims.read(table) == []


def test_the_report_compares_arms_row_by_row_and_says_what_is_not_measured(house):
    table = house / "claims"
    for seed in range(3):
        ablations.run("shipped", seed, 60, Launched(house, gain=0.3), table)
        ablations.run("iou .50", seed, 60, Launched(house, gain=0.1), table)
        ablations.run("iou average", seed, 60, Launched(house, gain=0.3), table)
    page = claims.report(table).read_text()
    lines = {line.split(" (")[0].removeprefix("| "): line for line in page.splitlines() if " (shipped − " in line}
    assert "reproduced in small" in lines["Dynamic IoU makes tighter boxes than a fixed .50"]
    assert "not reproduced" in lines["Dynamic IoU makes tighter boxes than the average threshold"]
    assert "not yet measured" in lines["Dynamic IoU learns faster than a fixed .99"]
    assert (table / "dynamic_iou.png").stat().st_size > 10_000
    found = claims.compare(Claim("", "shipped", "iou .50"), 60, claims.read(table), table)
    assert found.mean == pytest.approx(0.2, abs=0.02)
    assert len(found.by_seed) == 3


def test_an_arm_that_trains_on_no_boxes_is_reported_without_a_curve_of_them(house):
    table = house / "claims"
    ablations.run("reasoning only", 0, 60, Launched(house), table)
    lines = [line | {"training_iou50": []} for line in claims.read(table)]
    (table / claims.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| reasoning only | 1 |" in claims.report(table).read_text()
    assert (table / "tasks.png").stat().st_size > 5_000


def test_an_interval_is_scipys():
    rng = np.random.default_rng(1)
    values = rng.normal(0.1, 1.0, 300)
    found = effect([values])
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert found.mean == pytest.approx(values.mean())


def test_seeds_of_a_row_are_drawn_together():
    rng = np.random.default_rng(2)
    by_row = rng.normal(0, 1, 200)
    one, three = effect([by_row]), effect([by_row, by_row, by_row])
    # Three times the same rows are no more evidence than once.
    assert (one.low, one.high) == pytest.approx((three.low, three.high))


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (None, "not yet measured"),
        (Effect(0.1, 0.05, 0.15, (0.1, 0.11, 0.09)), "reproduced in small"),
        (Effect(0.1, -0.01, 0.2, (0.1, 0.1, 0.1)), "not reproduced"),
        (Effect(0.1, 0.05, 0.15, (-0.2, 0.1, 0.4)), "not reproduced"),
        (Effect(-0.1, -0.2, -0.05, (-0.1,)), "reversed"),
    ],
)
def test_a_verdict_needs_an_interval_beside_zero_and_an_effect_beyond_the_seeds_spread(found, word):
    assert claims.verdict(found) == word


def test_gains_are_paired_by_row_and_promises_that_are_broken_are_said(house, capsys, monkeypatch):
    for seed in range(2):
        write_run(house / f"run-{seed}", 0.2, seed)
        write_run(house / f"flat-{seed}", 0.0, seed)
        write_run(house / f"all-{seed}", 0.4, seed)
    for name, code in (("all", 0), ("run", 1), ("flat", 1)):
        monkeypatch.setattr("sys.argv", ["gains", *(str(house / f"{name}-{seed}") for seed in range(2))])
        with pytest.raises(SystemExit) as ended:
            gains.main()
        printed = capsys.readouterr().out
        kept = [line for line in printed.splitlines() if line.startswith("kept")]
        assert ended.value.code == code, printed
        assert ("sampled, mean over sources +0.2" in " ".join(kept)) == (name == "run")
        assert ("IoU 0.75 is met by 100.0% of answers" in " ".join(kept)) == (name != "flat")
        assert ("NOT KEPT IoU@95, digits_multi" in printed) == (name != "all"), "0.2 more does not double it"
    assert "NOT KEPT sampled, digits_multi" in printed
    assert "NOT KEPT flat-0: IoU 0.75 is met by 0.0% of answers" in printed


def test_a_threshold_at_whose_begin_nothing_was_archived_is_no_promise_kept(house):
    write_run(house / "run", 0.4)
    (house / "run" / "rollouts" / "version-000061.parquet").unlink()
    shares = dict(gains.reached(open_run(house / "run")))
    assert shares[0.75] == 1.0
    assert np.isnan(shares[0.9])


def test_rows_that_only_one_of_two_evaluations_answered_are_left_out():
    before = held_out.Answers(("a", "b", "d"), {"reward": np.array([0.0, 0.5, 0.1])})
    after = held_out.Answers(("b", "c", "d"), {"reward": np.array([1.0, 0.0, 0.1])})
    assert held_out.difference(before, after, "reward").tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="without a row in common"):
        held_out.difference(before, held_out.Answers(("x",), {"reward": np.zeros(1)}), "reward")
