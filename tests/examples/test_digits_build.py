"""The digits data: deterministic, split by handwritten image, boxes tight around the ink, and every gold answer right by its own
verifier."""

import hashlib
import io
import itertools
import json
import pathlib
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from examples.digits.build import SCHEMA, SOURCES, reward_model, rows, write
from examples.digits.demonstrations import Noise, box_answer, boxes_of, respond, respond_noisily
from examples.digits.rendering import BAR, Scene, digit_pool, draw, in_thousandths, overlap
from examples.digits.scenes import MAX_OVERLAP, PERCEPTION, SIDES_PX, TASKS, compose
from verifiers import RewardOptions, check_gold, score, spec_from_row
from vtriune.data.schema import parse_file_name

AVERAGE = RewardOptions(iou_threshold="average")


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.parquet"))}


def first_rows(task: str, num_rows: int = 60) -> list[dict]:
    return list(itertools.islice(rows(task, "train", 0), num_rows))


def scenes_of(task: str, num: int, seed: int = 1):
    rng, pool = random.Random(seed), digit_pool("test")
    return [compose(task, pool, rng) for _ in range(num)]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, {"test": 12}, seed)
    assert len(digests(tmp_path / "a")) == len(TASKS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not set(digests(tmp_path / "a").values()) & set(digests(tmp_path / "c").values())


def test_files_that_are_there_stay_and_those_of_other_options_or_a_missing_one_are_made_anew(tmp_path):
    paths = write(tmp_path, {"test": 2}, 0)
    made = {path: path.stat().st_mtime_ns for path in paths}
    assert write(tmp_path, {"test": 2}, 0) == paths
    assert {path: path.stat().st_mtime_ns for path in paths} == made
    paths[0].unlink()
    write(tmp_path, {"test": 2}, 0)
    assert paths[0].exists()
    write(tmp_path, {"test": 3}, 0)
    assert len(list(tmp_path.rglob("*.parquet"))) == len(TASKS)


def test_train_and_held_out_digits_are_different_images_and_together_all_of_them():
    train, test = digit_pool("train"), digit_pool("test")
    assert not set(train.ids) & set(test.ids)
    assert sorted(train.ids + test.ids) == list(range(1797))
    assert all(len(positions) >= 20 for positions in test.by_value)


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="'valid'"):
        digit_pool("valid")


def test_files_have_the_schema_and_names_of_the_released_data(tmp_path):
    for path in write(tmp_path, {"train": 5}, 0):
        table = pq.read_table(path)
        name = parse_file_name(path)
        assert table.schema.equals(SCHEMA)
        assert (name.split, name.num_rows, name.source) == ("train", 5, table["data_source"][0].as_py())
        assert SOURCES[name.task] == name.source
    assert not list(tmp_path.rglob("test_*"))


@pytest.mark.parametrize("task", TASKS)
def test_every_gold_answer_scores_one_with_its_own_verifier(task):
    for row in first_rows(task):
        spec = spec_from_row(row["reward_model"])
        assert check_gold(spec, options=AVERAGE) is None
        assert spec.verifier == ("detection" if task in PERCEPTION else "mathverify")
        assert row["prompt"][-1]["content"].count("<image>") == len(row["images"]) == 1


def demonstrated(task, rng, noise=None):
    pool = digit_pool("train")
    while True:
        scene, questions = compose(task, pool, rng)
        for question in questions:
            response = respond_noisily(question, scene, noise, rng) if noise else respond(question, scene)
            yield response, spec_from_row(reward_model(question, scene, rng))


@pytest.mark.parametrize("task", TASKS)
def test_clean_demonstrations_score_one_under_the_strictest_threshold(task):
    for response, spec in itertools.islice(demonstrated(task, random.Random(5)), 40):
        verdict = score(response, spec, options=RewardOptions(iou_threshold=0.99))
        assert verdict.reward == pytest.approx(1.0, abs=1e-9), response


@pytest.mark.parametrize("task", [task for task in TASKS if task not in PERCEPTION])
def test_a_stated_share_of_noisy_demonstrations_is_wrong(task):
    noise = Noise(wrong=dict.fromkeys(TASKS, 0.5))
    pairs = itertools.islice(demonstrated(task, random.Random(9), noise), 400)
    scored = [score(*pair, options=AVERAGE).accuracy for pair in pairs]
    assert 0.4 < np.mean([value < 0.999 for value in scored]) < 0.6


def test_the_rows_of_detection_are_scored_in_different_ways():
    weights = {json.dumps(row["reward_model"]["verifier_parm"]["det_reward_ratio"]) for row in first_rows("detection")}
    assert len(weights) == 3
    assert any('"map": 0.3' in each for each in weights)


def test_an_edge_that_is_a_little_off_costs_a_little():
    row = next(row for row in first_rows("detection") if len(json.loads(row["reward_model"]["ground_truth"])) > 1)
    boxes = json.loads(row["reward_model"]["ground_truth"])
    spec = spec_from_row(row["reward_model"])

    def mean_iou(shift: int) -> float:
        moved = [(box["label"], [box["bbox_2d"][0] + shift, *box["bbox_2d"][1:]]) for box in boxes]
        verdict = score(f"<think></think><answer>{box_answer(moved)}</answer>", spec, options=AVERAGE)
        return verdict.components["label_first_iou@50"]

    ious = [mean_iou(shift) for shift in (0, 4, 8, 16, 32)]
    assert ious == sorted(ious, reverse=True)
    assert len(set(ious)) == len(ious)
    assert 0.8 < ious[2] < 1.0 == ious[0]


