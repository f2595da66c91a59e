"""Parquet → store → samples: content, repeats, reuse, atomicity, bad rows, memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.rows import encoded, row, write_parquet
from vtriune.data import DataError, Sample, Store, StoreSet, build_store
from vtriune.data.findings import Finding
from vtriune.data.schema import PARQUET_SCHEMA
from vtriune.data.store import _even_shares
from vtriune.messages import SampleRef


class NoOdd:
    """Checks that refuse odd sample numbers."""

    identity = "no odd"
    num_closed = 0

    def examine(self, samples: Sequence[Sample]) -> list[Finding]:
        return [Finding(["odd"] if int(sample.sample_id[3:]) % 2 else []) for sample in samples]

    def remarks(self) -> dict[str, list[str]]:
        return {}

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two sources, 5 and 3 rows; the second shown twice per epoch."""
    return [
        write_parquet(tmp_path / "train_math_a_5.parquet", [row(number, "a") for number in range(5)]),
        write_parquet(tmp_path / "train_math_b_b_3_x2.parquet", [row(number, "b_b") for number in range(5, 8)]),
    ]


def test_every_row_comes_back_as_it_was_written(tmp_path: Path, files: list[Path]) -> None:
    store = build_store(files, tmp_path / "store")
    for number in range(8):
        sample = store.sample(number)
        written = row(number, "a" if number < 5 else "b_b")
        assert sample.images == [image["bytes"] for image in written["images"]]
        assert [{"role": turn.role, "content": turn.content} for turn in sample.prompt] == written["prompt"]
        assert (sample.row, sample.source, sample.sample_id) == (number, written["data_source"], f"id-{number}")
        assert (sample.reward.gold, sample.reward.format_ratio) == (written["reward_model"]["ground_truth"], 0.1)
        header = store.header(number)
        assert (store.source(number), header.source, header.reward) == (sample.source, sample.source, sample.reward)
        assert header.sample_id == sample.sample_id


def test_a_file_marked_x2_is_seen_twice_per_epoch_and_stored_once(tmp_path: Path, files: list[Path]) -> None:
    store = build_store(files, tmp_path / "store")
    assert len(store) == 5 + 2 * 3
    assert [store.sample(number).sample_id for number in range(5, 11)] == ["id-5", "id-6", "id-7"] * 2
    assert store.index.rows_per_source == {"a": 5, "b_b": 6}
    assert [file.num_stored for file in store.index.files] == [5, 3]
    assert (store.header(9).file, store.header(9).file_row) == (str(files[1]), 1)


