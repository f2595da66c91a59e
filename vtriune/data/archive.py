"""Trajectories in Parquet: one row per completion, enough to read, to draw and to train on again.

The recorder writes, `learner.replay`, `verifiers.rescore` and people read. A file appears under its name only when it is whole.

    rollouts/version-000012.parquet      what version 12 was made of: groups in the order they were consumed
    rollouts/evaluation-000012.parquet   held-out responses sampled at version 12
    rollouts/unconsumed-000001.parquet   groups that were scored and never trained on (filtered, or left at the end)
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verifiers import Verdict
from vtriune.durable import sync
from vtriune.messages import Group, Lease, SampleRef, Sampling, ScoredGroup, Trajectory, VersionSpan

Kind = Literal["version", "evaluation", "unconsumed"]

_GROUPS_PER_ROW_GROUP = 64
_NAME = re.compile(r"(version|evaluation|unconsumed)-(\d+)\.parquet")

SCHEMA = pa.schema(
    [
        ("group_id", pa.int64()),
        ("attempt", pa.int32()),
        ("index", pa.int32()),  # of the completion within its group
        ("consumed_version", pa.int64()),  # the learner's version while it trained on the group; null: it never did
        ("purpose", pa.string()),
        ("source", pa.string()),
        ("fingerprint", pa.string()),
        ("row", pa.int64()),
        ("prompt_seed", pa.uint64()),
        ("progress", pa.float64()),
        ("temperature", pa.float64()),
        ("max_tokens", pa.int32()),
        ("seed", pa.uint64()),
        ("num_completions", pa.int32()),
        ("generator", pa.int32()),
        ("generation_s", pa.float64()),
        ("verification_s", pa.float64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("spans", pa.list_(pa.struct([("version", pa.int64()), ("num_tokens", pa.int64())]))),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),
        ("reward", pa.float64()),  # null under a fault, like the next two
        ("accuracy", pa.float64()),
        ("format", pa.float64()),
        ("components", pa.map_(pa.string(), pa.float64())),
        ("reason", pa.string()),
    ]
)


class Archived(NamedTuple):
    """A group and what became of it."""

    consumed_version: int | None
    group: ScoredGroup


def write(
    folder: Path, kind: Kind, number: int, groups: Iterable[Archived], notes: Mapping[str, str] | None = None
) -> Path:
    """Write `groups` to the file of that kind and number; replaces one of the same name. On disk when this returns.

    `notes` become the file's key-value metadata, see `notes_of`. Memory: 64 groups at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{number:06d}.parquet"
    temporary = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        writer.add_key_value_metadata(dict(notes or {}))
        rows: list[dict[str, Any]] = []
        for count, archived in enumerate(groups, 1):
            rows += _rows(archived)
            if count % _GROUPS_PER_ROW_GROUP == 0:
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    sync(temporary)
    temporary.replace(path)
    sync(folder)
    return path


def files(folder: Path, kind: Kind) -> list[tuple[int, Path]]:
    """(number, path) of every whole file of that kind, in order."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[2]), path) for match, path in named if match is not None and match[1] == kind)


def notes_of(path: Path) -> dict[str, str]:
    """What `write` was told about the whole file: for a version's, `mode` and `max_staleness` while it was consumed."""
    stored = pq.read_metadata(path).metadata or {}
    return {key.decode(): value.decode() for key, value in stored.items() if key != b"ARROW:schema"}


def read(path: Path) -> Iterator[Archived]:
    """The groups of one file, in the order they were written; memory: one row group at a time.

    A group of which another tool removed rows comes back with the trajectories that are there.
    """
    with pq.ParquetFile(path) as file:
        pending: list[dict[str, Any]] = []
        for number in range(file.num_row_groups):
            for row in file.read_row_group(number).to_pylist():
                if pending and row["index"] <= pending[-1]["index"]:
                    yield _archived(pending)
                    pending = []
                pending.append(row)
        if pending:
            yield _archived(pending)


def remove_after(folder: Path, version: int) -> list[Path]:
    """Remove the files of versions beyond `version`, which a resumed run makes again; returns them."""
    kinds: tuple[Kind, ...] = ("version", "evaluation")
    removed = [path for kind in kinds for number, path in files(folder, kind) if number > version]
    for path in removed:
        path.unlink()
    return removed


def _rows(archived: Archived) -> list[dict[str, Any]]:
    scored = archived.group
    group, lease = scored.group, scored.group.lease
    shared = {
        "group_id": lease.group_id,
        "attempt": lease.attempt,
        "consumed_version": archived.consumed_version,
        "purpose": lease.purpose,
        "source": scored.source,
        "fingerprint": lease.sample.fingerprint,
        "row": lease.sample.row,
        "prompt_seed": lease.prompt_seed,
        "progress": lease.progress,
        "temperature": lease.sampling.temperature,
        "max_tokens": lease.sampling.max_tokens,
        "seed": lease.sampling.seed,
        "num_completions": lease.num_completions,
        "generator": group.generator,
        "generation_s": group.generation_s,
        "verification_s": scored.verification_s,
        "prompt_ids": group.prompt_ids,
    }
    pairs = zip(group.trajectories, scored.verdicts, strict=True)
    return [
        {**shared, "index": index, **_own(trajectory, verdict)} for index, (trajectory, verdict) in enumerate(pairs)
    ]


def _own(trajectory: Trajectory, verdict: Verdict) -> dict[str, Any]:
    is_judged = verdict.status != "fault"
    return {
        "token_ids": trajectory.token_ids,
        "logprobs": trajectory.logprobs,
        "spans": [{"version": span.version, "num_tokens": span.num_tokens} for span in trajectory.spans],
        "finish_reason": trajectory.finish_reason,
        "text": trajectory.text.encode("utf-8", "replace").decode(),
        "status": verdict.status,
        "reward": verdict.reward if is_judged else None,
        "accuracy": verdict.accuracy if is_judged else None,
        "format": verdict.format if is_judged else None,
        "components": list(verdict.components.items()),
        "reason": verdict.reason,
    }


def _archived(rows: Sequence[dict[str, Any]]) -> Archived:
    first = rows[0]
    lease = Lease(
        group_id=first["group_id"],
        attempt=first["attempt"],
        sample=SampleRef(first["fingerprint"], first["row"]),
        num_completions=first["num_completions"],
        sampling=Sampling(first["temperature"], first["max_tokens"], first["seed"]),
        purpose=first["purpose"],
        progress=first["progress"],
        prompt_seed=first["prompt_seed"],
    )
    group = Group(
        lease=lease,
        prompt_ids=np.asarray(first["prompt_ids"], np.int32),
        trajectories=[_trajectory(row) for row in rows],
        generator=first["generator"],
        generation_s=first["generation_s"],
    )
    verdicts = [_verdict(row) for row in rows]
    return Archived(first["consumed_version"], ScoredGroup(group, first["source"], verdicts, first["verification_s"]))


def _trajectory(row: dict[str, Any]) -> Trajectory:
    return Trajectory(
        token_ids=np.asarray(row["token_ids"], np.int32),
        logprobs=np.asarray(row["logprobs"], np.float32),
        spans=[VersionSpan(span["version"], span["num_tokens"]) for span in row["spans"]],
        finish_reason=row["finish_reason"],
        text=row["text"],
    )


def _verdict(row: dict[str, Any]) -> Verdict:
    reward, accuracy, form = (
        float("nan") if row[name] is None else row[name] for name in ("reward", "accuracy", "format")
    )
    return Verdict(row["status"], reward, accuracy, form, dict(row["components"]), row["reason"])
