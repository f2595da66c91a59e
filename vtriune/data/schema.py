"""What a row of the data is: the Parquet schema, the stored row, and the frozen structs that the rest of the system sees.

Used by the store (reading Parquet, writing Arrow), by the checks at load, and by every process that asks for a sample.
"""

import base64
import binascii
import math
import re
from collections.abc import Collection, Iterator, Mapping
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
"""The row schema of Orsta-Data-47k. A file may hold more columns, a `verifier_parm` of other keys and `large_` types. What can mean one
thing only is read too: a prompt that is text or has content parts, one picture for a list, pictures as bytes, base64 or paths,
`verifier_parm` as JSON, a gold answer that is a number."""

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

_OPTIONAL = ("ability", "extra_info")

ROLES = ("system", "user", "assistant")

_OTHER_FORMS = {
    "images": ("a list of binary", "a list of text", "structs", "binary", "text", "a list of null", "null"),
    "prompt": ("text",),
    "extra_info": ("null",),
    "ability": ("null",),
}
"""Read beside those of PARQUET_SCHEMA."""
_STRANGE_MARKER = re.compile(r"<(?:video|images|image[ _]*\d+)\s*/?>", re.IGNORECASE)
_PICTURE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
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


_FILE_NAME = re.compile(r"([^_]+)_([^_]+)_([^_]+(?:_[^_]+)*)_(\d+)(?:_x([1-9]\d*))?", re.ASCII)


def parse_file_name(path: str | Path) -> FileName | None:
    """The parts of a name, of which the source may contain underscores; None for a name of another form (legal: no repeats)."""
    found = _FILE_NAME.fullmatch(Path(path).stem)
    return None if found is None else FileName(found[1], found[2], found[3], int(found[4]), int(found[5] or 1))


def check_columns(schema: pa.Schema, path: str | Path, needless: Collection[str] = ()) -> None:
    """Raise DataError that names every missing or wrongly typed column (and struct field) of the file `path`; `needless` are said
    elsewhere."""
    problems = []
    for field in PARQUET_SCHEMA:
        if field.name not in schema.names:
            if field.name not in (*_OPTIONAL, *needless):
                problems.append(f"column `{field.name}` is missing")
            continue
        found = schema.field(field.name).type
        if _form(found) not in (_form(field.type), *_OTHER_FORMS.get(field.name, ())):
            problems.append(f"column `{field.name}` is {found}, not {_form(field.type)}")
        elif field.name in _STRUCT_FIELDS and _form(found).endswith("structs"):
            present = {below.name for below in (found.value_type if _is_list(found) else found)}
            missing = [name for name in _STRUCT_FIELDS[field.name] if name not in present and name not in needless]
            problems += [f"column `{field.name}` lacks the field `{name}`" for name in missing]
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}. Columns found: {', '.join(schema.names)}")


