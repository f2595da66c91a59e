"""How long `python -m vtriune.data check` takes over rows with photographs, and again when nothing changed; with its memory.

`python -m bench.data_check [--rows 50000] [--folder /tmp/data_check]`. Rows of the schema in files of four sources: two that mathverify
scores, detection and grounding. Pictures are distinct cuts of scikit-image's photographs, log-normal in size with a median of 0.3
megapixels, JPEG; golds are mostly distinct. Memory is that of all processes together, sampled: each one's proportional share (PSS).
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bench import machine
from examples.digits.micro_vlm import MODEL_FOLDER
from verifiers import terminal
from vtriune.data.schema import PARQUET_SCHEMA

ROWS_A_FILE = 1250
MEDIAN_PIXELS = 300_000
SOURCES = (("math", "geometry"), ("chart", "charts"), ("detection", "coco"), ("grounding", "phrases"))
BOXES = {"det_verifier_normalized": False, "det_reward_ratio": {"iou_max_label_first": 1.0, "iou_completeness": 0.3}}


def write_file(folder: Path, number: int, num_rows: int) -> None:
    """File `number` of the corpus."""
    from skimage import data

    photographs = [Image.fromarray(each).convert("RGB") for each in (data.astronaut(), data.coffee(), data.chelsea())]
    task, source = SOURCES[number % len(SOURCES)]
    rng = np.random.default_rng(number)
    rows = [_row(task, source, number * ROWS_A_FILE + place, photographs, rng) for place in range(num_rows)]
    path = folder / "train" / f"train_{task}_{source}-{number}_{num_rows}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PARQUET_SCHEMA), path)


def _row(
    task: str, source: str, number: int, photographs: list[Image.Image], rng: np.random.Generator
) -> dict[str, Any]:
    picture, (width, height) = _picture(photographs, rng)
    if task in ("math", "chart"):
        question = f"<image>What is {number} + {int(rng.integers(1000))}?"
        reward: dict[str, Any] = {"verifier": "mathverify", "ground_truth": f"\\boxed{{{number + rng.integers(1000)}}}"}
    else:
        question = "<image>Find every cat."
        boxes = [_box(width, height, rng) for _ in range(1 if task == "grounding" else int(rng.integers(1, 7)))]
        reward = {"verifier": "detection", "ground_truth": json.dumps(boxes), "verifier_parm": BOXES}
    return {
        "data_source": source,
        "images": [{"bytes": picture, "path": None}],
        "prompt": [{"role": "user", "content": question}],
        "ability": task,
        "reward_model": {"answer": "", "accuracy_ratio": 1.0, "format_ratio": 0.1, **reward},
        "extra_info": {"id": f"{source}-{number}"},
    }


def _picture(photographs: list[Image.Image], rng: np.random.Generator) -> tuple[bytes, tuple[int, int]]:
    """A cut of a photograph, as JPEG, and its size."""
    pixels, aspect = MEDIAN_PIXELS * rng.lognormal(0, 0.5), rng.uniform(0.6, 1.7)
    size = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
    photograph = photographs[rng.integers(len(photographs))]
    width, height = (int(side * rng.uniform(0.2, 0.6)) for side in photograph.size)
    left, top = rng.integers(photograph.width - width), rng.integers(photograph.height - height)
    out = io.BytesIO()
    cut = photograph.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    cut.save(out, "JPEG", quality=80)
    return out.getvalue(), size


def _box(width: int, height: int, rng: np.random.Generator) -> dict[str, Any]:
    left, top = int(rng.integers(width // 2)), int(rng.integers(height // 2))
    return {
        "bbox_2d": [left, top, left + int(rng.integers(8, width // 2)), top + int(rng.integers(8, height // 2))],
        "label": "cat",
    }


def check(folder: Path) -> dict[str, float]:
    """Run the command to its end: exit code, seconds, and the most memory of all its processes together, in GiB."""
    words = [
        sys.executable,
        "-m",
        "vtriune.data",
        "check",
        str(folder / "train"),
        "--model",
        str(MODEL_FOLDER),
        "--out",
        str(folder / "out"),
    ]
    started, most = time.monotonic(), 0
    with (folder / "check.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        while process.poll() is None:
            most = max(most, sum(_memory(psutil.Process(process.pid))))
            time.sleep(0.5)
    return {"exit_code": process.returncode, "seconds": time.monotonic() - started, "gib": most / 2**30}


def _memory(process: psutil.Process) -> Iterator[int]:
    try:
        for each in (process, *process.children(recursive=True)):
            yield each.memory_full_info().pss
    except psutil.NoSuchProcess:
        return


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/data_check"), help="made anew; 4 GB for 50,000 rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    head = machine.describe()
    print(machine.heading(head))
    shutil.rmtree(options.folder, ignore_errors=True)
    (options.folder / "train").mkdir(parents=True)
    starts = range(0, options.rows, ROWS_A_FILE)
    with ProcessPoolExecutor() as pool:
        sizes = [min(ROWS_A_FILE, options.rows - start) for start in starts]
        list(pool.map(write_file, [options.folder] * len(sizes), range(len(sizes)), sizes))
    result = {}
    for name in ("first", "unchanged"):
        found = result[name] = check(options.folder)
        print(
            f"{name:<10} {options.rows} rows  exit code {found['exit_code']}  {found['seconds']:.1f} s  {found['gib']:.2f} GiB"
        )
    machine.write_json(options.json, head, result)


if __name__ == "__main__":
    terminal.open_output()
    main()
