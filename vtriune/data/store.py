"""Files → one memory-mapped Arrow IPC file, built once; a row of it is what a message names.

The command line builds (or finds) the store of a list of files; every process that needs pixels opens the same folder
memory-mapped. Nothing is copied until a row is asked for, and touched pages are handed back to the kernel, so that a process's
resident memory does not grow with the data.

    <folder>/<key>/data.arrow        rows in file order, record batches of at most 32 MiB or 1,024 rows
    <folder>/<key>/index.json        fingerprint, files, segments of logical rows, batch offsets, counts per source
    <folder>/<key>/measures.jsonl    sizes, lengths and picture hashes of each stored row
    <folder>/<key>/quarantine.jsonl  rows left out, each with file, row and reasons (only when there are any)
    <folder>/<key>/pictures.json     size and time of the pictures that rows name by path (only when there are any)

The key names the input: contents of the files, checks applied, what happens to bad rows. The fingerprint names the result:
the contents and which rows were left out. Both ignore paths and modification times, so a copied file gives the same store.
"""

import bisect
import itertools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from verifiers import RewardSpec
from vtriune.data.schema import DataError, Sample, Turn
from vtriune.messages import SampleHeader, SampleRef

FORMAT = 4
"""Raised whenever stored rows or the index change shape."""

_HEADER = ["data_source", "reward", "sample_id", "file", "file_row"]
_RELEASE_BYTES = 64 * 2**20
"""Mapped bytes handed out before the pages are given back."""


class StoredFile(msgspec.Struct, frozen=True):
    """One file's share of a store."""

    path: str
    digest: str
    """sha256 of the file"""
    num_rows: int
    """rows in the file, bad ones included"""
    num_stored: int
    repeats: int
    """how often its rows occur in an epoch"""
    form: str
    """what it was read as: `LLaVA (JSON lines)`"""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """`num_rows` logical rows from `first_row` on are the stored rows from `first_stored` on."""

    first_row: int
    first_stored: int
    num_rows: int


class Index(msgspec.Struct, frozen=True):
    """Everything about a store but its rows."""

    format: int
    fingerprint: str
    num_rows: int
    """logical rows: stored rows, each counted as often as its file repeats"""
    num_quarantined: int
    data_bytes: int
    files: list[StoredFile]
    segments: list[Segment]
    batch_starts: list[int]
    """first stored row of each record batch"""
    rows_per_source: dict[str, int]
    """logical rows; sorted by source"""
    notes: dict[str, list[str]] = {}
    """by source: what the checks say of rows that are stored, such as pictures that are changed on reading"""


