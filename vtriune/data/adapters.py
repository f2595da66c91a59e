"""Rows of the forms that people have, as rows of this schema. Which form a file has is told by its columns, and said aloud.

    this schema   data_source, prompt, reward_model that names a verifier
    verl, EasyR1  data_source, prompt, reward_model with style and ground_truth
    TRL           prompt with solution, or problem with solution
    LLaVA         conversations of turns {from, value}, of which the last is the gold answer
    question      question or problem or query, with answer

Pictures are in `images` or `image`: bytes, base64, or paths from the file's folder. What rows cannot say (verifier, its parameters,
frame of gold boxes) is said for their file under `data.train`; nothing is guessed.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import msgspec

from vtriune.data.readers import Row, Table
from vtriune.data.schema import IMAGE_MARKER, PARQUET_SCHEMA, DataError, from_base64, parse_file_name

OWN = "this schema"
_IMAGE_COLUMNS = ("images", "image", "image_path", "image_paths")
_QUESTIONS = ("question", "problem", "query")
_SHAPES = (
    ("prompt", (str, list, NoneType), "text or a list of turns"),
    ("images", (str, bytes, list, Mapping, NoneType), "a picture or a list of them"),
    ("reward_model", (Mapping, NoneType), "keys of its own"),
    ("extra_info", (Mapping, NoneType), "keys of its own"),
)
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class Said(msgspec.Struct, frozen=True):
    """What is said of files in place of their rows; None where the rows say it."""

    source: str | None = None
    verifier: str | None = None
    verifier_parm: dict[str, Any] | None = None
    repeats: int | None = None
    """How often an epoch shows each row; None: as the file's name says."""

    @property
    def columns(self) -> set[str]:
        """Columns, and fields of `reward_model`, that rows need not have then."""
        said = {"data_source": self.source, "verifier": self.verifier}
        return {name for name, value in said.items() if value is not None}


class Adapter(NamedTuple):
    """How one file's rows are read."""

    form: str
    folder: Path
    """Where paths of pictures begin."""
    said: Said
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]

    def read(self, raw: Row) -> tuple[Row, list[Path]]:
        """The row in this schema, or why there is none; and the files that its pictures are in."""
        if isinstance(raw, str):
            return raw, []
        try:
            row = _with_said(_shaped(self.convert(raw)), self.said)
            pictures: list[Path] = []
            row["images"] = [_embedded(picture, self.folder, pictures) for picture in _listed(row["images"])]
        except DataError as error:
            return str(error), []
        if self.form != OWN:
            row["prompt"] = _with_markers(row["prompt"], len(row["images"]))
        return row, pictures


def recognise(table: Table, path: Path, said: Said) -> Adapter:
    """The adapter of a file. Raises DataError for columns of no known form, and where nobody names a verifier."""
    columns = set(table.columns)
    form = _form(table, columns)
    if form is None:
        raise DataError(f"{path}: {_unknown(columns)}. Columns found: {', '.join(table.columns)}")
    if form != OWN and said.verifier is None:
        raise DataError(
            f"{path}: rows of the form {form} ({table.kind}) name no verifier; say it for the file, as data.train: [{{files: {path}, "
            "verifier: mathverify}]"
        )
    source = said.source or _source_of(path)
    convert = {
        OWN: _own,
        "verl": lambda raw: _verl(raw, source),
        "TRL": lambda raw: _question(raw, source, ("prompt", *_QUESTIONS), ("solution",)),
        "LLaVA": lambda raw: _llava(raw, source),
        "question": lambda raw: _question(raw, source, _QUESTIONS, ("answer",)),
    }[form]
    return Adapter(form, path if path.is_dir() else path.parent, said, convert)


def _form(table: Table, columns: set[str]) -> str | None:
    if "reward_model" in columns:
        return OWN if _names_verifier(table) else "verl"
    if "conversations" in columns:
        return "LLaVA"
    if "solution" in columns and columns & {"prompt", *_QUESTIONS}:
        return "TRL"
    return "question" if "answer" in columns and columns & set(_QUESTIONS) else None


def _names_verifier(table: Table) -> bool:
    """Whether rewards have this schema's field, which verl's have not."""
    if table.schema is not None:
        kind = table.schema.field("reward_model").type
        return not hasattr(kind, "names") or "verifier" in kind.names or "style" not in kind.names
    first = next((row for _, rows in table.read() for row in rows if isinstance(row, dict)), {})
    reward = first.get("reward_model")
    return not isinstance(reward, dict) or "verifier" in reward or "style" not in reward


def _unknown(columns: set[str]) -> str:
    missing = [f"`{name}`" for name in PARQUET_SCHEMA.names if name not in columns]
    is_near = "data_source" in columns or len(missing) < len(PARQUET_SCHEMA.names) - 1
    if is_near:
        return f"column{'s' * (len(missing) > 1)} {', '.join(missing)} missing"
    return (
        "no known form. Known are this schema (data_source, prompt, reward_model, …), verl's, TRL's (prompt, solution), LLaVA's "
        "(conversations) and question with answer; rename the columns, or convert the file: python -m vtriune.data convert"
    )


