"""The digits data: deterministic, split by handwritten image, and every gold answer right by its own verifier."""

import hashlib
import itertools
import json
import pathlib
import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from examples.digits.build import SOURCES, rows, write_split
from examples.digits.demonstrations import Noise, respond, respond_noisily
from examples.digits.rendering import BLANK, CELL_PX, choose_ink, digit_pool, draw
from examples.digits.scenes import PERCEPTION, SCENES, TASKS, cell_box
from verifiers import RewardOptions, check_gold, score, spec_from_row
from vtriune.data.schema import PARQUET_SCHEMA, parse_file_name

AVERAGE = RewardOptions(iou_threshold="average")


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.parquet"))}


def first_rows(task: str, num_rows: int = 60) -> list[dict]:
    return list(itertools.islice(rows(task, "train", 0, digit_pool("train")), num_rows))


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_split(tmp_path / name, "test", 12, seed)
    assert len(digests(tmp_path / "a")) == len(TASKS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not set(digests(tmp_path / "a").values()) & set(digests(tmp_path / "c").values())


def test_train_and_held_out_digits_are_different_images_and_together_all_of_them():
    train, test = digit_pool("train"), digit_pool("test")
    assert not set(train.ids) & set(test.ids)
    assert sorted(train.ids + test.ids) == list(range(1797))
    assert all(len(positions) >= 20 for positions in test.by_value)


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="'valid'"):
        digit_pool("valid")


def test_files_have_the_schema_and_names_of_the_released_data(tmp_path):
    for path in write_split(tmp_path, "train", 5, 0):
        table = pq.read_table(path)
        name = parse_file_name(path)
        assert table.schema.equals(PARQUET_SCHEMA)
        assert (name.split, name.num_rows, name.source) == ("train", 5, table["data_source"][0].as_py())
        assert SOURCES[name.task] == name.source
    assert not list(tmp_path.rglob("test_*"))


@pytest.mark.parametrize("task", TASKS)
def test_every_gold_answer_scores_one_with_its_own_verifier(task):
    for row in first_rows(task):
        spec = spec_from_row(row["reward_model"])
        assert check_gold(spec, options=AVERAGE) is None
        assert spec.verifier == ("detection" if task in PERCEPTION else "mathverify")


@pytest.mark.parametrize("task", TASKS)
def test_clean_demonstrations_score_one_under_the_strictest_threshold(task):
    rng = random.Random(5)
    for row in itertools.islice(demonstrated(task, rng), 40):
        verdict = score(row[0], row[1], options=RewardOptions(iou_threshold=0.99))
        assert verdict.reward == pytest.approx(1.0, abs=1e-9), row[0]


def demonstrated(task, rng, noise=None):
    from examples.digits.build import reward_model

    while True:
        for question in SCENES[task](rng).questions:
            response = respond_noisily(question, noise, rng) if noise else respond(question)
            yield response, spec_from_row(reward_model(question))


@pytest.mark.parametrize("task", TASKS)
def test_a_stated_share_of_noisy_demonstrations_is_wrong(task):
    noise = Noise(wrong=dict.fromkeys(TASKS, 0.5))
    scored = [
        score(*row, options=AVERAGE).accuracy
        for row in itertools.islice(demonstrated(task, random.Random(9), noise), 400)
    ]
    assert 0.4 < np.mean([value < 0.999 for value in scored]) < 0.6


def test_a_prompt_has_as_many_image_markers_as_images():
    for task in TASKS:
        for row in first_rows(task, 20):
            assert row["prompt"][-1]["role"] == "user"
            assert row["prompt"][-1]["content"].count("<image>") == len(row["images"]) == 1


def test_a_partly_right_detection_scores_between_zero_and_one():
    row = next(row for row in first_rows("detection") if len(json.loads(row["reward_model"]["ground_truth"])) > 1)
    boxes = json.loads(row["reward_model"]["ground_truth"])
    spec = spec_from_row(row["reward_model"])
    found = score(f"<think></think><answer>{json.dumps(boxes[:1])}</answer>", spec, options=AVERAGE).accuracy
    shifted = [{**box, "bbox_2d": [box["bbox_2d"][0], *box["bbox_2d"][1:3], box["bbox_2d"][3] - 7]} for box in boxes]
    loose = score(f"<think></think><answer>{json.dumps(shifted)}</answer>", spec, options=AVERAGE).accuracy
    assert 0.0 < found < 1.0
    assert 0.0 < loose < 1.0


def test_a_box_is_the_cell_of_its_digit_and_ink_stays_inside_cells():
    rng, pool = random.Random(1), digit_pool("test")
    for _ in range(30):
        scene = SCENES["detection"](rng)
        pixels = draw(choose_ink(scene.cells, pool, rng), pool)
        assert pixels.shape == (len(scene.cells) * CELL_PX, len(scene.cells[0]) * CELL_PX)
        for question in scene.questions:
            wanted = {
                cell_box(r, c)
                for r, line in enumerate(scene.cells)
                for c, value in enumerate(line)
                if str(value) == question.label
            }
            assert set(question.boxes_xyxy) == wanted
        for r, line in enumerate(scene.cells):
            for c, value in enumerate(line):
                x1, y1, x2, y2 = cell_box(r, c)
                assert (pixels[y1:y2, x1:x2].min() == 255) == (value == BLANK)


def test_counts_and_readings_agree_with_the_cells():
    rng = random.Random(2)
    for _ in range(100):
        scene = SCENES["counting"](rng)
        flat = [value for line in scene.cells for value in line]
        for question in scene.questions:
            asked = question.prompt.removeprefix("How many ").split()[0].rstrip("s")
            expected = sum(value >= 0 for value in flat) if asked == "digit" else flat.count(int(asked))
            assert int(question.answer) == expected
        for question in SCENES["ocr"](rng).questions:
            assert question.answer == question.thought.replace(" ", "")
            assert question.answer[0] != "0"
