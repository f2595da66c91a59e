"""A scored group as rows of a table, one per completion, and back. Called by `vtriune.record.archive` alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
from msgspec.structs import asdict

from verifiers import RewardSpec, Verdict, columns
from verifiers.texts import Decoder, FileError
from vtriune.messages import (
    Group,
    Lease,
    SampleHeader,
    SampleRef,
    Sampling,
    ScoredGroup,
    Trajectory,
    VersionSpan,
)

T = TypeVar("T", bound=msgspec.Struct)

_SCORES = ("reward", "accuracy", "format")
"""Null under a fault."""
SCHEMA = pa.schema(
    [
        ("group_id", pa.int64()),
        ("attempt", pa.int32()),
        ("index", pa.int32()),  # of the completion within its group
        ("consumed_version", pa.int64()),  # the learner's version while it trained on the group; null: it never did
        ("purpose", pa.string()),
        (columns.SOURCE, pa.string()),
        ("fingerprint", pa.string()),
        ("row", pa.int64()),  # of the store; the next three name it in the data
        ("sample_id", pa.string()),
        ("file", pa.string()),
        ("file_row", pa.int64()),
        ("probability", pa.float64()),  # that a pass over the data drew the row
        (columns.SPEC, pa.string()),
        (
            columns.IMAGE_SIZES,
            pa.list_(pa.struct([(name, pa.list_(pa.int32(), 2)) for name in ("original", "resized")])),
        ),
        ("prompt_seed", pa.uint64()),
        (columns.PROGRESS, pa.float64()),
        ("temperature", pa.float64()),
        ("max_tokens", pa.int32()),
        ("seed", pa.uint64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int32()),
        ("num_completions", pa.int32()),
        ("generator", pa.int32()),
        ("generation_s", pa.float64()),
        ("verification_s", pa.float64()),
        ("prompt_ids", pa.list_(pa.int32())),  # in a group's first row, null in its others
        (columns.TOKEN_IDS, pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # null throughout under record.logprobs: false
        ("spans", pa.list_(pa.struct([("version", pa.int64()), ("num_tokens", pa.int64())]))),
        ("finish_reason", pa.string()),
        (columns.RESPONSE, pa.string()),  # null where the file's tokenizer gives it
        ("status", pa.string()),
        *((score, pa.float64()) for score in _SCORES),
        ("components", pa.map_(pa.string(), pa.float64())),
        ("reason", pa.string()),
    ]
)
_ARRAYS = {"prompt_ids": np.int32, columns.TOKEN_IDS: np.int32, "logprobs": np.float32}
"""Columns of a list per row: moved as a whole, a value at a time would take a microsecond a token."""
SMALL = pa.schema([field for field in SCHEMA if field.name not in (*_ARRAYS, columns.RESPONSE)])
"""The other columns: most values are those of the row above."""


class Archived(NamedTuple):
    """A group and what became of it."""

    consumed_version: int | None
    group: ScoredGroup


def table_of(batch: Sequence[Archived], decoder: Decoder | None, keeps_logprobs: bool) -> pa.Table:
    """A row per trajectory, under SCHEMA."""
    groups = [archived.group.group for archived in batch]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    small = pa.Table.from_pylist([row for archived in batch for row in _rows(archived)], schema=SMALL)
    big = {
        "prompt_ids": _lists(
            [None if index else group.prompt_ids for group in groups for index, _ in enumerate(group.trajectories)]
        ),
        columns.TOKEN_IDS: _lists([trajectory.token_ids for trajectory in trajectories]),
        "logprobs": _lists([trajectory.logprobs if keeps_logprobs else None for trajectory in trajectories]),
        columns.RESPONSE: pa.array([_stored_text(trajectory, decoder) for trajectory in trajectories], pa.string()),
    }
    values = [big[f.name].cast(f.type) if f.name in big else small[f.name] for f in SCHEMA]
    return pa.Table.from_arrays(values, schema=SCHEMA)


def _lists(arrays: Sequence[np.ndarray | None]) -> pa.Array:
    """A list per array; null for None."""
    offsets = np.cumsum([0, *(0 if array is None else len(array) for array in arrays)], dtype=np.int32)
    known = [array for array in arrays if array is not None]
    values = pa.array(np.concatenate(known) if known else np.empty(0, np.float32))
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array([array is None for array in arrays]))


def _stored_text(trajectory: Trajectory, decoder: Decoder | None) -> str | None:
    """None when `decoder` gives the very text that was scored."""
    text = trajectory.text.encode("utf-8", "replace").decode()
    return None if decoder is not None and decoder.tells(trajectory.token_ids, text) else text


def _rows(archived: Archived) -> list[dict[str, Any]]:
    """Per trajectory the columns of `SMALL`: the fields of all that it belongs to, under their names."""
    scored = archived.group
    group, lease = scored.group, scored.group.lease
    shared: dict[str, Any] = {"consumed_version": archived.consumed_version}
    for part in (lease, lease.sample, lease.header, lease.sampling, group, scored):
        shared |= asdict(part)
    shared[columns.SPEC] = msgspec.json.encode(lease.header.reward).decode()
    shared[columns.IMAGE_SIZES] = [asdict(size) for size in group.image_sizes]
    pairs = zip(group.trajectories, scored.verdicts, strict=True)
    return [{**shared, "index": index, **_own(*pair)} for index, pair in enumerate(pairs)]


def _own(trajectory: Trajectory, verdict: Verdict) -> dict[str, Any]:
    return {
        **asdict(verdict),
        **(dict.fromkeys(_SCORES) if verdict.status == "fault" else {}),
        "finish_reason": trajectory.finish_reason,
        "spans": [asdict(span) for span in trajectory.spans],
        "components": list(verdict.components.items()),
    }


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows with an array, or None, under the names of `_ARRAYS`."""
    rows: list[dict[str, Any]] = table.drop_columns(list(_ARRAYS)).to_pylist()
    for name, kind in _ARRAYS.items():
        lists = table[name].combine_chunks()
        values, offsets = np.asarray(lists.values, kind), np.asarray(lists.offsets)
        for row, start, end, is_there in zip(
            rows, offsets[:-1], offsets[1:], lists.is_valid().to_pylist(), strict=True
        ):
            row[name] = values[start:end].copy() if is_there else None
    return rows


