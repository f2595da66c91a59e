"""The photographs' questions: each picture has its licence, every gold answer can be earned, held-out pictures are apart."""

import json
from pathlib import Path

import pytest
from PIL import Image

from examples.photos.build import HERE, TASKS, rows, shipped, write
from verifiers import ImageSize, RewardSpec, score

ABOUT = json.loads((HERE / "annotations.json").read_text())
VERIFIERS = {
    "grounding": "detection",
    "detection": "detection",
    "counting": "counting",
    "ocr": "ocr",
    "choices": "multiple_choice",
}


def test_every_source_has_rows_in_both_splits_and_no_picture_is_in_both(tmp_path: Path) -> None:
    files = write(tmp_path)
    assert {(path.parent.name, path.stem) for path in files} == {
        (split, task) for split in ("train", "test") for task in TASKS
    }
    pictures: dict[str, set[str]] = {"train": set(), "test": set()}
    num_rows = 0
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert (path.parent / row["image"]).is_file()
            assert row["question"].startswith("<image>")
            pictures[path.parent.name].add(row["image"])
            num_rows += 1
    assert not pictures["train"] & pictures["test"]
    assert num_rows == 63


@pytest.mark.parametrize("name", ABOUT)
def test_every_picture_has_a_licence_and_boxes_that_lie_on_it(name: str) -> None:
    about = ABOUT[name]
    with Image.open(shipped(about["file"])) as picture:
        width, height = picture.size
    assert about["licence"]
    for places in about["boxes"].values():
        for x1, y1, x2, y2 in places:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height


@pytest.mark.parametrize("name", ABOUT)
def test_every_gold_answer_earns_the_whole_reward(name: str) -> None:
    with Image.open(shipped(ABOUT[name]["file"])) as picture:
        size = ImageSize(picture.size, picture.size)
    for row in rows(ABOUT[name]):
        spec = RewardSpec(ground_truth=row.answer, verifier=VERIFIERS[row.task])
        verdict = score(f"<think>I look.</think><answer>{row.answer}</answer>", spec, image_sizes=[size])
        assert verdict.accuracy == pytest.approx(1.0), row


def test_a_package_that_is_not_there_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_package is not installed; `make setup`"):
        shipped("no_such_package/data/a.png")
