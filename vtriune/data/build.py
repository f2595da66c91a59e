"""Builds a store: reads files batch by batch, checks every row, writes good rows to Arrow and bad ones to quarantine.

Called by the command lines before anything else starts. One pass, bounded memory (one batch of each kind), atomic: the store
appears under its key by one rename, or not at all. A second call with the same input opens what is there, unless a picture that rows
name by path has been changed since.
"""

import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import pyarrow as pa

from vtriune import whole_files
from vtriune.data.adapters import OWN, Adapter, Said, recognise
from vtriune.data.findings import Finding, Tally
from vtriune.data.measures import Measures, Writer
from vtriune.data.readers import Row, Table, open_table
from vtriune.data.schema import STORE_SCHEMA, DataError, Sample, check_columns, parse_file_name, parse_row
from vtriune.data.store import FORMAT, Index, Segment, Store, StoredFile

_PICTURES = "pictures.json"
_BATCH_ROWS = 1024
_BATCH_BYTES = 32 * 2**20


class RowChecks(Protocol):
    """What `build_store` asks of the checks; `validate.Checks` is the product's."""

    @property
    def identity(self) -> str:
        """Names everything the outcome depends on besides the rows: a store is reused only under the same identity."""

    def examine(self, samples: Sequence[Sample]) -> list[Finding]:
        """What there is to say of each sample, in order."""

    def remarks(self) -> Mapping[str, list[str]]:
        """What the samples examined say together, by source."""

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


class Input(NamedTuple):
    """A file, or a folder that is read as one, and what is said of its rows."""

    path: Path
    said: Said = Said()


def build_store(
    files: Sequence[str | Path | Input],
    folder: str | Path,
    *,
    checks: RowChecks | None = None,
    on_bad_row: Literal["refuse", "quarantine"] = "refuse",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """The store of `files` in order, below `folder`; built when it is not there.

    checks  examines every row; None: only that rows can be read
    tell    is told how many rows of all are done, a batch at a time
    Raises DataError: no file, an unreadable file or missing column (always), bad rows (`refuse`: each reason with its count and its
    first rows), no good row left.
    """
    inputs = [file if isinstance(file, Input) else Input(Path(file)) for file in files]
    if not inputs:
        raise DataError("no file named; list files under data.train or data.test")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [_source(each, digest) for each, digest in zip(inputs, _digests(inputs, folder), strict=True)]
    identity = "" if checks is None else checks.identity
    content = [[source.digest, source.repeats, source.adapter.said] for source in sources]
    target = folder / _hash([FORMAT, content, identity, on_bad_row])
    if (target / "index.json").is_file() and _are_changed(target / _PICTURES):
        shutil.rmtree(target)
    if not (target / "index.json").is_file():
        _build_at(target, sources, checks, on_bad_row, tell)
    return Store.open(target)


class _Source(NamedTuple):
    """One file to be stored."""

    path: Path
    digest: str
    repeats: int
    table: Table
    adapter: Adapter


def _source(given: Input, digest: str) -> _Source:
    table = open_table(given.path)
    adapter = recognise(table, given.path, given.said)
    if table.schema is not None and adapter.form == OWN:
        check_columns(table.schema, given.path, given.said.columns)
    repeats = given.said.repeats or _repeats(given.path, table.num_rows)
    return _Source(given.path, digest, repeats, table, adapter)


def _build_at(
    target: Path,
    sources: Sequence[_Source],
    checks: RowChecks | None,
    on_bad_row: Literal["refuse", "quarantine"],
    tell: Callable[[int, int], None],
) -> None:
    try:
        with whole_files.replacing(target, is_shared=True) as work:
            work.mkdir()
            build = _Build(work, sources)
            build.add_all(checks, tell)
            build.finish(on_bad_row, {} if checks is None else checks.remarks())
    except OSError:
        # Another process built the same store first; its content is this one's.
        if not (target / "index.json").is_file():
            raise
    finally:
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
        self._reasons = Tally()
        self._notes: defaultdict[str, Tally] = defaultdict(Tally)
        self._quarantine = (work / "quarantine.jsonl").open("wb")
        self._measures = Writer(work)
        self._pictures: dict[Path, Sequence[int]] = {}
        self._pictures_digest = hashlib.sha256()

    def add_all(self, checks: RowChecks | None, tell: Callable[[int, int], None]) -> None:
        """Read and check every row of the sources."""
        num_done, total = 0, sum(source.table.num_rows for source in self._sources)
        for number, source in enumerate(self._sources):
            for first_row, raws in source.table.read():
                self._add(number, first_row, [self._adapted(source.adapter, raw) for raw in raws], checks)
                num_done += len(raws)
                tell(num_done, total)

    def _adapted(self, adapter: Adapter, raw: Row) -> Row:
        row, pictures = adapter.read(raw)
        for picture in pictures:
            self._pictures.setdefault(picture, _stamp(picture))
        return row

    def _add(self, number: int, first_row: int, raws: Sequence[Row], checks: RowChecks | None) -> None:
        parsed = [(None, [raw]) if isinstance(raw, str) else parse_row(raw) for raw in raws]
        samples = [sample for sample, _ in parsed if sample is not None]
        found = iter(checks.examine(samples) if checks is not None else [Finding([]) for _ in samples])
        for row, (raw, (sample, reasons)) in enumerate(zip(raws, parsed, strict=True), first_row):
            finding = Finding(reasons) if sample is None else next(found)
            if sample is None or finding.problems:
                self._reject(number, row, {} if isinstance(raw, str) else raw, finding.problems)
            else:
                self._keep(number, row, sample, finding.measures)
                for note in finding.notes:
                    self._notes[sample.source].add(note, str(self._sources[number].path), row)

    def finish(self, on_bad_row: Literal["refuse", "quarantine"], remarks: Mapping[str, list[str]]) -> None:
        """Close the files and write the index; raises DataError when bad rows forbid the store."""
        self._flush()
        self._writer.close()
        self._sink.close()
        self._quarantine.close()
        self._measures.close()
        num_bad = sum(map(len, self._excluded))
        if num_bad and (on_bad_row == "refuse" or not self._num_stored):
            raise DataError(self._refusal(num_bad))
        if not self._num_stored:
            raise DataError(f"{', '.join(str(source.path) for source in self._sources)}: no rows")
        if not num_bad:
            (self._work / "quarantine.jsonl").unlink()
        if self._pictures:
            stamps = {str(path): stamp for path, stamp in self._pictures.items()}
            (self._work / _PICTURES).write_bytes(msgspec.json.encode(stamps))
        (self._work / "index.json").write_bytes(msgspec.json.format(msgspec.json.encode(self._index(num_bad, remarks))))

    def _keep(self, number: int, row: int, sample: Sample, measures: Measures | None) -> None:
        self._measures.add(measures)
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
        if self._pictures:
            for image in sample.images:
                self._pictures_digest.update(hashlib.sha256(image).digest())
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
        path, prompt = str(self._sources[number].path), raw.get("prompt") or []
        if not isinstance(prompt, str):
            prompt = "\n".join(str((turn or {}).get("content")) for turn in prompt)
        sample_id = str((raw.get("extra_info") or {}).get("id") or "")
        bad = BadRow(path, row, str(raw.get("data_source")), sample_id, reasons, prompt)
        self._quarantine.write(msgspec.json.encode(bad) + b"\n")
        for reason in reasons:
            self._reasons.add(reason, path, row)

    def _refusal(self, num_bad: int) -> str:
        total = sum(source.table.num_rows for source in self._sources)
        advice = "Mend or remove them, or set data.on_bad_row: quarantine to train without them"
        return "\n".join([f"{num_bad} of {total} rows cannot be trained on:", *self._reasons.lines(), f"{advice}."])

    def _index(self, num_bad: int, remarks: Mapping[str, list[str]]) -> Index:
        segments, files = [], []
        rows_per_source: Counter[str] = Counter()
        num_rows = first_stored = 0
        for source, stored in zip(self._sources, self._per_file, strict=True):
            num_stored = stored.total()
            files.append(
                StoredFile(
                    str(source.path), source.digest, source.table.num_rows, num_stored, source.repeats,
                    f"{source.adapter.form} ({source.table.kind})",
                )
            )  # fmt: skip
            for _ in range(source.repeats if num_stored else 0):
                segments.append(Segment(num_rows, first_stored, num_stored))
                num_rows += num_stored
                rows_per_source.update(stored)
            first_stored += num_stored
        content: list[Any] = [
            [source.digest, source.repeats, source.adapter.said, excluded]
            for source, excluded in zip(self._sources, self._excluded, strict=True)
        ]
        if self._pictures:
            content.append(self._pictures_digest.hexdigest())
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
            notes={
                source: [*remarks.get(source, []), *(self._notes[source].lines() if source in self._notes else [])]
                for source in sorted({*remarks, *self._notes})
            },
        )


