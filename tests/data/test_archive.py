"""The rollout archive and the journal: what goes in comes out, whole, in order, in bounded memory."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metrics.groups import scored, trajectory, verdict
from vtriune.data import archive
from vtriune.data.archive import Archived
from vtriune.data.journal import Journal, Key, key_of, recover
from vtriune.messages import ScoredGroup, Trajectory, VersionSpan


def same(one: ScoredGroup, other: ScoredGroup) -> bool:
    """Field by field; arrays by content, NaN equal to NaN."""
    pairs = zip(one.group.trajectories, other.group.trajectories, strict=True)
    return (
        one.group.lease == other.group.lease
        and (one.source, one.verification_s) == (other.source, other.verification_s)
        and (one.group.generator, one.group.generation_s) == (other.group.generator, other.group.generation_s)
        and np.array_equal(one.group.prompt_ids, other.group.prompt_ids)
        and repr(one.verdicts) == repr(other.verdicts)
        and all(
            np.array_equal(a.token_ids, b.token_ids)
            and np.array_equal(a.logprobs, b.logprobs)
            and a.token_ids.dtype == b.token_ids.dtype == np.int32
            and a.logprobs.dtype == b.logprobs.dtype == np.float32
            and (a.spans, a.finish_reason, a.text) == (b.spans, b.finish_reason, b.text)
            for a, b in pairs
        )
    )


GROUPS = st.builds(
    lambda group_id, attempt, rewards, texts, source: scored(
        [verdict(reward, **{"map": 0.5, "label_first_iou@50": 0.25}) for reward in rewards],
        [trajectory(index + 1, texts[index % len(texts)], version=index, seed=index) for index in range(len(rewards))],
        group_id=group_id,
        attempt=attempt,
        source=source,
    ),
    st.integers(-(2**40), 2**40),
    st.integers(0, 3),
    st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=4),
    st.lists(st.text(max_size=20), min_size=1, max_size=3),
    st.text(min_size=1, max_size=5),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.none() | st.integers(0, 9), GROUPS), min_size=1, max_size=5))
def test_archived_groups_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[int | None, ScoredGroup]]
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    path = archive.write(folder, "version", 3, [Archived(version, group) for version, group in items])
    back = list(archive.read(path))
    assert [item.consumed_version for item in back] == [version for version, _ in items]
    assert all(same(item.group, group) for item, (_, group) in zip(back, items, strict=True))
    assert archive.files(folder, "version") == [(3, path)]


def test_groups_beyond_one_row_group_keep_their_order_and_bounds(tmp_path: Path) -> None:
    groups = [scored([verdict(1.0)] * (number % 3 + 1), group_id=number) for number in range(150)]
    path = archive.write(tmp_path, "version", 1, (Archived(0, group) for group in groups))
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups == 3
    assert all(same(item.group, group) for item, group in zip(archive.read(path), groups, strict=True))


def test_spans_of_several_versions_and_faults_survive(tmp_path: Path) -> None:
    long = Trajectory(
        np.arange(5, dtype=np.int32),
        -np.ones(5, np.float32),
        [VersionSpan(3, 2), VersionSpan(4, 3)],
        "length",
        "half \ud800",
    )
    path = archive.write(tmp_path, "evaluation", 4, [Archived(None, scored([verdict(None)], [long]))])
    (item,) = archive.read(path)
    assert item.group.group.trajectories[0].spans == long.spans
    assert item.group.group.trajectories[0].text == "half ?"
    assert (item.group.verdicts[0].status, item.group.verdicts[0].reason) == ("fault", "timeout")
    assert math.isnan(item.group.verdicts[0].reward)
    table = pq.read_table(path)
    assert table["reward"].to_pylist() == [None]


def test_a_file_tells_what_it_was_told_about_the_whole(tmp_path: Path) -> None:
    notes = {"mode": "off_policy", "max_staleness": "2"}
    path = archive.write(tmp_path, "version", 1, [Archived(0, scored([verdict(1.0)]))], notes)
    assert archive.notes_of(path) == notes
    assert archive.notes_of(archive.write(tmp_path, "version", 2, [Archived(1, scored([verdict(1.0)]))])) == {}


def test_a_file_being_written_is_not_among_the_files(tmp_path: Path) -> None:
    archive.write(tmp_path, "version", 1, [Archived(0, scored([verdict(1.0)]))])
    (tmp_path / ".version-000002.parquet.partial").write_bytes(b"half")
    assert [number for number, _ in archive.files(tmp_path, "version")] == [1]
    assert archive.files(tmp_path / "nowhere", "version") == []


def test_later_versions_are_removed_and_unconsumed_groups_stay(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        for kind in ("version", "evaluation", "unconsumed"):
            archive.write(tmp_path, kind, number, [Archived(None, scored([verdict(1.0)]))])
    removed = archive.remove_after(tmp_path, 1)
    assert sorted(path.name for path in removed) == sorted(
        f"{kind}-{number:06d}.parquet" for kind in ("version", "evaluation") for number in (2, 3)
    )
    assert len(archive.files(tmp_path, "unconsumed")) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "forget"]), st.integers(0, 30)), max_size=60))
def test_a_journal_is_a_dictionary_on_disk_that_outlives_its_process(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal, model = Journal(path), {}
    for action, number in actions:
        key = Key(number // 2, number % 2)
        if action == "append" and key not in model:
            model[key] = scored([verdict(0.5)], [trajectory(number + 1, seed=number)], **key._asdict())
            journal.append(model[key])
        elif action == "forget" and key in model:
            journal.forget([key])
            del model[key]
        assert len(journal) == len(model)
    assert all(same(one, other) for one, other in zip(journal.read(model), model.values(), strict=True))
    # Nothing was closed: this is what a kill leaves.
    assert [key_of(group.group.lease) for group in recover(path)] == list(model)
    assert all(same(group, model[key_of(group.group.lease)]) for group in recover(path))
    journal.close()
    assert not path.exists()


def test_a_torn_tail_of_a_journal_costs_its_last_group_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for group_id in range(3):
        journal.append(scored([verdict(1.0)], group_id=group_id))
    size = (tmp_path / "journal").stat().st_size
    for cut in range(size - 1, size * 2 // 3, -1):
        os.truncate(tmp_path / "journal", cut)
        assert [group.group.lease.group_id for group in recover(tmp_path / "journal")] == [0, 1]
    assert recover(tmp_path / "nowhere") == []


def test_a_journal_refuses_a_known_id_and_an_unknown_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(scored([verdict(1.0)], group_id=4))
    with pytest.raises(ValueError, match="group 4, attempt 0, is in the journal already"):
        journal.append(scored([verdict(1.0)], group_id=4))
    with pytest.raises(KeyError):
        list(journal.read([Key(4, 1)]))
    journal.close()


def test_a_journal_in_use_for_long_stays_small_in_memory_and_on_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    heavy = [trajectory(40_000, "x" * 40_000)] * 4
    before = psutil.Process().memory_info().rss
    kept = scored([verdict(1.0)] * 4, heavy, group_id=-1)
    journal.append(kept)
    for group_id in range(400):
        journal.append(scored([verdict(1.0)] * 4, heavy, group_id=group_id))
        if group_id >= 10:
            journal.forget([Key(group_id - 10, 0)])
    assert (tmp_path / "journal").stat().st_size < 200 * 2**20
    assert psutil.Process().memory_info().rss - before < 60 * 2**20
    (back,) = journal.read([Key(-1, 0)])
    assert same(back, kept)
    journal.close()


def test_parquet_files_are_readable_after_their_writer_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from tests.metrics.groups import scored, verdict\n"
        "from vtriune.data import archive\n"
        "def groups():\n"
        "    for number in range(200):\n"
        "        if number == 130 and sys.argv[2] == '2':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield archive.Archived(0, scored([verdict(1.0)], group_id=number))\n"
        "archive.write(pathlib.Path(sys.argv[1]), 'version', int(sys.argv[2]), groups())\n"
    )
    codes = [subprocess.run([sys.executable, "-c", code, str(tmp_path), number]).returncode for number in ("1", "2")]
    assert codes == [0, -9]
    assert [number for number, _ in archive.files(tmp_path, "version")] == [1]
    assert len(list(archive.read(tmp_path / "version-000001.parquet"))) == 200