def test_a_file_that_holds_its_repeats_already_is_not_repeated_again(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train_math_b_3_x2.parquet", [row(number % 3) for number in range(6)])
    assert len(build_store([path], tmp_path / "store")) == 6


def test_a_second_build_opens_the_first_one_without_reading_the_files(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_store(files, tmp_path / "store")
    made = (first.folder / "data.arrow").stat().st_mtime_ns
    monkeypatch.setattr("vtriune.data.build._Build.add_all", None)
    second = build_store(files, tmp_path / "store")
    assert (second.folder, (second.folder / "data.arrow").stat().st_mtime_ns) == (first.folder, made)


def test_a_changed_file_makes_another_store_and_a_copied_one_the_same(tmp_path: Path, files: list[Path]) -> None:
    first = build_store(files[:1], tmp_path / "store")
    copied = tmp_path / "elsewhere" / files[0].name
    copied.parent.mkdir()
    shutil.copy(files[0], copied)
    assert build_store([copied], tmp_path / "other").fingerprint == first.fingerprint
    write_parquet(files[0], [row(number, "a", answer="9") for number in range(5)])
    changed = build_store(files[:1], tmp_path / "store")
    assert changed.fingerprint != first.fingerprint
    assert changed.sample(0).reward.answer == "9"


def test_a_reference_to_another_store_is_refused(tmp_path: Path, files: list[Path]) -> None:
    one, other = (build_store([file], tmp_path / "store") for file in files)
    both = StoreSet([one, other])
    assert (both.get(one.ref(1)), both.get(other.ref(1))) == (one.sample(1), other.sample(1))
    with pytest.raises(DataError, match="store nowhere; this process opened"):
        both.get(SampleRef("nowhere", 0))


@pytest.mark.parametrize("number", [-1, 11])
def test_a_row_outside_the_store_is_an_index_error(tmp_path: Path, files: list[Path], number: int) -> None:
    store = build_store(files, tmp_path / "store")
    for ask in (store.sample, store.source, store.ref):
        with pytest.raises(IndexError, match=f"row {number} of a store with 11 rows"):
            ask(number)


def test_bad_rows_are_refused_by_file_and_row_and_no_store_is_left(tmp_path: Path, files: list[Path]) -> None:
    checks = NoOdd()
    with pytest.raises(DataError, match=r"4 of 8 rows cannot be trained on") as error:
        build_store(files, tmp_path / "store", checks=checks)
    assert str(error.value).splitlines()[1] == f"4 rows ({files[0]}, rows 1, 3; {files[1]}, rows 0, 2): odd"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["digests.json"]
    assert checks.num_closed == 1


def test_a_refusal_tells_a_reason_once_with_its_count_and_its_first_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "many.parquet", [row(1, answer=str(number)) for number in range(30)])
    with pytest.raises(DataError, match=r"30 of 30 rows") as error:
        build_store([path], tmp_path / "store", checks=NoOdd())
    assert str(error.value).splitlines()[1:-1] == [f"30 rows ({path}, rows 0, 1, 2, 3, 4 and 25 more): odd"]


def test_quarantined_rows_are_counted_and_written_with_their_reasons(tmp_path: Path, files: list[Path]) -> None:
    store = build_store(files, tmp_path / "store", checks=NoOdd(), on_bad_row="quarantine")
    assert [store.sample(number).sample_id for number in range(len(store))] == ["id-0", "id-2", "id-4", "id-6", "id-6"]
    assert store.index.num_quarantined == 4
    assert store.quarantine_path is not None
    lines = [json.loads(line) for line in store.quarantine_path.read_text().splitlines()]
    assert [(line["file"], line["row"], line["reasons"]) for line in lines] == [
        (str(files[0]), 1, ["odd"]),
        (str(files[0]), 3, ["odd"]),
        (str(files[1]), 0, ["odd"]),
        (str(files[1]), 2, ["odd"]),
    ]
    assert store.fingerprint != build_store(files, tmp_path / "store").fingerprint


def test_other_checks_make_another_store(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "even.parquet", [row(number) for number in (0, 2)])
    checked, unchecked = build_store([path], tmp_path / "s", checks=NoOdd()), build_store([path], tmp_path / "s")
    assert checked.folder != unchecked.folder
    assert checked.fingerprint == unchecked.fingerprint


def test_a_file_without_a_column_is_refused_even_under_quarantine(tmp_path: Path) -> None:
    schema = PARQUET_SCHEMA.remove(PARQUET_SCHEMA.get_field_index("prompt"))
    path = write_parquet(tmp_path / "lacking.parquet", [row(0)], schema)
    with pytest.raises(DataError, match=r"lacking\.parquet: column `prompt` is missing"):
        build_store([path], tmp_path / "store", on_bad_row="quarantine")


def test_text_that_is_not_utf_8_is_named_by_file_row_and_column_and_costs_no_other_row(tmp_path: Path) -> None:
    columns = pa.Table.from_pylist([row(number) for number in range(3)], schema=PARQUET_SCHEMA).to_pydict()
    latin = pa.array([b"math", "Zählen".encode("latin-1"), b"math"], pa.binary())
    arrays = {name: pa.array(columns[name], PARQUET_SCHEMA.field(name).type) for name in PARQUET_SCHEMA.names}
    arrays["ability"] = latin.view(pa.string())
    path = tmp_path / "latin.parquet"
    pq.write_table(pa.table(arrays), path)
    with pytest.raises(DataError, match=r"latin\.parquet, row 1: column `ability` holds text that is not UTF-8"):
        build_store([path], tmp_path / "store")
    store = build_store([path], tmp_path / "store", on_bad_row="quarantine")
    assert [store.sample(number).sample_id for number in range(len(store))] == ["id-0", "id-2"]


def test_a_missing_file_an_empty_list_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet: cannot be read"):
        build_store([tmp_path / "nowhere.parquet"], tmp_path / "store")
    with pytest.raises(DataError, match="no file named"):
        build_store([], tmp_path / "store")
    empty = write_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(DataError, match=r"empty\.parquet: no rows"):
        build_store([empty], tmp_path / "store")


def test_a_parquet_file_with_a_damaged_page_leaves_no_store(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    table = pa.Table.from_pylist([row(number) for number in range(50)], schema=PARQUET_SCHEMA)
    pq.write_table(table, path, write_page_checksum=True, compression="zstd")
    data = bytearray(path.read_bytes())
    data[2000:2100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged\.parquet: cannot be read from row 0 on"):
        build_store([path], tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["digests.json"]


def test_a_truncated_store_is_refused(tmp_path: Path, files: list[Path]) -> None:
    store = build_store(files, tmp_path / "store")
    data = store.folder / "data.arrow"
    os.truncate(data, data.stat().st_size - 8)
    with pytest.raises(DataError, match="delete the folder and start again"):
        Store.open(store.folder)


def test_processes_that_build_the_same_store_at_once_all_get_it(tmp_path: Path, files: list[Path]) -> None:
    code = "import sys; from vtriune.data import build_store; print(build_store(sys.argv[2:], sys.argv[1]).fingerprint)"
    command = [sys.executable, "-c", code, str(tmp_path / "store"), *map(str, files)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {builder.communicate(timeout=60)[0].strip() for builder in builders}
    assert found == {build_store(files, tmp_path / "store").fingerprint}
    assert not list((tmp_path / "store").glob(".*"))


def test_a_store_can_be_read_by_whoever_may_read_ordinary_files(tmp_path: Path, files: list[Path]) -> None:
    store = build_store(files, tmp_path / "store")
    (tmp_path / "ordinary").mkdir()
    assert store.folder.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path, files: list[Path]) -> None:
    code = (
        "import os, sys\n"
        "from vtriune.data import build, build_store\n"
        "build.parse_row = lambda _: os._exit(9)\n"
        "build_store(sys.argv[2:], sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store"), *map(str, files)], timeout=60)
    assert killed.returncode == 9
    store = build_store(files, tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == sorted(["digests.json", store.folder.name])


def test_reading_many_times_the_data_leaves_resident_memory_flat(tmp_path: Path) -> None:
    # 160 MiB of images, each read twice: twenty times what may stay.
    image = encoded(600, 600)
    rows = [row(number, images=[{"bytes": image, "path": None}]) for number in range(160 * 2**20 // len(image))]
    path = tmp_path / "large.parquet"
    table = pa.Table.from_pylist(rows, schema=PARQUET_SCHEMA)
    pq.write_table(table, path, row_group_size=16, compression="none", use_dictionary=False)
    del rows, table
    store = build_store([path], tmp_path / "store")
    assert store.index.data_bytes > 150 * 2**20
    process = psutil.Process()
    for number in range(0, len(store), 8):
        store.sample(number)
    before = process.memory_info().rss
    for _ in range(2):
        for number in range(len(store)):
            assert len(store.sample(number).images[0]) == len(image)
    assert process.memory_info().rss - before < 80 * 2**20


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 200))
def test_shares_are_even_complete_and_within_what_is_there(sizes: list[int], total: int) -> None:
    shares = _even_shares(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
    unfilled = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert max(shares) <= min(unfilled, default=max(shares)) + 1


def test_held_out_rows_are_spread_over_sources_in_order(tmp_path: Path, files: list[Path]) -> None:
    store = build_store(files, tmp_path / "store")
    assert store.spread(None) == store.spread(99) == list(range(11))
    picked = store.spread(4)
    assert picked == sorted(picked)
    assert [store.source(number) for number in picked] == ["a", "a", "b_b", "b_b"]
