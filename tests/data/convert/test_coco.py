"""COCO, RefCOCO and CLEVR as rows: what pycocotools reads is what a verifier gets; what is left out is counted."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from tests.data.rows import encoded
from vtriune.data import Store, build_store
from vtriune.data.__main__ import main
from vtriune.data.box_frames import corners, labelled
from vtriune.data.validate import Checks

NAMES = {1: "cat", 7: "traffic light"}
SIZES = {11: (64, 48), 12: (40, 80), 13: (50, 50)}


def instances() -> dict[str, Any]:
    def annotation(number: int, image: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
        area = bbox[2] * bbox[3]
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": bbox,
            "iscrowd": 0,
            "area": area,
            **more,
        }

    return {
        "images": [
            {"id": number, "file_name": f"{number:012}.jpg", "width": width, "height": height}
            for number, (width, height) in SIZES.items()
        ],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
        "annotations": [
            annotation(1, 11, 1, 3.5, 4.25, 20.0, 10.5, caption="The cat on the left ."),
            annotation(2, 11, 7, 0.0, 0.0, 64.0, 48.0),
            annotation(3, 11, 1, 30.0, 20.0, 8.0, 8.0),
            annotation(4, 12, 7, 1.0, 1.0, 30.0, 60.0),
            annotation(5, 12, 1, 1.0, 1.0, 30.0, 60.0, iscrowd=1),
            annotation(6, 13, 1, 5.0, 5.0, 0.0, 9.0),
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number, (width, height) in SIZES.items():
        (tmp_path / "pictures" / f"{number:012}.jpg").write_bytes(encoded(width, height, number, "JPEG"))
    (tmp_path / "instances.json").write_text(json.dumps(instances()))
    return tmp_path


@pytest.fixture
def converted(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Store, str]]:
    """Runs the command and opens, checked as a run would, what it wrote."""

    def run(*words: str) -> tuple[Store, str]:
        out = folder / f"out-{len(list(folder.glob('out-*')))}"
        assert main(["convert", *words, "--out", str(out)]) == 0
        text = capsys.readouterr().out
        store = build_store(sorted(out.glob("*.parquet")), folder / "store", checks=Checks(num_workers=1))
        return store, text

    return run


def test_boxes_are_those_that_pycocotools_reads(folder: Path, converted: Callable[..., tuple[Store, str]]) -> None:
    store, text = converted(
        "coco", str(folder / "instances.json"), "--images", str(folder / "pictures"), "--per", "image"
    )
    theirs = COCO(str(folder / "instances.json"))
    for row, number in enumerate((11, 12)):
        sample = store.sample(row)
        found = theirs.loadAnns(theirs.getAnnIds(imgIds=[number], iscrowd=False))
        expected = [
            (NAMES[one["category_id"]], (x, y, x + width, y + height))
            for one in found
            for x, y, width, height in [one["bbox"]]
        ]
        assert labelled(sample.reward) == expected
        assert sample.images == [(folder / "pictures" / f"{number:012}.jpg").read_bytes()]
    assert len(store) == 2
    assert "left out: 1 × a crowd, which is no object" in text
    assert "left out: 1 × a box without area" in text
    assert Path(store.index.files[0].path).name == "train_detection_coco_2.parquet"


def test_a_row_may_be_a_label_or_a_phrase_and_thousandths_are_of_the_picture(
    folder: Path, converted: Callable[..., tuple[Store, str]]
) -> None:
    words = ["coco", str(folder / "instances.json"), "--images", str(folder / "pictures")]
    store, _ = converted(*words, "--frame", "norm_1000", "--source", "mine")
    assert [store.sample(row).sample_id for row in range(3)] == ["11-1", "11-7", "12-7"]
    assert len(labelled(store.sample(0).reward)) == 2
    assert corners(store.sample(1).reward) == [(0, 0, 1000, 1000)]
    assert corners(store.sample(2).reward) == [(25, 12, 775, 762)]
    assert (store.source(0), store.sample(0).reward.verifier_parm["gold_frame"]) == ("mine", "norm_1000")  # type: ignore[index]
    phrases, _ = converted(*words, "--per", "phrase")
    assert len(phrases) == 1
    assert labelled(phrases.sample(0).reward) == [("The cat on the left", (3.5, 4.25, 23.5, 14.75))]


def test_pictures_that_are_missing_or_of_another_size_are_counted(
    folder: Path, converted: Callable[..., tuple[Store, str]]
) -> None:
    (folder / "pictures" / f"{12:012}.jpg").unlink()
    store, text = converted("coco", str(folder / "instances.json"), "--images", str(folder / "pictures"))
    assert len(store) == 2
    assert "left out: 1 × a row whose picture is not in its folder" in text
    (folder / "pictures" / f"{12:012}.jpg").write_bytes(encoded(41, 80))
    assert "1 × a row whose picture has another size" in converted(
        "coco", str(folder / "instances.json"), "--images", str(folder / "pictures")
    )[1]  # fmt: skip


def test_refcocos_phrases_are_read_and_a_pickle_that_calls_is_refused(
    folder: Path, converted: Callable[..., tuple[Store, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    refs = [
        {"ref_id": 5, "ann_id": 1, "split": "testA", "sentences": [{"sent_id": 8, "sent": "left cat"}, {"sent_id": 9, "sent": "cat"}]},
        {"ref_id": 6, "ann_id": 4, "split": "train", "sentences": [{"sent_id": 10, "sent": "the light"}]},
        {"ref_id": 7, "ann_id": 5, "split": "testA", "sentences": [{"sent_id": 11, "sent": "cats"}]},
    ]  # fmt: skip
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    words = ["--instances", str(folder / "instances.json"), "--images", str(folder / "pictures"), "--split", "testA"]
    store, text = converted("refcoco", str(folder / "refs(unc).p"), *words)
    assert [store.sample(row).sample_id for row in range(len(store))] == ["5-8", "5-9"]
    assert [labelled(store.sample(row).reward)[0][0] for row in range(2)] == ["left cat", "cat"]
    assert "1 × a phrase for an object that is left out" in text

    class Calls:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (print, ("called",))

    (folder / "bad.p").write_bytes(pickle.dumps([Calls()]))
    assert main(["convert", "refcoco", str(folder / "bad.p"), *words, "--out", str(folder / "out")]) == 2
    captured = capsys.readouterr()
    assert "it asks for builtins.print, and only plain values are read" in captured.err
    assert "called" not in captured.out


def test_clevrs_numbers_are_counted_and_its_words_compared(
    folder: Path, converted: Callable[..., tuple[Store, str]]
) -> None:
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "images" / "val" / "a.png").write_bytes(encoded(40, 40))
    asked = [("How many cubes?", "3"), ("Is it red?", "yes"), ("What shape?", "sphere"), ("Hidden?", None)]
    questions = [
        {
            "image_filename": "a.png",
            "split": "val",
            "question": question,
            "answer": answer,
            "question_index": 10 + number,
        }
        for number, (question, answer) in enumerate(asked)
    ]
    questions.append({"image_filename": "b.png", "question": "?", "answer": "1"})
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    store, text = converted(
        "clevr", str(folder / "questions.json"), "--images", str(folder / "images"), "--split", "val"
    )
    rewards = [(store.sample(row).reward.verifier, store.sample(row).reward.gold) for row in range(3)]
    assert rewards == [("counting", "3"), ("mathverify", "\\boxed{yes}"), ("mathverify", "\\boxed{sphere}")]
    assert len(store) == 3
    assert "1 × a question without an answer" in text
    assert "1 × a question whose picture is not in its folder" in text


def test_files_that_a_run_reads_become_this_schema_with_their_pictures(
    folder: Path, converted: Callable[..., tuple[Store, str]]
) -> None:
    line = {"question": "How many?", "answer": "3", "image": f"pictures/{11:012}.jpg", "id": "x"}
    (folder / "rows.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"image": "gone.png"}) + "\n")
    store, text = converted("rows", str(folder / "rows.jsonl"), "--verifier", "counting")
    assert store.sample(0).images == [(folder / "pictures" / f"{11:012}.jpg").read_bytes()]
    assert "1 × a row that cannot be read" in text


def test_a_sample_of_rows_is_drawn_from_a_seed(folder: Path, converted: Callable[..., tuple[Store, str]]) -> None:
    words = ["coco", str(folder / "instances.json"), "--images", str(folder / "pictures"), "--rows", "2"]
    drawn = []
    for seed in ("0", "0", "1", "2", "3"):
        store, _ = converted(*words, "--seed", seed)
        drawn.append([store.sample(row).sample_id for row in range(len(store))])
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["coco", "nowhere.json"], "is no COCO instances file"),
        (["clevr", "instances.json"], "is no CLEVR questions file"),
        (["refcoco", "refs.p"], "say --instances"),
        (["coco", "a", "b"], "name one file"),
    ],
)
def test_what_is_no_such_dataset_is_named(
    words: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["convert", *words, "--out", "out"]) == 2
    assert said in capsys.readouterr().err
