"""Rows of the Parquet schema and files of them, for the tests of this folder."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vtriune.data.schema import PARQUET_SCHEMA

MODEL = Path(__file__).parents[2] / "examples" / "digits" / "model"

DETECTION_PARM = {
    "verifier_style": None,
    "det_verifier_normalized": False,
    "det_reward_ratio": {
        "iou_max_label_first": 1.0,
        "iou_max_iou_first": 0.0,
        "iou_completeness": 0.3,
        "map": 0.0,
        "map50": 0.0,
        "map75": 0.0,
    },
}


def encoded(width: int, height: int, seed: int = 0, kind: str = "PNG") -> bytes:
    """Random pixels as an encoded image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def row(number: int = 0, source: str = "digits", **changes: Any) -> dict[str, Any]:
    """A good row; `changes` replace columns, or fields of reward_model where they are named so."""
    reward = {
        "answer": str(number),
        "ground_truth": f"\\boxed{{{number}}}",
        "accuracy_ratio": 1.0,
        "format_ratio": 0.1,
        "verifier": "mathverify",
        "verifier_parm": None,
    }
    columns = {
        "data_source": source,
        "images": [{"bytes": encoded(40, 40, number), "path": None}],
        "prompt": [{"role": "user", "content": f"<image>What is number {number}?"}],
        "ability": "math",
        "reward_model": {**reward, **{name: value for name, value in changes.items() if name in reward}},
        "extra_info": {"id": f"id-{number}", "image_path": None},
    }
    return columns | {name: value for name, value in changes.items() if name not in reward}


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = PARQUET_SCHEMA) -> Path:
    """The rows as a Parquet file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path
