"""Files as rows: Parquet, JSON lines, one JSON list, CSV and TSV, `datasets` folders and tar shards.

A file's first bytes say what it is, not its name. Rows come in batches, as Python objects with the columns of the file; one that cannot
be read comes as the reason, so that a bad line costs one row and not the file. What the columns mean is `adapters`' business.

    Parquet       its columns
    JSON lines    one object a line
    JSON list     the whole file is one list of objects (LLaVA's form); it is held in memory while it is read
    CSV, TSV      a header line; a cell that is a JSON list or object is read as such
    datasets      the folder that Hugging Face's `save_to_disk` writes, of one split
    tar           WebDataset shards: members of one name up to its first dot are a row; JSON members hold columns, pictures are `images`
"""

import csv
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from vtriune.data.schema import DataError

Row = dict[str, Any] | str
"""Columns by name; or why there is no row."""

BATCH_ROWS = 256
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tar")
"""Of the files that a folder is read for."""
_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_NUM_LOOKED_AT = 64
"""Rows whose names are the columns of a file that has no header."""


class Table(NamedTuple):
    """One file, opened far enough to know what is in it."""

    kind: str
    """As people call it: Parquet, JSON lines, …"""
    columns: tuple[str, ...]
    num_rows: int
    schema: pa.Schema | None
    """Types, where the file states them."""
    read: Callable[[], Iterator[tuple[int, list[Row]]]]
    """(first row, rows) a batch at a time; DataError from the first row on that cannot be got at."""


def open_table(path: Path) -> Table:
    """What `path` holds. Raises DataError, with what it is instead and the way on, for what is none of the kinds above."""
    try:
        return _open(path)
    except (OSError, pa.ArrowException, tarfile.TarError, UnicodeDecodeError, msgspec.DecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({_first_words(path) or error})") from error


def is_saved(path: Path) -> bool:
    """Whether it is a folder of the kind that `save_to_disk` writes."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _open(path: Path) -> Table:
    if path.is_dir():
        if not is_saved(path):
            raise DataError(
                f"{path}: is a folder, but none that `save_to_disk` wrote; name its files, {path}/*.parquet"
            )
        return _datasets_folder(path)
    with path.open("rb") as file:
        beginning = file.read(512)
    first = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if beginning.startswith(b"PAR1"):
        return _parquet(path)
    if beginning[257:262] == b"ustar" or path.suffix == ".tar":
        return _tar(path)
    if first == b"{":
        return _from_lines("JSON lines", lambda: _json_lines(path))
    if first == b"[":
        return _from_lines("JSON list", lambda: _json_list(path))
    if path.suffix.lower() in (".csv", ".tsv", ".tab"):
        return _csv(path, "," if path.suffix.lower() == ".csv" else "\t")
    what = _first_words(path) or f"it begins with {beginning[:16]!r}"
    raise DataError(f"{path}: cannot be read ({what}); Parquet, JSON lines, CSV, TSV, tar and `datasets` folders are")


def _first_words(path: Path) -> str | None:
    """What a file is that is none of ours, if its first bytes tell."""
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError:
        return None
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    known = (
        (b"\x1f\x8b", "it is gzip: unpack it first, `gunzip FILE`"),
        (b"PK\x03\x04", "it is a zip archive: unpack it first, `unzip FILE`"),
        (b"<", "it is a web page or XML, often what a failed download left: fetch it again"),
        (b"ARROW1", "it is one Arrow file: name the folder that `save_to_disk` wrote"),
        (
            b"\x80",
            "it is a pickle, which may run any program when read: python -m vtriune.data convert reads RefCOCO's",
        ),
    )
    if not beginning:
        return "it is empty"
    return next((what for start, what in known if beginning.startswith(start)), None)


# One function a kind.


def _parquet(path: Path) -> Table:
    with pq.ParquetFile(path) as file:
        schema, num_rows = file.schema_arrow, int(file.metadata.num_rows)

    def read() -> Iterator[tuple[int, list[Row]]]:
        first_row = 0
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    yield first_row, python_rows(batch)
                    first_row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read from row {first_row} on ({error}); copy the file again") from error

    return Table("Parquet", tuple(schema.names), num_rows, schema, read)


def python_rows(batch: pa.RecordBatch) -> list[Row]:
    """The rows of a batch, but for those whose text is not UTF-8, which come as the reason."""
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        # Parquet's writers do not all see to it that text is UTF-8. Row by row, the others can be kept.
        return [_python_row(batch.slice(row, 1)) for row in range(batch.num_rows)]


def _python_row(batch: pa.RecordBatch) -> Row:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[0].as_py()
        except UnicodeDecodeError as error:
            return f"column `{name}` holds text that is not UTF-8 ({error.object[:60]!r}); write the file again with UTF-8 text"
    return row


def _datasets_folder(path: Path) -> Table:
    """`state.json` names the files; their rows are Arrow streams, pictures among them `{bytes, path}`."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise DataError(f"{path}: holds the splits {', '.join(splits)}; name one, as {path / splits[0]}")
    state = json.loads((path / "state.json").read_text())
    if state.get("_indices_data_files"):
        raise DataError(f"{path}: was saved as a selection of rows; save it again after `flatten_indices()`")
    files = [path / entry["filename"] for entry in state["_data_files"]]

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                yield from stream

    def read() -> Iterator[tuple[int, list[Row]]]:
        first_row = 0
        for batch in batches():
            for start in range(0, batch.num_rows, BATCH_ROWS):
                rows = python_rows(batch.slice(start, BATCH_ROWS))
                yield first_row, rows
                first_row += len(rows)

    with pa.memory_map(str(files[0])) as mapped, pa.ipc.open_stream(mapped) as stream:
        schema = stream.schema
    return Table("datasets", tuple(schema.names), sum(batch.num_rows for batch in batches()), schema, read)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if line := line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").strip():
                yield _decoded(line)


def _json_list(path: Path) -> Iterator[Row]:
    for value in msgspec.json.decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), type=list[msgspec.Raw]):
        yield _decoded(bytes(value))


