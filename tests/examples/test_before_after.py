"""The picture of held-out boxes before and after a run."""

import sys

import pyarrow.parquet as pq
import pytest
from matplotlib import image
from msgspec.structs import replace

from examples.digits import before_after
from examples.digits.build import SOURCES, write
from examples.digits.scenes import PERCEPTION
from tests.record.groups import scored, trajectory, verdict
from verifiers import spec_from_row
from vtriune.record import archive
from vtriune.record.archive import Archived


def answered(path, row, number, text, temperature):
    table = pq.read_table(path).slice(row, 1).to_pylist()[0]
    spec = spec_from_row(table["reward_model"])
    found = scored(
        [verdict(1.0, **{"label_first_iou@50": 0.5})], [trajectory(text=text.format(spec.ground_truth))],
        source=table["data_source"], group_id=number, purpose="evaluate", temperature=temperature, spec=spec,
    )  # fmt: skip
    lease = found.group.lease
    header = replace(lease.header, file=str(path), file_row=row, sample_id=f"{path.name}-{row}")
    return Archived(None, replace(found, group=replace(found.group, lease=replace(lease, header=header))))


@pytest.fixture
def run(tmp_path):
    """A run whose first answers are no boxes and whose last ones are the gold."""
    paths = [path for path in write(tmp_path / "data", {"test": 7}, 0) if any(task in path.name for task in PERCEPTION)]
    for version, text in ((0, "<answer>nothing"), (60, "<think></think><answer>{}</answer>")):
        groups = [
            answered(path, row, number * 100 + row, text, temperature)
            for number, (path, temperature) in enumerate((path, kind) for path in paths for kind in (0.0, 1.0))
            for row in reversed(range(7))
        ]
        archive.write(tmp_path / "run" / "rollouts", "evaluation", version, groups)
    return tmp_path / "run"


def test_the_first_greedy_answers_of_both_box_tasks_are_shown_in_the_order_of_their_rows(run):
    shown = before_after.shown(run / "rollouts" / "evaluation-000060.parquet")
    leases = [group.group.lease for group in shown]
    assert [lease.header.source for lease in leases] == [SOURCES[task] for task in PERCEPTION for _ in range(5)]
    assert [lease.header.file_row for lease in leases] == [0, 1, 2, 3, 4] * 2
    assert {lease.sampling.temperature for lease in leases} == {0.0}


def test_the_picture_has_gold_boxes_in_both_lines_and_answers_where_there_are_any(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["before_after", str(run)])
    before_after.main()
    pixels = image.imread(run / "boxes.png")[..., :3]
    upper, lower = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]

    def is_coloured(part, channel):
        others = [c for c in range(3) if c != channel]
        return ((part[..., channel] > 0.5) & (part[..., others].max(axis=-1) < 0.35)).sum() > 200

    assert is_coloured(upper, 1)
    assert not is_coloured(upper, 0)
    assert is_coloured(lower, 0)


def test_a_run_with_one_evaluation_is_refused_by_name(run, monkeypatch):
    (run / "rollouts" / "evaluation-000060.parquet").unlink()
    monkeypatch.setattr(sys, "argv", ["before_after", str(run)])
    with pytest.raises(SystemExit, match=r"1 archived evaluations; a run has two with evaluation\.before and \.after"):
        before_after.main()
