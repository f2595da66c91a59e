"""Builds a store: reads Parquet batch by batch, checks every row, writes good rows to Arrow and bad ones to quarantine.

Called by the command lines before anything else starts. One pass, bounded memory (one batch of each kind), atomic: the store
appears under its key by one rename, or not at all. A second call with the same input opens what is there.
"""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from vtriune.data.schema import STORE_SCHEMA, DataError, Sample, check_columns, parse_file_name, parse_row
from vtriune.data.store import FORMAT, Index, Segment, Store, StoredFile

_READ_ROWS = 256
_BATCH_ROWS = 1024
_BATCH_BYTES = 32 * 2**20
_NUM_NAMED = 20
"""Bad rows that a refusal spells out."""

_COLUMNS = ["data_source", "images", "prompt", "ability", "reward_model", "extra_info"]


class RowChecks(Protocol):
    """What `build_store` asks of the checks; `validate.Checks` is the product's."""

    @property
    def identity(self) -> str:
        """Names everything the outcome depends on besides the rows: a store is reused only under the same identity."""

    def problems(self, samples: Sequence[Sample]) -> list[list[str]]:
        """Reasons why each sample cannot be trained on, in order; empty lists for good ones."""

    def close(self) -> None:
        """Called when a build has ended, well or not."""


class BadRow(msgspec.Struct, frozen=True):
    """One line of quarantine.jsonl."""

    file: str
    row: int
    source: str
    sample_id: str
    reasons: list[str]
    prompt: str