def _decoded(text: bytes) -> Row:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"is no JSON object ({error}): {text[:60]!r}"


def _csv(path: Path, delimiter: str) -> Table:
    # A cell may hold a picture in base64, or many boxes.
    csv.field_size_limit(2**27)

    def rows() -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for cells in csv.DictReader(file, delimiter=delimiter, restkey="", strict=True):
                if "" in cells or None in cells.values():
                    yield f"has another number of cells than the header's {len(cells) - ('' in cells)}"
                else:
                    yield {name: _cell(value) for name, value in cells.items()}

    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = tuple(next(csv.reader(file, delimiter=delimiter)))
    return Table(
        "CSV" if delimiter == "," else "TSV", columns, sum(1 for _ in rows()), None, lambda: _in_batches(rows())
    )


def _cell(text: str) -> Any:
    if text[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError:
            return text
    return text


def _tar(path: Path) -> Table:
    return _from_lines("tar", lambda: _tar_rows(path))


def _tar_rows(path: Path) -> Iterator[Row]:
    with tarfile.open(path) as archive:
        members = (member for member in archive if member.isfile())
        for key, group in itertools.groupby(members, lambda member: _key(member.name)):
            # One after the other: the archive is read once, from front to back.
            contents = ((_suffix(member.name), archive.extractfile(member)) for member in group)
            yield _tar_row(key, ((suffix, file.read()) for suffix, file in contents if file is not None))


def _key(name: str) -> str:
    """WebDataset's: the path up to the first dot of its last part."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def _suffix(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[2].lower()


def _tar_row(key: str, members: Iterable[tuple[str, bytes]]) -> Row:
    row: dict[str, Any] = {"__key__": key}
    images = []
    problem = None
    for suffix, content in members:
        if suffix.rpartition(".")[2] in _PICTURES:
            images.append(content)
        elif suffix == "json":
            columns = _decoded(content)
            problem = f"{key}.json {columns}" if isinstance(columns, str) else problem
            row |= {} if isinstance(columns, str) else columns
        else:
            row[suffix] = content.decode("utf-8", "replace")
    # What JSON says of pictures are names of members beside it.
    return problem or row | ({"images": images} if images else {})


def _from_lines(kind: str, rows: Callable[[], Iterator[Row]]) -> Table:
    """Of a file that states neither columns nor length: both by a pass over it."""
    columns: dict[str, None] = {}
    num_rows = 0
    for row in rows():
        if num_rows < _NUM_LOOKED_AT and isinstance(row, dict):
            columns |= dict.fromkeys(row)
        num_rows += 1
    return Table(kind, tuple(columns), num_rows, None, lambda: _in_batches(rows()))


def _in_batches(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    first_row = 0
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield first_row, batch
        first_row += len(batch)
