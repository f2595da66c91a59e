"""Trajectories in Parquet: one row per completion, enough to read, to draw and to train on again.

The recorder writes, `learner.replay`, `verifiers.rescore` and people read. A file appears under its name only when it is whole. What
the rescorer needs stands under the names of `verifiers.columns`, the reward options in the file's metadata.

    rollouts/version-000012.parquet      what version 12 was made of: groups in the order they were consumed
    rollouts/evaluation-000012.parquet   held-out responses sampled at version 12
    rollouts/unconsumed-000001.parquet   groups that were scored and never trained on (filtered, or left at the end)
    rollouts/tokenizer-3f….json          decodes the texts that the files leave out

Bytes a token of English: 1.3 for its id, 2.4 to 3.5 for its log-prob (split by byte: the low bits of a mantissa are noise), none for
its text, which is decoded on reading (stored, it would be 1.2). A prompt's ids stand in the first row of its group alone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import pyarrow.parquet as pq

from verifiers import columns
from verifiers.texts import Decoder, FileError, decoder_of, filled
from vtriune import whole_files
from vtriune.record.rows import SCHEMA, SMALL, group_of, rows_of, table_of
from vtriune.record.rows import Archived as Archived
from vtriune.runtime import report_step

Kind = Literal["version", "evaluation", "unconsumed"]

ORDER = "order"
_FORMAT, _FORMAT_KEY = "2", "archive_format"
_HAS_LOGPROBS_KEY = "has_logprobs"
_TOKENS_PER_ROW_GROUP, _ROWS_PER_ROW_GROUP = 2**20, 8192
_NAME = re.compile(r"(version|evaluation|unconsumed)-(\d+)\.parquet")
_WRITING: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    # A dictionary stores once what rows share, like a group's specification; it would hide the repetitions in ids from zstd.
    "use_dictionary": [field.name for field in SMALL],
    "column_encoding": {"logprobs.list.element": "BYTE_STREAM_SPLIT"},
    # One page per column of a row group: zstd sees all of it.
    "data_page_size": 2**24,
}


def write(
    folder: Path,
    kind: Kind,
    number: int,
    groups: Iterable[Archived],
    notes: Mapping[str, str] | None = None,
    *,
    decoder: Decoder | None = None,
    keeps_logprobs: bool = True,
) -> Path:
    """Write `groups` to the file of that kind and number; replaces one of the same name. On disk when this returns.

    `notes` become the file's key-value metadata, see `notes_of`; the texts that `decoder` gives are left out. Memory: a row group of a
    million tokens, and one group more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{number:06d}.parquet"
    of_format = {_FORMAT_KEY: _FORMAT, _HAS_LOGPROBS_KEY: msgspec.json.encode(keeps_logprobs).decode()}
    of_texts = {} if decoder is None else decoder.save(folder)
    # In the schema, tools that copy rows carry it along.
    schema = SCHEMA.with_metadata({**of_format, **of_texts, **(notes or {})})
    with whole_files.replacing(path) as partial, pq.ParquetWriter(partial, schema, **_WRITING) as writer:
        num_written = 0
        for batch in _row_groups(groups):
            writer.write_table(table_of(batch, decoder, keeps_logprobs))
            num_written += len(batch)
            report_step("archive", f"{num_written} groups of {path.name} are written")
    return path


def prune(folder: Path, max_bytes: float) -> list[Path]:
    """Remove the oldest files until the others take at most `max_bytes`; the newest version's stays whatever its size. Returns them."""
    newest = [path for _, path in files(folder, "version")[-1:]]
    found = {path: path.stat() for kind in get_args(Kind) for _, path in files(folder, kind)}
    num_bytes, removed = sum(stat.st_size for stat in found.values()), []
    for path in sorted(found, key=lambda path: (found[path].st_mtime_ns, path.name)):
        if num_bytes > max_bytes and path not in newest:
            path.unlink()
            num_bytes -= found[path].st_size
            removed.append(path)
    return removed


def files(folder: Path, kind: Kind) -> list[tuple[int, Path]]:
    """(number, path) of every whole file of that kind, in order."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[2]), path) for match, path in named if match is not None and match[1] == kind)


def notes_of(path: Path) -> dict[str, str]:
    """What `write` was told about the whole file: the reward options, and for a version's, under ORDER the TrainOrder it was trained
    under, both as JSON."""
    ours = ("ARROW:schema", _FORMAT_KEY, _HAS_LOGPROBS_KEY, columns.TOKENIZER)
    return {key: value for key, value in _metadata(path).items() if key not in ours}


def has_logprobs(path: Path) -> bool:
    """Whether the sampler's log-probs were archived: `record.logprobs`."""
    return _metadata(path).get(_HAS_LOGPROBS_KEY) != "false"


def read(path: Path) -> Iterator[Archived]:
    """The groups of one file, in the order they were written; memory: one row group at a time.

    Without archived log-probs trajectories have empty ones, see `has_logprobs`. A group of which another tool removed rows comes
    back with the trajectories that are there. Raises FileError for a file of another format, one without its tokenizer, and a
    group without its first row.
    """
    found = _metadata(path).get(_FORMAT_KEY)
    if found != _FORMAT:
        raise FileError(
            f"{path}: archives are read in format {_FORMAT}, and this file is of {f'format {found}' if found else 'an earlier one'}; "
            "read it with the version of vtriune that wrote it"
        )
    decoder = decoder_of(path)
    with pq.ParquetFile(path) as file:
        pending: list[dict[str, Any]] = []
        for number in range(file.num_row_groups):
            for row in rows_of(filled(file.read_row_group(number), decoder)):
                if pending and row["index"] <= pending[-1]["index"]:
                    yield group_of(pending, path)
                    pending = []
                pending.append(row)
        if pending:
            yield group_of(pending, path)


def last_attempt(path: Path) -> int:
    """The highest attempt among the groups of one file; -1 for none."""
    return max(pq.read_table(path, columns=["attempt"])["attempt"].to_pylist(), default=-1)


def remove_after(folder: Path, version: int) -> list[Path]:
    """Remove the files of versions beyond `version`, which a resumed run makes again; returns them."""
    kinds: tuple[Kind, ...] = ("version", "evaluation")
    removed = [path for kind in kinds for number, path in files(folder, kind) if number > version]
    for path in removed:
        path.unlink()
    return removed


def _metadata(path: Path) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (pq.read_metadata(path).metadata or {}).items()}


def _row_groups(groups: Iterable[Archived]) -> Iterator[list[Archived]]:
    """Whole groups, together as many as a row group takes."""
    batch: list[Archived] = []
    num_tokens = num_rows = 0
    for archived in groups:
        batch.append(archived)
        num_tokens += sum(len(trajectory.token_ids) for trajectory in archived.group.group.trajectories)
        num_rows += len(archived.group.group.trajectories)
        if num_tokens >= _TOKENS_PER_ROW_GROUP or num_rows >= _ROWS_PER_ROW_GROUP:
            yield batch
            batch, num_tokens, num_rows = [], 0, 0
    if batch:
        yield batch