def _repeats(path: Path, num_rows: int) -> int:
    """How often an epoch shows the file's rows: the `_x{k}` of its name, unless the file holds its rows k times already, or of the name
    of the folder that holds its shards."""
    name = parse_file_name(path)
    if name is None:
        of_folder = parse_file_name(path.parent)
        return 1 if of_folder is None else of_folder.repeats
    return 1 if name.repeats > 1 and num_rows == name.num_rows * name.repeats else name.repeats


def _digests(inputs: Sequence[Input], folder: Path) -> list[str]:
    """sha256 of each file; remembered in `folder` by path, size and modification time, so that a second run reads no file."""
    memory_path = folder / "digests.json"
    stored = memory_path.read_bytes() if memory_path.is_file() else b"{}"
    memory = msgspec.json.decode(stored, type=dict[str, list[Any]])

    def of_file(path: Path) -> str:
        stamp = _stamp(path)
        known = memory.get(str(path.resolve()))
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        with path.open("rb") as file:
            computed = hashlib.file_digest(file, "sha256").hexdigest()
        memory[str(path.resolve())] = [*stamp, computed]
        return computed

    def digest(given: Input) -> str:
        path = given.path
        return _hash([of_file(each) for each in _files_below(path)]) if path.is_dir() else of_file(path)

    # hashlib releases the GIL: files are hashed side by side.
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            digests = list(pool.map(digest, inputs))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    with whole_files.replacing(memory_path, is_shared=True) as partial:
        partial.write_bytes(msgspec.json.encode(memory))
    return digests


def _files_below(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _stamp(path: Path) -> list[int]:
    """What a change of the file changes: size, time of writing, place on disk."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _are_changed(stamps: Path) -> bool:
    """Whether a picture that was read for a store is another now, or gone."""
    if not stamps.is_file():
        return False
    known = msgspec.json.decode(stamps.read_bytes(), type=dict[str, list[int]])
    return any(not Path(path).is_file() or _stamp(Path(path)) != stamp for path, stamp in known.items())


def _hash(content: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:24]