@pytest.mark.parametrize("task", TASKS)
def test_a_box_is_tight_around_what_was_drawn_inside_the_picture(task):
    for scene, _ in scenes_of(task, 10):
        for thing in scene.things:
            rng, x1, y1, x2, y2 = random.Random(0), *thing.box
            blank = draw(Scene(scene.width, scene.height, ()), random.Random(0))
            drawn = draw(Scene(scene.width, scene.height, (thing,)), rng)
            change = blank.astype(int) - drawn
            rows_changed, columns_changed = np.flatnonzero(change.any(1)), np.flatnonzero(change.any(0))
            assert (columns_changed[0], rows_changed[0]) == (x1, y1)
            assert (columns_changed[-1] + 1, rows_changed[-1] + 1) == (x2, y2)
            # Ink and not only its soft rim.
            assert min(change[y1].max(), change[y2 - 1].max(), change[:, x1].max(), change[:, x2 - 1].max()) > 40
            assert x1 >= 2 <= y1
            assert x2 <= scene.width - 2
            assert y2 <= scene.height - 2


def test_pictures_come_in_many_sizes_and_things_overlap_a_little_at_most():
    composed = scenes_of("detection", 60)
    assert len({(scene.width, scene.height) for scene, _ in composed}) > 50
    assert all(SIDES_PX[0] <= side <= SIDES_PX[1] for scene, _ in composed for side in (scene.width, scene.height))
    shared = [
        overlap(one.box, [other.box]) for scene, _ in composed for one, other in itertools.combinations(scene.things, 2)
    ]
    assert 0 < max(shared) <= MAX_OVERLAP


def test_a_detection_asks_for_one_to_six_digits_of_one_or_several_values_from_left_to_right():
    numbers, values = set(), set()
    for scene, questions in scenes_of("detection", 150):
        for question in questions:
            numbers.add(len(question.things))
            values.add(len({thing.value for thing in question.things}))
            lefts = [box[0] for _, box in boxes_of(question, scene)]
            assert lefts == sorted(lefts)
            asked = {int(letter) for letter in question.prompt.split(" Think")[0] if letter.isdigit()} or set(range(10))
            assert set(question.things) == {thing for thing in scene.things if thing.value in asked}
    assert numbers == {1, 2, 3, 4, 5, 6}
    assert max(values) > 1


def test_a_grounding_names_exactly_one_digit():
    kinds = set()
    for scene, questions in scenes_of("grounding", 150):
        for question in questions:
            words = question.prompt.split(" Think")[0].removeprefix("Locate the ").removesuffix(".").split()
            found = [thing for thing in scene.things if str(thing.value) in words[:2]]
            match words:
                case [_]:
                    kinds.add("value")
                case ["largest" | "smallest" as which, _]:
                    kinds.add(which)
                    found = [(max if which == "largest" else min)(found, key=lambda thing: thing.area)]
                case [_, *side, mark]:
                    kinds.add(side[0])
                    found = [thing for thing in found if lies(thing, side[0], marked(scene, mark))]
            assert found == list(question.things), question.prompt
    assert kinds == {"value", "largest", "smallest", "left", "right", "above", "below"}


def marked(scene, name):
    (thing,) = (thing for thing in scene.things if str(thing.value) == name)
    return thing


def lies(thing, side, mark):
    """Whether the middle of `thing` lies on that side of the middle of `mark`."""
    axis = 0 if side in ("left", "right") else 1
    there = (sum(each.box[axis] + each.box[axis + 2] for each in (thing,)), mark.box[axis] + mark.box[axis + 2])
    return there[0] < there[1] if side in ("left", "above") else there[0] > there[1]


def test_answers_agree_with_the_things_in_the_picture():
    for scene, questions in scenes_of("counting", 100):
        values = [thing.value for thing in scene.things]
        for question in questions:
            asked = question.prompt.removeprefix("How many ").split()[0].rstrip("s")
            assert int(question.answer) == (len(values) if asked == "digit" else values.count(int(asked)))
    for scene, questions in scenes_of("chart", 100):
        heights = {
            thing.value: round((bar.box[3] - bar.box[1]) / (scene.height / 7))
            for thing in scene.things
            for bar in scene.things
            if thing.value != BAR == bar.value and bar.left < (thing.box[0] + thing.box[2]) / 2 < bar.box[2]
        }
        for question in questions:
            words = question.prompt.rstrip("?").split()
            if words[0] == "How":
                assert int(question.answer) == heights[int(words[-1])]
            elif "total" in words:
                assert int(question.answer) == sum(heights.values())
            else:
                extreme = (max if "tallest" in words else min)(heights.values())
                assert heights[int(question.answer)] == extreme


def test_gold_boxes_are_thousandths_of_the_picture_as_stored():
    for row in first_rows("grounding", 20):
        picture = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        (box,) = json.loads(row["reward_model"]["ground_truth"])
        x1, y1, x2, y2 = (value / 1000 * side for value, side in zip(box["bbox_2d"], picture.size * 2, strict=True))
        assert all(abs(value - round(value)) < 0.1 for value in (x1, y1, x2, y2))
        assert in_thousandths((round(x1), round(y1), round(x2), round(y2)), picture.size) == tuple(box["bbox_2d"])
