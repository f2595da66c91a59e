"""What was recorded is joined with the data that it came from; what is missing is named."""

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.data.rows import row, write_parquet
from tests.record.groups import scored, trajectory, verdict
from vtriune.config import Config
from vtriune.config.load import to_yaml
from vtriune.data import DataError, Store, build_store
from vtriune.messages import ScoredGroup
from vtriune.record import archive, open_run


def asked(store: Store, row_number: int, group_id: int) -> ScoredGroup:
    """A group of two answers, "a" and "b", of which the second is wrong."""
    answers = [trajectory(text=text) for text in "ab"]
    group = scored([verdict(1.0), verdict(0.0)], answers, group_id=group_id)
    lease = replace(group.group.lease, sample=store.ref(row_number), header=store.header(row_number))
    return replace(group, group=replace(group.group, lease=lease))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "mine"
    store = build_store(
        [write_parquet(tmp_path / "rows.parquet", [row(n, "s") for n in range(4)])], run.parent / "stores"
    )
    archive.write(run / "rollouts", "version", 1, [archive.Archived(0, asked(store, 2, 0))])
    archive.write(run / "rollouts", "version", 2, [archive.Archived(1, asked(store, n, 1 + n)) for n in (3, 0)])
    archive.write(run / "rollouts", "evaluation", 2, [archive.Archived(None, asked(store, 1, 9))])
    (run / "config.yaml").write_text(to_yaml(Config()))
    (run / "metrics.jsonl").write_text('{"version": 0}\n{"version": 1, "reward/mean": 0.5}\n')
    return run


def test_an_answer_leads_to_its_verdict_and_to_the_row_that_was_asked(folder: Path) -> None:
    run = open_run(folder)
    found = [(each.version, each.group_id, each.completion, each.text, each.verdict.reward) for each in run.answers()]
    assert found == [(v, g, c, "ab"[c], 1.0 - c) for v, g in ((1, 0), (2, 4), (2, 1)) for c in (0, 1)]
    for answer in [*run.answers(), *run.answers("evaluation")]:
        sample = run.sample(answer)
        assert (sample.sample_id, sample.source) == (answer.header.sample_id, answer.header.source)
        assert sample.reward == answer.header.reward
        assert sample.images == [row(answer.header.file_row)["images"][0]["bytes"]]
        assert Path(answer.header.file).name == "rows.parquet"
    assert [each.group_id for each in run.answers("version", 2)] == [4, 4, 1, 1]
    assert run.metrics() == [{"version": 0}, {"version": 1, "reward/mean": 0.5}]


def test_a_store_that_is_gone_and_a_folder_that_is_no_run_are_named(folder: Path, tmp_path: Path) -> None:
    run = open_run(folder)
    shutil.rmtree(folder.parent / "stores")
    with pytest.raises(DataError, match=r"no store is there; the run's own command builds it again"):
        run.sample(next(run.answers()))
    with pytest.raises(DataError, match=r"is no run folder \(.*config\.yaml: cannot be read"):
        open_run(tmp_path)