def build_store(
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    checks: RowChecks | None = None,
    on_bad_row: Literal["refuse", "quarantine"] = "refuse",
    on_progress: Callable[[int, int], None] | None = None,
) -> Store:
    """The store of `files` in order, below `folder`; built when it is not there.

    checks       examines every row; None: only that rows can be read
    on_progress  called with (rows done, rows in all files)
    Raises DataError: no file, an unreadable file or missing column (always), bad rows (`refuse`: the first 20 named, with the
    count of all), no good row left.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise DataError("no Parquet file named; list files under data.train or data.test")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_rows = [_num_rows(path) for path in paths]
    sources = [
        _Source(path, digest, rows, _repeats(path, rows))
        for path, digest, rows in zip(paths, _digests(paths, folder), num_rows, strict=True)
    ]
    identity = "" if checks is None else checks.identity
    key = _hash([FORMAT, [[source.digest, source.repeats] for source in sources], identity, on_bad_row])
    target = folder / key
    if not (target / "index.json").is_file():
        _build_at(target, sources, checks, on_bad_row, on_progress)
    return Store.open(target)


class _Source(msgspec.Struct, frozen=True):
    """One Parquet file to be stored."""

    path: Path
    digest: str
    num_rows: int
    repeats: int


def _build_at(
    target: Path,
    sources: Sequence[_Source],
    checks: RowChecks | None,
    on_bad_row: Literal["refuse", "quarantine"],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        build = _Build(work, sources)
        total, done = sum(source.num_rows for source in sources), 0
        for number, source in enumerate(sources):
            for first_row, raws in _read(source.path):
                build.add(number, first_row, raws, checks)
                done += len(raws)
                if on_progress is not None:
                    on_progress(done, total)
        build.finish(on_bad_row)
        _sync(work)
        try:
            work.rename(target)
        except OSError:
            # Another process built the same store first; its content is this one's.
            if not (target / "index.json").is_file():
                raise
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if checks is not None:
            checks.close()


class _Build:
    """A store in the making: rows in, files in `work` out."""

    def __init__(self, work: Path, sources: Sequence[_Source]) -> None:
        self._work = work
        self._sources = sources
        self._sink = pa.OSFile(str(work / "data.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._sink, STORE_SCHEMA)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._batch_starts: list[int] = []
        self._num_stored = 0
        self._per_file: list[Counter[str]] = [Counter() for _ in sources]
        self._excluded: list[list[int]] = [[] for _ in sources]
        self._named: list[BadRow] = []
        self._quarantine = (work / "quarantine.jsonl").open("wb")

    def add(self, number: int, first_row: int, raws: Sequence[dict[str, Any]], checks: RowChecks | None) -> None:
        parsed = [parse_row(raw) for raw in raws]
        samples = [sample for sample, _ in parsed if sample is not None]
        found = iter(checks.problems(samples) if checks is not None else [[] for _ in samples])
        for offset, (sample, reasons) in enumerate(parsed):
            row = first_row + offset
            if sample is not None:
                reasons = next(found)
            if sample is None or reasons:
                self._reject(number, row, raws[offset], reasons)
            else:
                self._keep(number, row, sample)

    def finish(self, on_bad_row: Literal["refuse", "quarantine"]) -> None:
        """Close the files and write the index; raises DataError when bad rows forbid the store."""
        self._flush()
        self._writer.close()
        self._sink.close()
        self._quarantine.close()
        num_bad = sum(map(len, self._excluded))
        if num_bad and (on_bad_row == "refuse" or not self._num_stored):
            raise DataError(self._refusal(num_bad))
        if not self._num_stored:
            raise DataError(f"{', '.join(str(source.path) for source in self._sources)}: no rows")
        if not num_bad:
            (self._work / "quarantine.jsonl").unlink()
        (self._work / "index.json").write_bytes(msgspec.json.format(msgspec.json.encode(self._index(num_bad))))

    def _keep(self, number: int, row: int, sample: Sample) -> None:
        self._pending.append(
            {
                "data_source": sample.source,
                "images": sample.images,
                "prompt": [{"role": turn.role, "content": turn.content} for turn in sample.prompt],
                "ability": sample.ability,
                "reward": msgspec.json.encode(sample.reward).decode(),
                "sample_id": sample.sample_id,
                "file": number,
                "file_row": row,
            }
        )
        self._per_file[number][sample.source] += 1
        self._pending_bytes += sum(map(len, sample.images))
        if len(self._pending) >= _BATCH_ROWS or self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=STORE_SCHEMA))
            self._batch_starts.append(self._num_stored)
            self._num_stored += len(self._pending)
            self._pending, self._pending_bytes = [], 0

    def _reject(self, number: int, row: int, raw: dict[str, Any], reasons: list[str]) -> None:
        self._excluded[number].append(row)
        prompt = "\n".join(str((turn or {}).get("content")) for turn in raw["prompt"] or [])
        sample_id = str((raw["extra_info"] or {}).get("id") or "")
        bad = BadRow(str(self._sources[number].path), row, str(raw["data_source"]), sample_id, reasons, prompt)
        self._quarantine.write(msgspec.json.encode(bad) + b"\n")
        if len(self._named) < _NUM_NAMED:
            self._named.append(bad)

    def _refusal(self, num_bad: int) -> str:
        lines = [f"{bad.file}, row {bad.row}: {'; '.join(bad.reasons)}" for bad in self._named]
        if num_bad > len(lines):
            lines.append(f"… and {num_bad - len(lines)} more")
        total = sum(source.num_rows for source in self._sources)
        advice = "Mend or remove them, or set data.on_bad_row: quarantine to train without them"
        return "\n".join([f"{num_bad} of {total} rows cannot be trained on:", *lines, f"{advice}."])

    def _index(self, num_bad: int) -> Index:
        segments: list[Segment] = []
        files: list[StoredFile] = []
        rows_per_source: Counter[str] = Counter()
        num_rows = first_stored = 0
        for source, stored in zip(self._sources, self._per_file, strict=True):
            num_stored = stored.total()
            files.append(StoredFile(str(source.path), source.digest, source.num_rows, num_stored, source.repeats))
            for _ in range(source.repeats if num_stored else 0):
                segments.append(Segment(num_rows, first_stored, num_stored))
                num_rows += num_stored
                rows_per_source.update(stored)
            first_stored += num_stored
        content = [[s.digest, s.repeats, excluded] for s, excluded in zip(self._sources, self._excluded, strict=True)]
        return Index(
            format=FORMAT,
            fingerprint=_hash([FORMAT, content]),
            num_rows=num_rows,
            num_quarantined=num_bad,
            data_bytes=(self._work / "data.arrow").stat().st_size,
            files=files,
            segments=segments,
            batch_starts=self._batch_starts,
            rows_per_source=dict(sorted(rows_per_source.items())),
        )


def _num_rows(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            check_columns(file.schema_arrow, path)
            num_rows: int = file.metadata.num_rows
            return num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def _read(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(first row, rows as Python objects), a batch at a time."""
    first_row = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_READ_ROWS, columns=_COLUMNS):
                yield first_row, batch.to_pylist()
                first_row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read from row {first_row} on ({error}); copy the file again") from error


def _repeats(path: Path, num_rows: int) -> int:
    """How often an epoch shows the file's rows: the `_x{k}` of its name, unless the file holds its rows k times already."""
    name = parse_file_name(path)
    if name is None or (name.repeats > 1 and num_rows == name.num_rows * name.repeats):
        return 1
    return name.repeats


def _digests(paths: Sequence[Path], folder: Path) -> list[str]:
    """sha256 of each file; remembered in `folder` by path, size and modification time, so that a second run reads no file."""
    memory_path = folder / "digests.json"
    memory: dict[str, list[Any]] = {}
    if memory_path.is_file():
        memory = msgspec.json.decode(memory_path.read_bytes(), type=dict[str, list[Any]])

    def digest(path: Path) -> str:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = memory.get(str(path.resolve()))
        if known is not None and known[:3] == stamp:
            return str(known[3])
        with path.open("rb") as file:
            computed = hashlib.file_digest(file, "sha256").hexdigest()
        memory[str(path.resolve())] = [*stamp, computed]
        return computed

    # hashlib releases the GIL: files are hashed side by side.
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(digest, paths))
    temporary = folder / f".digests-{os.getpid()}.json"
    temporary.write_bytes(msgspec.json.encode(memory))
    temporary.replace(memory_path)
    return digests


def _hash(content: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:24]


def _sync(folder: Path) -> None:
    """Flush the files of `folder` and the folder itself to disk."""
    for path in [*(child for child in folder.iterdir() if child.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
