"""Write the digits data as Parquet files, one per source and split: `python -m examples.digits.build`.

The same seed gives the same bytes. Train and held-out files draw their digits from disjoint sets of handwritten images.
"""

import argparse
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.digits.demonstrations import box_answer
from examples.digits.rendering import DigitPool, choose_ink, digit_pool, draw, encode_png
from examples.digits.scenes import PERCEPTION, SCENES, Question
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
NUM_ROWS = {"train": 1000, "test": 128}
# Credit for every box found: the mean IoU of the matches, blended with completeness (missed boxes and false alarms).
DETECTION_WEIGHTS = {
    "iou_max_label_first": 0.0,
    "iou_max_iou_first": 1.0,
    "iou_completeness": 0.3,
    "map": 0.0,
    "map50": 0.0,
    "map75": 0.0,
}


def reward_model(question: Question) -> dict[str, Any]:
    """The row's reward set-up: which verifier, its parameters, the gold answer."""
    is_boxes = question.task in PERCEPTION
    answer = box_answer(question.boxes_xyxy, question.label) if is_boxes else question.answer
    return {
        "answer": answer,
        "ground_truth": answer if is_boxes else f"\\boxed{{{answer}}}",
        "accuracy_ratio": 1.0,
        "format_ratio": 0.1,
        "verifier": "detection" if is_boxes else "mathverify",
        "verifier_parm": {
            "verifier_style": "rule",
            "det_verifier_normalized": False if is_boxes else None,
            "det_reward_ratio": DETECTION_WEIGHTS if is_boxes else None,
        },
    }


def rows(task: str, split: str, seed: int, pool: DigitPool) -> Iterator[dict[str, Any]]:
    """Endless rows of one source, in the Parquet schema."""
    rng = random.Random(f"{seed}/{split}/{task}")
    number = 0
    while True:
        scene = SCENES[task](rng)
        question = rng.choice(scene.questions)
        pixels = draw(choose_ink(scene.cells, pool, rng), pool)
        yield {
            "data_source": SOURCES[task],
            "images": [{"bytes": encode_png(pixels), "path": None}],
            "prompt": [{"role": "user", "content": "<image>" + question.prompt}],
            "ability": task,
            "reward_model": reward_model(question),
            "extra_info": {"id": f"{split}_{SOURCES[task]}_{number}", "image_path": None},
        }
        number += 1


def write_split(folder: pathlib.Path, split: str, num_rows: int, seed: int) -> list[pathlib.Path]:
    """Eight files of `num_rows` rows under folder/split; files of an earlier build there are removed."""
    target = folder / split
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob(f"{split}_*.parquet"):
        old.unlink()
    pool = digit_pool(split)
    written = []
    for task, source in SOURCES.items():
        stream = rows(task, split, seed, pool)
        table = pa.Table.from_pylist([next(stream) for _ in range(num_rows)], schema=PARQUET_SCHEMA)
        path = target / f"{split}_{task}_{source}_{num_rows}.parquet"
        pq.write_table(table, path)
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the digits data.")
    parser.add_argument("--out", type=pathlib.Path, default=DATA_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=NUM_ROWS["train"], help="rows of every train source")
    parser.add_argument("--test-rows", type=int, default=NUM_ROWS["test"], help="rows of every held-out source")
    arguments = parser.parse_args()
    for split, num_rows in (("train", arguments.train_rows), ("test", arguments.test_rows)):
        for path in write_split(arguments.out, split, num_rows, arguments.seed):
            print(path)


if __name__ == "__main__":
    main()