class Store:
    """Rows of one store folder. Made by `open_store`, `Store.open` or `build.build_store`; safe to read from several threads."""

    def __init__(self, folder: Path, index: Index, mapping: mmap.mmap) -> None:
        self.folder = folder
        self.index = index
        self._mapping = mapping
        self._reader = pa.ipc.open_file(pa.py_buffer(mapping))
        self._batches: dict[int, pa.RecordBatch] = {}
        self._segment_starts = [segment.first_row for segment in index.segments]
        self._num_touched_bytes = 0

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """Map the store in `folder`. Raises DataError when it is missing, of another format or incomplete."""
        folder = Path(folder)
        try:
            index = msgspec.json.decode((folder / "index.json").read_bytes(), type=Index)
            with (folder / "data.arrow").open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no readable store ({error}); delete the folder and start again") from error
        if index.format != FORMAT or len(mapping) != index.data_bytes:
            raise DataError(
                f"{folder}: store of format {index.format} with {len(mapping)} bytes where format {FORMAT} with "
                f"{index.data_bytes} is expected; delete the folder and start again"
            )
        return cls(folder, index, mapping)

    @property
    def fingerprint(self) -> str:
        """Hash of the store's content: equal on every machine that stores the same rows in the same order."""
        return self.index.fingerprint

    @property
    def quarantine_path(self) -> Path | None:
        """Where the rows left out are listed with their reasons; None when there are none."""
        return self.folder / "quarantine.jsonl" if self.index.num_quarantined else None

    def __len__(self) -> int:
        return self.index.num_rows

    def ref(self, row: int) -> SampleRef:
        """The name of `row` in messages; IndexError outside the store."""
        self._check(row)
        return SampleRef(self.fingerprint, row)

    def sample(self, row: int, *, with_images: bool = True) -> Sample:
        """The sample at `row`, its encoded images copied out of the map, or none; IndexError outside the store."""
        names = ("data_source", "prompt", "ability", "reward", "sample_id")
        fields = {"images": []} | self._fields(row, ("images", *names) if with_images else names)
        self._count_touched(sum(map(len, fields["images"])))
        return Sample(
            row=row,
            source=fields["data_source"],
            prompt=[Turn(**turn) for turn in fields["prompt"]],
            images=fields["images"],
            reward=msgspec.json.decode(fields["reward"], type=RewardSpec),
            ability=fields["ability"],
            sample_id=fields["sample_id"],
        )

    def source(self, row: int) -> str:
        """`data_source` of `row`, without its images."""
        source: str = self._fields(row, ("data_source",))["data_source"]
        return source

    def header(self, row: int) -> SampleHeader:
        """`row` without its prompt and images: what its leases carry."""
        return self._header(self._fields(row, _HEADER))

    def _header(self, fields: Mapping[str, Any]) -> SampleHeader:
        return SampleHeader(
            source=fields["data_source"],
            reward=msgspec.json.decode(fields["reward"], type=RewardSpec),
            sample_id=fields["sample_id"],
            file=self.index.files[fields["file"]].path,
            file_row=fields["file_row"],
        )

    def distinct_rows(self) -> list[int]:
        """A row for each stored one, in the order of storage: those of a file that an epoch shows several times, once."""
        firsts = {segment.first_stored: segment for segment in reversed(self.index.segments)}
        shown = [firsts[first] for first in sorted(firsts)]
        return [row for segment in shown for row in range(segment.first_row, segment.first_row + segment.num_rows)]

    def rows_by_source(self) -> dict[str, np.ndarray]:
        """int64: the rows of each source, in order; one that an epoch shows several times is there as often."""
        batches = range(len(self.index.batch_starts))
        columns = (self._reader.get_batch(number).column("data_source") for number in batches)
        stored = np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns])
        sources = np.concatenate(
            [stored[segment.first_stored : segment.first_stored + segment.num_rows] for segment in self.index.segments]
        )
        return {source: np.flatnonzero(sources == source) for source in self.index.rows_per_source}

    def headers(self) -> Iterator[SampleHeader]:
        """Of every stored row, in order; a file that an epoch shows several times counts once."""
        for number in range(len(self.index.batch_starts)):
            for fields in self._reader.get_batch(number).select(_HEADER).to_pylist():
                yield self._header(fields)

    def forms(self) -> dict[str, list[str]]:
        """What the files were read as, with the files of each."""
        found: dict[str, list[str]] = {}
        for file in self.index.files:
            found.setdefault(file.form, []).append(file.path)
        return found

    def spread(self, num_rows: int | None) -> list[int]:
        """At most `num_rows` rows in order, as evenly over the sources as they allow and evenly within each; None: all."""
        if num_rows is None or num_rows >= len(self):
            return list(range(len(self)))
        by_source = self.rows_by_source()
        shares = _even_shares([len(rows) for rows in by_source.values()], num_rows)
        picked = (_every_nth(rows, share) for rows, share in zip(by_source.values(), shares, strict=True))
        return sorted(itertools.chain.from_iterable(picked))

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} rows ({self.folder})")

    def stored(self, row: int) -> int:
        """Where `row` is stored: once, however often an epoch shows it. IndexError for a row that is not there."""
        self._check(row)
        segment = self.index.segments[bisect.bisect_right(self._segment_starts, row) - 1]
        return segment.first_stored + row - segment.first_row

    def _fields(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        stored = self.stored(row)
        number = bisect.bisect_right(self.index.batch_starts, stored) - 1
        batch = self._batches.get(number)
        if batch is None:
            # Record batches are views into the map: keeping them costs their metadata only.
            batch = self._batches.setdefault(number, self._reader.get_batch(number))
        fields: dict[str, Any] = batch.select(names).slice(stored - self.index.batch_starts[number], 1).to_pylist()[0]
        return fields

    def _count_touched(self, num_bytes: int) -> None:
        # The kernel keeps the pages in its cache; dropping them from this process only keeps its resident size flat.
        self._num_touched_bytes += num_bytes
        if self._num_touched_bytes >= _RELEASE_BYTES:
            self._num_touched_bytes = 0
            self._mapping.madvise(mmap.MADV_DONTNEED)


class StoreSet:
    """Several stores (training and held-out) behind one `get`, for processes that serve both."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = {store.fingerprint: store for store in stores}

    @classmethod
    def open(cls, folders: Sequence[str | Path]) -> "StoreSet":
        """Map every folder; raises like `Store.open`."""
        return cls([Store.open(folder) for folder in folders])

    def get(self, ref: SampleRef) -> Sample:
        """The sample that `ref` names; DataError when it is of none of these stores."""
        store = self._stores.get(ref.fingerprint)
        if store is None:
            known = ", ".join(f"{name} ({store.folder})" for name, store in self._stores.items())
            raise DataError(f"sample reference of store {ref.fingerprint}; this process opened {known}")
        return store.sample(ref.row)


def _even_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Split `total` over groups of the given sizes: equal shares, what a small group cannot fill goes to the others."""
    shares = [0] * len(sizes)
    by_size = sorted(range(len(sizes)), key=lambda group: sizes[group])
    left = min(total, sum(sizes))
    for position, group in enumerate(by_size):
        shares[group] = min(sizes[group], left // (len(sizes) - position))
        left -= shares[group]
    return shares


def _every_nth(rows: np.ndarray, num_picked: int) -> list[int]:
    return [int(rows[index * len(rows) // num_picked]) for index in range(num_picked)]