def group_of(rows: Sequence[dict[str, Any]], path: Path) -> Archived:
    first = rows[0]
    if first["prompt_ids"] is None:
        raise FileError(f"{path}: group {first['group_id']} is without its first row, which holds the prompt of all")
    spec = msgspec.json.decode(first[columns.SPEC], type=RewardSpec)
    group = _made(
        Group,
        first,
        lease=_made(
            Lease,
            first,
            sample=_made(SampleRef, first),
            header=_made(SampleHeader, first, reward=spec),
            sampling=_made(Sampling, first),
        ),
        prompt_ids=first["prompt_ids"],
        trajectories=[_trajectory(row) for row in rows],
        image_sizes=columns.sizes_of(first[columns.IMAGE_SIZES]),
    )
    scored = _made(ScoredGroup, first, group=group, verdicts=[_verdict(row) for row in rows])
    return Archived(first["consumed_version"], scored)


def _trajectory(row: dict[str, Any]) -> Trajectory:
    return _made(
        Trajectory,
        row,
        logprobs=np.empty(0, np.float32) if row["logprobs"] is None else row["logprobs"],
        spans=[VersionSpan(**span) for span in row["spans"]],
    )


def _verdict(row: dict[str, Any]) -> Verdict:
    scores = {name: math.nan if row[name] is None else row[name] for name in _SCORES}
    return _made(Verdict, row, components=dict(row["components"]), **scores)


def _made(kind: type[T], row: dict[str, Any], **others: Any) -> T:
    """A `kind` of `others` and, by their names, of the row's columns."""
    return kind(**{name: row[name] for name in kind.__struct_fields__ if name in row} | others)
