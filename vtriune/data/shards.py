"""Rows as Parquet files in this schema: those of a store that are kept, and those that other formats are converted to."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from vtriune import whole_files
from vtriune.data.adapters import OWN
from vtriune.data.schema import PARQUET_SCHEMA, DataError, Sample, parse_file_name
from vtriune.data.store import Store, StoredFile

_ROWS = 256
_REWARD = PARQUET_SCHEMA.field("reward_model").type
_AS_TEXT = PARQUET_SCHEMA.set(
    PARQUET_SCHEMA.get_field_index("reward_model"),
    pa.field("reward_model", pa.struct([*list(_REWARD)[:-1], pa.field("verifier_parm", pa.string())])),
)
"""Rows of other forms may bring parameters of any name, as JSON."""


def write_kept(store: Store, kept: Sequence[int], out: Path) -> list[Path]:
    """Writes these rows of `store` below `out`, a file for each one that they come from, and returns the files. A Parquet file of this
    schema keeps its columns and types."""
    out.mkdir(parents=True, exist_ok=True)
    by_file: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in kept:
        header = store.header(row)
        by_file[header.file].append((header.file_row, row))
    paths: list[Path] = []
    for file in store.index.files:
        if rows := sorted(by_file.get(file.path, [])):
            target = out / _name(file, len(rows), {path.name for path in paths})
            is_own = file.form == f"{OWN} (Parquet)"
            tables = (
                _taken(Path(file.path), [row for row, _ in rows]) if is_own else _made(store, [row for _, row in rows])
            )
            _write(target, tables)
            paths.append(target)
    return paths


def write_samples(samples: Iterable[Sample], out: Path, split: str, task: str, source: str) -> Path:
    """Writes all samples to one file below `out`, whose name says what they are and how many. Memory: a batch of rows. Raises DataError
    for none."""
    out.mkdir(parents=True, exist_ok=True)
    partial, num_rows = out / f".{split}_{task}_{source}.parquet.partial", 0
    try:
        with pq.ParquetWriter(partial, _AS_TEXT, compression="zstd") as writer:
            remaining = iter(samples)
            while batch := list(islice(remaining, _ROWS)):
                writer.write_table(pa.Table.from_pylist([_row(sample) for sample in batch], schema=_AS_TEXT))
                num_rows += len(batch)
        if not num_rows:
            raise DataError(f"{out}: there is no row to write")
        path = out / f"{split}_{task}_{source}_{num_rows}.parquet"
        whole_files.install(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _name(file: StoredFile, num_rows: int, taken: set[str]) -> str:
    """`{split}_{task}_{source}_{num}[_x{k}].parquet` with the number that is left; any other name stays."""
    path = Path(file.path)
    parts = parse_file_name(path)
    name = path.stem
    if parts is not None:
        repeats = f"_x{file.repeats}" if file.repeats > 1 else ""
        name = f"{parts.split}_{parts.task}_{parts.source}_{num_rows}{repeats}"
    while f"{name}.parquet" in taken:
        name = f"{path.parent.name}_{name}"
    return f"{name}.parquet"


def _taken(path: Path, rows: Sequence[int]) -> Iterator[pa.Table]:
    """These rows of a Parquet file, a batch at a time."""
    first, wanted = 0, iter([*rows, -1])
    row = next(wanted)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            places = []
            while first <= row < first + batch.num_rows:
                places.append(row - first)
                row = next(wanted)
            first += batch.num_rows
            yield pa.Table.from_batches([batch]).take(places)


def _made(store: Store, rows: Sequence[int]) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _ROWS):
        samples = [store.sample(row) for row in rows[start : start + _ROWS]]
        yield pa.Table.from_pylist([_row(sample) for sample in samples], schema=_AS_TEXT)


def _row(sample: Sample) -> dict[str, Any]:
    reward = msgspec.structs.asdict(sample.reward)
    parm = sample.reward.verifier_parm
    return {
        "data_source": sample.source,
        "images": [{"bytes": data, "path": None} for data in sample.images],
        "prompt": [{"role": turn.role, "content": turn.content} for turn in sample.prompt],
        "ability": sample.ability,
        "reward_model": {**reward, "verifier_parm": msgspec.json.encode(parm).decode() if parm else None},
        "extra_info": {"id": sample.sample_id, "image_path": None},
    }


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with whole_files.replacing(path) as partial, pq.ParquetWriter(partial, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
