"""What a row of the data is: the Parquet schema, the stored row, and the frozen structs that the rest of the system sees.

Used by the store (reading Parquet, writing Arrow), by the checks at load, and by every process that asks for a sample.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from verifiers import RewardSpec

IMAGE_MARKER = "<image>"

_DET_REWARD_RATIO = pa.struct(
    [
        (name, pa.float32())
        for name in ("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map", "map50", "map75")
    ]
)
_VERIFIER_PARM = pa.struct(
    [
        ("verifier_style", pa.string()),
        ("det_verifier_normalized", pa.bool_()),
        ("det_reward_ratio", _DET_REWARD_RATIO),
    ]
)

PARQUET_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        (
            "reward_model",
            pa.struct(
                [
                    ("answer", pa.string()),
                    ("ground_truth", pa.string()),
                    ("accuracy_ratio", pa.float32()),
                    ("format_ratio", pa.float32()),
                    ("verifier", pa.string()),
                    ("verifier_parm", _VERIFIER_PARM),
                ]
            ),
        ),
        ("extra_info", pa.struct([("id", pa.string()), ("image_path", pa.string())])),
    ]
)
"""The row schema of Orsta-Data-47k. A file may hold more columns, a `verifier_parm` of other keys and `large_` types."""

STORE_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward", pa.string()),  # JSON of RewardSpec: rows of different files carry different parameters
        ("sample_id", pa.string()),
        ("file", pa.int32()),  # where the row comes from: index into the manifest's list of files,
        ("file_row", pa.int64()),  # and the row there
    ]
)

_STRUCT_FIELDS = {
    "images": ("bytes",),
    "prompt": ("role", "content"),
    "reward_model": ("answer", "ground_truth", "verifier"),
    "extra_info": ("id",),
}


class DataError(ValueError):
    """Data that cannot be trained on: says which file, which row, what is wrong and what to do."""


class Turn(msgspec.Struct, frozen=True):
    """One message of a prompt."""

    role: str
    content: str


class Sample(msgspec.Struct, frozen=True):
    """A row of the data: prompt, images, reward specification, source."""

    row: int
    """Row of the store it was read from; -1 while it is being checked."""
    source: str
    prompt: list[Turn]
    images: list[bytes]
    """Encoded as in the file (PNG, JPEG, …), one per `<image>` marker, in order."""
    reward: RewardSpec
    ability: str
    sample_id: str


class FileName(msgspec.Struct, frozen=True):
    """`{split}_{task}_{source}_{num}[_x{k}].parquet`; `repeats` is k, 1 when the name has none."""

    split: str
    task: str
    source: str
    num_rows: int
    repeats: int = 1


def parse_file_name(path: str | Path) -> FileName | None:
    """Parse from both ends, since sources contain underscores; None for a name of another form (legal: no repeats)."""
    parts = Path(path).stem.split("_")
    repeats = 1
    if len(parts) > 4 and parts[-1][:1] == "x" and _is_number(parts[-1][1:]) and _is_number(parts[-2]):
        repeats = int(parts.pop()[1:])
    if len(parts) < 4 or not _is_number(parts[-1]) or not all(parts) or repeats < 1:
        return None
    return FileName(parts[0], parts[1], "_".join(parts[2:-1]), int(parts[-1]), repeats)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def check_columns(schema: pa.Schema, path: str | Path) -> None:
    """Raise DataError that names every missing or wrongly typed column (and struct field) of the Parquet file `path`."""
    problems = []
    for field in PARQUET_SCHEMA:
        if field.name not in schema.names:
            problems.append(f"column `{field.name}` is missing")
            continue
        found = schema.field(field.name).type
        element = found
        if pa.types.is_list(field.type):
            if not (pa.types.is_list(found) or pa.types.is_large_list(found)):
                problems.append(f"column `{field.name}` is {found}, not a list")
                continue
            element = found.value_type
        if field.name not in _STRUCT_FIELDS:
            if not (pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_dictionary(found)):
                problems.append(f"column `{field.name}` is {found}, not a string")
        elif not pa.types.is_struct(element):
            problems.append(f"column `{field.name}` holds {element}, not a struct")
        else:
            present = {element.field(index).name for index in range(element.num_fields)}
            missing = [name for name in _STRUCT_FIELDS[field.name] if name not in present]
            problems += [f"column `{field.name}` lacks the field `{name}`" for name in missing]
    if problems:
        found_columns = ", ".join(schema.names)
        raise DataError(f"{path}: {'; '.join(problems)}. Columns found: {found_columns}")


def parse_row(raw: Mapping[str, Any]) -> tuple[Sample | None, list[str]]:
    """One Parquet row as Python objects → the sample, or None with the reasons why it is none.

    Images must be in the row: a file that only names paths would make the store's content depend on what lies beside it.
    """
    problems: list[str] = []
    source = raw["data_source"]
    if not isinstance(source, str) or not source:
        problems.append(f"data_source is {source!r}, not a name")
    prompt = _parse_prompt(raw["prompt"], problems)
    images = _parse_images(raw["images"] or [], problems)
    reward = _parse_reward(raw["reward_model"], problems)
    if problems or reward is None:
        return None, problems
    sample_id = (raw["extra_info"] or {}).get("id")
    return Sample(-1, source, prompt, images, reward, raw["ability"] or "", str(sample_id or "")), []


def _parse_prompt(raw: Any, problems: list[str]) -> list[Turn]:
    turns = []
    for index, turn in enumerate(raw or []):
        role, content = (turn or {}).get("role"), (turn or {}).get("content")
        if isinstance(role, str) and isinstance(content, str):
            turns.append(Turn(role, content))
        else:
            problems.append(f"prompt[{index}] has role {role!r} and content {content!r}; both must be text")
    if not raw:
        problems.append("prompt is empty")
    elif turns and turns[-1].role != "user":
        problems.append(f"prompt ends with a turn of {turns[-1].role!r}; the last turn must be the user's")
    return turns


def _parse_images(raw: Any, problems: list[str]) -> list[bytes]:
    images = []
    for index, image in enumerate(raw):
        data = (image or {}).get("bytes")
        if data:
            images.append(data)
        else:
            path = (image or {}).get("path")
            problems.append(f"images[{index}] has no bytes (path {path!r}); embed the encoded image in the file")
    return images


def _parse_reward(raw: Any, problems: list[str]) -> RewardSpec | None:
    if not raw:
        problems.append("reward_model is null")
        return None
    fields = without_nulls(raw)
    known = {name: fields[name] for name in RewardSpec.__struct_fields__ if name in fields}
    if "verifier" not in known:
        problems.append("reward_model.verifier is null")
        return None
    try:
        spec = msgspec.convert(known, RewardSpec)
    except msgspec.ValidationError as error:
        problems.append(f"reward_model: {error}")
        return None
    if not (math.isfinite(spec.accuracy_ratio) and math.isfinite(spec.format_ratio)):
        problems.append(
            f"reward_model: accuracy_ratio {spec.accuracy_ratio}, format_ratio {spec.format_ratio}; both must be finite"
        )
        return None
    return spec


def without_nulls(value: Any) -> Any:
    """`value` with null entries of mappings removed at every depth, and float32 read as the decimal that was meant.

    Parquet gives every row of a file the same struct, so a parameter that a row does not set is there as null; and 0.1 stored
    as float32 comes back as 0.10000000149.
    """
    if isinstance(value, Mapping):
        cleaned = {name: without_nulls(item) for name, item in value.items()}
        return {name: item for name, item in cleaned.items() if item is not None and item != {}}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, float):
        return _shortest(value)
    return value


def _shortest(value: float) -> float:
    """The float64 of the shortest decimal that rounds to `value` as float32; `value` itself when it is no float32."""
    if not abs(value) < 3e38:
        return value
    packed = np.float32(value)
    return float(str(packed)) if float(packed) == value else value