def _source_of(path: Path) -> str:
    """By the name of the file, or of the folder that holds its shards."""
    for name in (path, path.parent):
        if (parsed := parse_file_name(name)) is not None:
            return parsed.source
    return path.stem


# One function a form: a row as it was read → a row of this schema, its pictures as they were given.


def _own(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(PARQUET_SCHEMA.names), **raw}


def _verl(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    reward, extra = raw.get("reward_model"), raw.get("extra_info")
    gold = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    extra = extra if isinstance(extra, Mapping) else {}
    named = raw.get("data_source") or source
    return _row(named, raw, raw.get("prompt"), gold, extra.get("id", extra.get("index")), raw.get("ability"))


def _question(raw: Mapping[str, Any], source: str, asked: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    question = next((raw[name] for name in asked if raw.get(name)), None)
    gold = next((raw[name] for name in answers if raw.get(name) is not None), None)
    return _row(source, raw, question, gold, raw.get("id"), None)


def _llava(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    said = raw.get("conversations")
    if not isinstance(said, list) or not all(isinstance(turn, Mapping) for turn in said):
        raise DataError(f"conversations is {str(said)[:60]!r}, not a list of turns {{from, value}}")
    turns = [
        {"role": _ROLES.get(str(turn.get("from", turn.get("role"))), turn.get("from")), "content": turn.get("value")}
        for turn in said
    ]
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError("conversations: the last turn must be gpt's, which is the gold answer")
    return _row(source, raw, turns[:-1], turns[-1]["content"], raw.get("id"), None)


def _row(source: str, raw: Mapping[str, Any], prompt: Any, gold: Any, sample_id: Any, ability: Any) -> dict[str, Any]:
    if isinstance(gold, list | dict):
        gold = msgspec.json.encode(gold).decode()
    prompt = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and not prompt.startswith("[{") else prompt
    )
    return {
        "data_source": source,
        "images": next((raw[name] for name in _IMAGE_COLUMNS if raw.get(name) is not None), None),
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"ground_truth": gold},
        "extra_info": {"id": raw.get("__key__") if sample_id is None else sample_id},
    }


def _shaped(row: dict[str, Any]) -> dict[str, Any]:
    """Columns of a file that states no types may hold anything; raises DataError for what `parse_row` could not take apart."""
    for name, kinds, wanted in _SHAPES:
        if not isinstance(row[name], kinds):
            raise DataError(f"{name} is {str(row[name])[:60]!r}, not {wanted}")
    for name in ("prompt", "images"):
        for index, entry in enumerate(row[name] if isinstance(row[name], list) else []):
            if not isinstance(entry, (Mapping, NoneType) if name == "prompt" else (Mapping, str, bytes, NoneType)):
                raise DataError(
                    f"{name}[{index}] is {str(entry)[:60]!r}, not {'a turn' if name == 'prompt' else 'a picture'}"
                )
    return row


def _with_said(row: dict[str, Any], said: Said) -> dict[str, Any]:
    """What is said of the file goes before what the row says."""
    if said.source is not None:
        row["data_source"] = said.source
    if said.verifier is None and said.verifier_parm is None:
        return row
    reward = dict(row["reward_model"] or {})
    if said.verifier is not None:
        reward["verifier"] = said.verifier
    if said.verifier_parm is not None:
        of_row = reward.get("verifier_parm") or {}
        if isinstance(of_row, str):
            of_row = _decoded(of_row)
        if not isinstance(of_row, Mapping):
            raise DataError(f"reward_model.verifier_parm is {str(of_row)[:60]!r}, not keys of its own")
        reward["verifier_parm"] = {**of_row, **said.verifier_parm}
    return row | {"reward_model": reward}


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


# Pictures.


def _listed(images: Any) -> Sequence[Any]:
    return images if isinstance(images, list) else [] if images in (None, "") else [images]


def _embedded(picture: Any, folder: Path, pictures: list[Path]) -> Any:
    """`picture` as bytes where it is the path of a file, which is added to `pictures`; else as it is."""
    path = picture
    if isinstance(picture, Mapping):
        if picture.get("bytes"):
            return picture
        path = picture.get("path")
    if not isinstance(path, str) or not path or from_base64(path) is not None:
        return picture
    if path.startswith(("http://", "https://")):
        raise DataError(
            f"a picture is an address; fetch it, `curl -LO {shlex.quote(path)}`, and write its path in its place"
        )
    file = folder / os.path.expanduser(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"the picture {str(file)!r} cannot be read ({error.strerror}); paths begin at the file's folder"
        ) from error
    pictures.append(file)
    return content


def _with_markers(prompt: Any, num_images: int) -> Any:
    """Other forms show pictures before the first question where no marker says where."""
    if not isinstance(prompt, list) or not num_images:
        return prompt
    asked = [turn for turn in prompt if isinstance(turn, Mapping) and turn.get("role") == "user"]
    is_shown = any(IMAGE_MARKER in str(turn.get("content")) or _has_image_part(turn.get("content")) for turn in asked)
    if is_shown or not asked or not isinstance(asked[0].get("content"), str):
        return prompt
    first = {**asked[0], "content": IMAGE_MARKER * num_images + "\n" + asked[0]["content"]}
    return [first if turn is asked[0] else turn for turn in prompt]


def _has_image_part(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") == "image" for part in content
    )
