"""Write the digits data as Parquet files, one per source and split: `python -m examples.digits.build`.

The same seed gives the same bytes. Train and held-out files draw their digits from disjoint sets of handwritten images. Files that
this code wrote with these options are left as they are.
"""

import argparse
import hashlib
import json
import multiprocessing
import pathlib
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.digits.demonstrations import box_answer, boxes_of
from examples.digits.rendering import Scene, digit_pool, draw, encode_png
from examples.digits.scenes import PERCEPTION, Question, compose
from verifiers import terminal
from vtriune import whole_files
from vtriune.data.schema import PARQUET_SCHEMA

DATA_FOLDER = pathlib.Path(__file__).parent / "data"
SOURCES = {
    "math": "digits_arithmetic",
    "puzzle": "digits_sequences",
    "chart": "digits_bars",
    "science": "digits_gauges",
    "counting": "digits_counts",
    "ocr": "digits_numbers",
    "grounding": "digits_single",
    "detection": "digits_multi",
}
NUM_ROWS = {"train": 400, "test": 128}
NUM_PROCESSES = 2
WEIGHTS = ("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map", "map50", "map75")
BOX_REWARDS = {
    "grounding": ({"iou_max_label_first": 1.0, "iou_completeness": 0.3},),
    "detection": (
        {"iou_max_label_first": 1.0, "iou_completeness": 0.3},
        {"iou_max_iou_first": 1.0, "iou_completeness": 0.3},
        {"iou_max_label_first": 0.7, "map": 0.3, "iou_completeness": 0.3},
    ),
}
"""What a row's boxes may be scored by: its rows differ, as those of the released data do."""
_FRAMES = [("frame", pa.string()), ("gold_frame", pa.string())]


def _schema() -> pa.Schema:
    """The rows' schema: that of every run's data, with the coordinates' frames among the verifier's parameters."""
    place = PARQUET_SCHEMA.get_field_index("reward_model")
    fields = {field.name: field.type for field in PARQUET_SCHEMA.field(place).type}
    fields["verifier_parm"] = pa.struct([*fields["verifier_parm"], *_FRAMES])
    return PARQUET_SCHEMA.set(place, pa.field("reward_model", pa.struct(list(fields.items()))))


SCHEMA = _schema()


def reward_model(question: Question, scene: Scene, rng: random.Random) -> dict[str, Any]:
    """The row's reward set-up: which verifier, its parameters, the gold answer."""
    parameters: dict[str, Any] = {"verifier_style": "rule"}
    if question.task in PERCEPTION:
        answer = truth = box_answer(boxes_of(question, scene))
        weights = rng.choice(BOX_REWARDS[question.task])
        parameters |= {"frame": "norm_1000", "gold_frame": "norm_1000"}
        parameters["det_reward_ratio"] = {name: weights.get(name, 0.0) for name in WEIGHTS}
    else:
        answer, truth = question.answer, f"\\boxed{{{question.answer}}}"
    return {
        "answer": answer,
        "ground_truth": truth,
        "accuracy_ratio": 1.0,
        "format_ratio": 0.1,
        "verifier": "detection" if question.task in PERCEPTION else "mathverify",
        "verifier_parm": parameters,
    }


def rows(task: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless rows of one source, in `SCHEMA`."""
    rng, pool = random.Random(f"{seed}/{split}/{task}"), digit_pool(split)
    number = 0
    while True:
        scene, questions = compose(task, pool, rng)
        question = rng.choice(questions)
        yield {
            "data_source": SOURCES[task],
            "images": [{"bytes": encode_png(draw(scene, rng)), "path": None}],
            "prompt": [{"role": "user", "content": "<image>" + question.prompt}],
            "ability": task,
            "reward_model": reward_model(question, scene, rng),
            "extra_info": {"id": f"{split}_{SOURCES[task]}_{number}", "image_path": None},
        }
        number += 1


def write_file(path: pathlib.Path, task: str, split: str, num_rows: int, seed: int) -> None:
    """One source's file, replaced whole."""
    stream = rows(task, split, seed)
    table = pa.Table.from_pylist([next(stream) for _ in range(num_rows)], schema=SCHEMA)
    with whole_files.replacing(path) as partial:
        pq.write_table(table, partial)


def write(folder: pathlib.Path, num_rows: dict[str, int], seed: int) -> list[pathlib.Path]:
    """Eight files of `num_rows[split]` rows under folder/split for both splits; other Parquet files there are removed."""
    made_of, stamp = _identity(num_rows, seed), folder / "made_of.json"
    files = {
        folder / split / f"{split}_{task}_{source}_{num}.parquet": (task, split, num, seed)
        for split, num in num_rows.items()
        for task, source in SOURCES.items()
    }
    if stamp.exists() and stamp.read_text() == made_of and all(path.exists() for path in files):
        return list(files)
    for split in num_rows:
        (folder / split).mkdir(parents=True, exist_ok=True)
        for old in (folder / split).glob("*.parquet"):
            old.unlink()
    # Forked: a fresh interpreter would import for longer than it draws.
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(write_file, path, *about) for path, about in files.items()]:
            done.result()
    stamp.write_text(made_of)
    return list(files)


def _identity(num_rows: dict[str, int], seed: int) -> str:
    """What the files follow from: the options, and this package's code."""
    code = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return json.dumps({"seed": seed, "rows": num_rows, "code": code.hexdigest()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the digits data.")
    parser.add_argument("--out", type=pathlib.Path, default=DATA_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=NUM_ROWS["train"], help="rows of every train source")
    parser.add_argument("--test-rows", type=int, default=NUM_ROWS["test"], help="rows of every held-out source")
    arguments = parser.parse_args()
    for path in write(arguments.out, {"train": arguments.train_rows, "test": arguments.test_rows}, arguments.seed):
        print(path)


if __name__ == "__main__":
    terminal.open_output()
    main()