def _form(kind: pa.DataType) -> str:
    """What a column holds, whichever width or encoding it has."""
    if _is_list(kind):
        return f"a list of {_form(kind.value_type)}"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return "text"
    if pa.types.is_large_binary(kind):
        return "binary"
    return "structs" if pa.types.is_struct(kind) else str(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def parse_row(raw: Mapping[str, Any]) -> tuple[Sample | None, list[str]]:
    """One Parquet row as Python objects → the sample, or None with the reasons why it is none.

    Images must be in the row; those that a file names by path were read before (`adapters`).
    """
    problems: list[str] = []
    source = raw["data_source"]
    if not isinstance(source, str) or not source:
        problems.append(f"data_source is {source!r}, not a name")
    prompt = _parse_prompt(raw["prompt"], problems)
    images = _parse_images(raw["images"], problems)
    reward = _parse_reward(raw["reward_model"], problems)
    if problems or reward is None:
        return None, problems
    sample_id = (raw["extra_info"] or {}).get("id")
    return Sample(-1, source, prompt, images, reward, raw["ability"] or "", str(sample_id or "")), []


def _parse_prompt(raw: Any, problems: list[str]) -> list[Turn]:
    turns: list[Turn] = []
    raw = _turns(raw) if isinstance(raw, str) else raw
    for index, turn in enumerate(raw or []):
        role, given = (turn or {}).get("role"), (turn or {}).get("content")
        content = _text(given)
        if isinstance(role, str) and content is not None:
            turns.append(Turn(role, content))
            problems += [f"prompt[{index}] {problem}" for problem in _turn_problems(turns[-1])]
        else:
            problems.append(
                f"prompt[{index}] has role {role!r} and content {given!r}; both must be text, or the content a list of "
                "{type: text, text: …} and {type: image}, with the pictures in the column `images`"
            )
    if not raw:
        problems.append("prompt is empty")
    elif turns and turns[-1].role != "user":
        problems.append(f"prompt ends with a turn of {turns[-1].role!r}; the last turn must be the user's")
    return turns


def _turns(text: str) -> list[Any]:
    """A prompt that is text: turns written as JSON, else what the user says."""
    try:
        if text.startswith("[{"):
            return msgspec.json.decode(text, type=list[dict[str, Any]])
    except msgspec.DecodeError:
        pass
    return [{"role": "user", "content": text}] if text else []


def _turn_problems(turn: Turn) -> Iterator[str]:
    if turn.role not in ROLES:
        yield f"is a turn of {turn.role!r}; write what it says into a turn of {', '.join(ROLES)}"
    elif turn.role != "user" and IMAGE_MARKER in turn.content:
        yield f"of {turn.role!r} holds {IMAGE_MARKER}; only a turn of 'user' shows pictures: move it there"
    if (strange := _STRANGE_MARKER.search(turn.content)) is not None:
        is_video = "video" in strange[0].lower()
        cure = "videos are not read" if is_video else f"write {IMAGE_MARKER} where each picture belongs, in order"
        yield f"holds {strange[0]}, which the model would see as these very letters; {cure}"


def _text(content: Any) -> str | None:
    """A turn's content as text with image markers; None for what is no text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        given = without_nulls(part) if isinstance(part, Mapping) else {}
        if given.get("type") == "text" and isinstance(given.get("text"), str):
            texts.append(given["text"])
        elif given == {"type": "image"} or given == {"type": "image", "text": ""}:
            texts.append(IMAGE_MARKER)
        else:
            return None
    return "".join(texts)


def _parse_images(raw: Any, problems: list[str]) -> list[bytes]:
    images = []
    for index, image in enumerate([raw] if isinstance(raw, bytes | str | Mapping) else raw or []):
        fields = image if isinstance(image, Mapping) else {"bytes": image}
        data, path = fields.get("bytes"), fields.get("path")
        if isinstance(data, str):
            path, data = data[:100], from_base64(data)
        if isinstance(data, bytes) and data:
            images.append(data)
        else:
            problems.append(f"images[{index}] has no bytes (path {path!r}); embed the encoded image, or name a file")
    return images


def from_base64(text: str) -> bytes | None:
    """The picture that `text` writes in base64, as it is or in a `data:` address; None for paths and all else."""
    try:
        data = base64.b64decode(text.partition(";base64,")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if data.startswith(_PICTURE_BEGINNINGS) else None


def _parse_reward(raw: Any, problems: list[str]) -> RewardSpec | None:
    if not raw:
        problems.append("reward_model is null")
        return None
    fields = without_nulls(raw)
    known = {name: fields[name] for name in RewardSpec.__struct_fields__ if name in fields}
    if "verifier" not in known:
        problems.append("reward_model.verifier is null")
        return None
    for name in ("answer", "ground_truth"):
        if isinstance(known.get(name), int | float) and not isinstance(known[name], bool):
            known[name] = str(known[name])
    parm = known.get("verifier_parm")
    try:
        if isinstance(parm, str):
            known["verifier_parm"] = without_nulls(msgspec.json.decode(parm or "null", type=dict[str, Any] | None))
        spec = msgspec.convert(known, RewardSpec)
    except msgspec.ValidationError as error:
        what = "reward_model.verifier_parm, as JSON" if isinstance(known.get("verifier_parm"), str) else "reward_model"
        problems.append(f"{what}: {error}")
        return None
    except msgspec.DecodeError as error:
        problems.append(f"reward_model.verifier_parm is text that is no JSON object ({error}): {str(parm)[:100]!r}")
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
