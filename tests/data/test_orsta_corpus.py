"""A corpus of the shape of Orsta-Data-47k: its file names, every task, one row in fifty broken; each defect is found, none invented."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import DETECTION_PARM, MODEL, encoded, row, write_parquet
from tests.data.test_validate import BAD, ONE_BOX
from vtriune.data import Store, build_store
from vtriune.data.inputs import data_files
from vtriune.data.processing import Preprocessor
from vtriune.data.validate import Checks

NUM_ROWS = 20
MORE_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "corners exchanged": (
        {"verifier": "detection", "verifier_parm": DETECTION_PARM, "ground_truth": ONE_BOX.replace("30, 40", "0, 40")},
        "has x2 < x1",
    ),
    "a box without area": (
        {"verifier": "detection", "verifier_parm": DETECTION_PARM, "ground_truth": ONE_BOX.replace("30, 40", "1, 40")},
        "has no area",
    ),
    "an answer that contradicts its gold": ({"answer": "5", "ground_truth": "6"}, "is another than ground_truth"),
    "an empty prompt": ({"prompt": []}, "prompt is empty"),
    "a prompt that ends with an answer": (
        {"prompt": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "7"}]},
        "the last turn must be the user's",
    ),
    "a video": ({"prompt": [{"role": "user", "content": "<video>What?"}]}, "videos are not read"),
    "a numbered marker": ({"prompt": [{"role": "user", "content": "<image 1>What?"}]}, "write <image> where"),
    "a tool's turn": (
        {"prompt": [{"role": "tool", "content": "x"}, {"role": "user", "content": "<image>?"}]},
        "'tool'",
    ),
    "no source": ({"data_source": None}, "data_source is None"),
    "no reward": ({"reward_model": None}, "reward_model is null"),
    "a page in place of a picture": (
        {"images": [{"bytes": b"<!DOCTYPE html><html>404</html>", "path": None}]},
        "what a failed download left",
    ),
    "a gold text that holds tags": ({"verifier": "ocr", "ground_truth": "a </answer> b"}, "holds </answer>"),
}
DEFECTS = [*BAD.values(), *MORE_BAD.values()]
NORMALISED = DETECTION_PARM | {"det_verifier_normalized": True}
TASKS: dict[str, dict[str, Any]] = {
    "math": {},
    "puzzle": {},
    "chart": {"ground_truth": "0.5"},
    "science": {"ground_truth": "\\boxed{\\frac{1}{2}}"},
    "counting": {"verifier": "counting", "ground_truth": "4"},
    "ocr": {"verifier": "ocr", "ground_truth": "STOP"},
    "detection": {"verifier": "detection", "verifier_parm": NORMALISED, "ground_truth": ONE_BOX},
    "grounding": {"verifier": "detection", "verifier_parm": DETECTION_PARM, "ground_truth": ONE_BOX},
}


def names() -> Iterator[tuple[str, str, str]]:
    """Folder, file name without number and ending, task."""
    for task in TASKS:
        for place, source in enumerate(("mm_math_v2", "coco_test_multi", "x", "puzzlevqa")):
            yield "train", f"train_{task}_{source}_{task[0]}{place}", task
        for source in ("coco_test_multi", "held_out_2"):
            yield "test", f"test_{task}_{source}", task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], str]]:
    """The folder, and the reason for each broken row by file name and row."""
    folder, rng = tmp_path_factory.mktemp("orsta"), random.Random(0)
    files = list(names())
    places = rng.sample([(file, number) for file in range(len(files)) for number in range(NUM_ROWS)], len(DEFECTS))
    broken = dict(zip(places, DEFECTS, strict=True))
    expected = {}
    for file, (split, name, task) in enumerate(files):
        repeats = "_x2" if file % 5 == 0 else ""
        path = folder / split / f"{name}_{NUM_ROWS}{repeats}.parquet"
        rows = []
        for number in range(NUM_ROWS):
            good = {"answer": "", "ground_truth": f"\\boxed{{{number}}}"} | TASKS[task]
            changes, reason = broken.get((file, number), ({}, None))
            images = [{"bytes": encoded(40 + number, 50, file, "JPEG" if number % 2 else "PNG"), "path": None}]
            columns = {"images": images, "extra_info": {"id": f"{name}-{number}", "image_path": None}}
            rows.append(row(number, name, **(columns | (changes if reason else good))))
            if reason:
                expected[path.name, number] = reason
        write_parquet(path, rows)
    return folder, expected


def store_of(folder: Path, split: str, out: Path) -> Store:
    checks = Checks(Preprocessor(MODEL, 784, 168 * 168, 512), prompt_pool=True, num_workers=1)
    return build_store(data_files("data.train", [str(folder / split)]), out, checks=checks, on_bad_row="quarantine")


def test_each_defect_is_found_and_named_and_none_is_invented(
    corpus: tuple[Path, dict[tuple[str, int], str]], tmp_path: Path
) -> None:
    folder, expected = corpus
    assert (len(list(folder.rglob("*.parquet"))), len(expected), len(DEFECTS)) == (48, len(DEFECTS), 23)
    found: dict[tuple[str, int], str] = {}
    for split, num_files in (("train", 32), ("test", 16)):
        store = store_of(folder, split, tmp_path / "stores")
        assert len(store.index.files) == num_files
        if store.quarantine_path is not None:
            for line in map(json.loads, store.quarantine_path.read_bytes().splitlines()):
                found[Path(line["file"]).name, line["row"]] = "; ".join(line["reasons"])
        num_good = num_files * NUM_ROWS - store.index.num_quarantined
        twice = sum(file.num_stored for file in store.index.files if file.repeats == 2)
        assert len(store) == num_good + twice
        assert sum(file.num_stored for file in store.index.files) == num_good
        assert all(("_x2" in file.path) == (file.repeats == 2) for file in store.index.files)
    assert set(found) == set(expected)
    for place, reason in expected.items():
        assert re.search(reason, found[place]), (place, found[place])
