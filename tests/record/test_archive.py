"""The rollout archive and the journal: what goes in comes out, whole, in order, in bounded memory."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import bench.english
from bench.english import English
from tests.record.groups import scored, trajectory, verdict
from verifiers import RewardSpec
from verifiers.texts import Decoder, FileError
from vtriune.messages import ScoredGroup, Trajectory, VersionSpan
from vtriune.record import archive
from vtriune.record.archive import Archived
from vtriune.record.journal import DeliveryKey, Journal, key_of, recover


def same(one: ScoredGroup, other: ScoredGroup) -> bool:
    """Field by field; arrays by content, NaN equal to NaN."""
    pairs = zip(one.group.trajectories, other.group.trajectories, strict=True)
    return (
        one.group.lease == other.group.lease
        and (one.group.image_sizes, one.verification_s) == (other.group.image_sizes, other.verification_s)
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


def test_groups_beyond_one_row_group_keep_their_order_and_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(archive, "_TOKENS_PER_ROW_GROUP", 400)
    groups = [scored([verdict(1.0)] * (number % 3 + 1), group_id=number) for number in range(150)]
    path = archive.write(tmp_path, "version", 1, (Archived(0, group) for group in groups))
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups == 3
    assert [step for work, step in told if work == "archive"] == [
        f"{count} groups of version-000001.parquet are written" for count in (51, 102, 150)
    ]
    assert all(same(item.group, group) for item, group in zip(archive.read(path), groups, strict=True))


def test_what_is_held_while_writing_and_reading_is_bounded_in_tokens_however_long_completions_are(
    tmp_path: Path,
) -> None:
    long = [trajectory(2**17)] * 2
    groups = (Archived(0, scored([verdict(1.0)] * 2, long, group_id=number)) for number in range(12))
    path = archive.write(tmp_path, "version", 1, groups)
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups == 3, "of 2^20 tokens each"
    assert [item.group.group.lease.group_id for item in archive.read(path)] == list(range(12))


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
    notes = {archive.ORDER: "{}"}
    path = archive.write(tmp_path, "version", 1, [Archived(0, scored([verdict(1.0)]))], notes)
    assert archive.notes_of(path) == notes
    assert archive.notes_of(archive.write(tmp_path, "version", 2, [Archived(1, scored([verdict(1.0)]))])) == {}


def test_a_specification_is_stored_once_for_the_completions_that_share_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    golds = ["".join(map(chr, rng.integers(97, 123, 4000))) for _ in range(64)]
    groups = [
        scored([verdict(1.0)] * 8, group_id=number, spec=RewardSpec(ground_truth=gold))
        for number, gold in enumerate(golds)
    ]
    path = archive.write(tmp_path, "version", 1, [Archived(0, group) for group in groups])
    chunks = pq.read_metadata(path).row_group(0)
    sizes = {chunks.column(index).path_in_schema: chunks.column(index) for index in range(chunks.num_columns)}
    assert sizes["reward_model"].total_uncompressed_size < 1.05 * sum(map(len, golds)) + 10_000
    assert all(sizes[name].total_compressed_size < 300 for name in ("source", "file", "fingerprint"))


def test_a_file_being_written_is_not_among_the_files(tmp_path: Path) -> None:
    archive.write(tmp_path, "version", 1, [Archived(0, scored([verdict(1.0)]))])
    (tmp_path / ".version-000002.parquet.partial").write_bytes(b"half")
    assert [number for number, _ in archive.files(tmp_path, "version")] == [1]
    assert archive.files(tmp_path / "nowhere", "version") == []


def test_a_file_that_cannot_be_finished_leaves_the_earlier_one_and_nothing_aside(tmp_path: Path) -> None:
    path = archive.write(tmp_path, "version", 1, [Archived(0, scored([verdict(1.0)]))])
    earlier = path.read_bytes()

    def broken() -> Iterator[Archived]:
        yield Archived(0, scored([verdict(0.0)]))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        archive.write(tmp_path, "version", 1, broken())
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [(path.name, earlier)]


def test_a_journal_that_cannot_be_written_anew_keeps_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vtriune.record.journal._COMPACT_BYTES", 0)
    journal = Journal(tmp_path / "journal")
    groups = [scored([verdict(1.0)], group_id=number) for number in range(4)]
    for group in groups:
        journal.append(group)
    keys = [key_of(group.group.lease) for group in groups]
    monkeypatch.setattr(os, "pread", no_space)
    with pytest.raises(OSError, match="No space"):
        journal.forget(keys[:3])
    monkeypatch.undo()
    assert keys[3] in journal
    assert all(same(one, other) for one, other in zip(journal.read(keys[3:]), groups[3:], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def english(num_groups: int = 12, size: int = 8, num_tokens: int = 1000) -> tuple[Decoder, list[ScoredGroup]]:
    """Groups of real text by a real tokenizer, with prompts of a thousand tokens; the text does not repeat itself."""
    decoder = bench.english.decoder()
    text = English(decoder)
    assert num_groups * size * num_tokens < text.num_tokens
    made = []
    for number in range(num_groups):
        ids = [text.ids(num_tokens) for _ in range(size)]
        trajectories = [
            Trajectory(
                row, text.logprobs(num_tokens), [VersionSpan(0, num_tokens)], "stop", decoder.decode(row.tolist())
            )
            for row in ids
        ]
        group = scored([verdict(0.5, map=0.25 * index) for index in range(size)], trajectories, group_id=number)
        prompt = np.random.default_rng(number).integers(0, 2**14, 1000).astype(np.int32)
        made.append(replace(group, group=replace(group.group, prompt_ids=prompt)))
    return decoder, made


def test_a_token_of_english_takes_six_bytes_with_its_log_prob_and_two_and_a_half_without(tmp_path: Path) -> None:
    decoder, groups = english()
    num_tokens = sum(len(t.token_ids) for group in groups for t in group.group.trajectories)
    archived = [Archived(0, group) for group in groups]
    whole = archive.write(tmp_path, "version", 1, archived, decoder=decoder)
    bare = archive.write(tmp_path, "version", 2, archived, decoder=decoder, keeps_logprobs=False)
    assert whole.stat().st_size <= 6 * num_tokens
    assert bare.stat().st_size <= 2.5 * num_tokens
    assert all(same(item.group, group) for item, group in zip(archive.read(whole), groups, strict=True))
    assert (archive.has_logprobs(whole), archive.has_logprobs(bare)) == (True, False)
    back = [trajectory for item in archive.read(bare) for trajectory in item.group.group.trajectories]
    assert {len(trajectory.logprobs) for trajectory in back} == {0}
    assert [t.text for t in back] == [t.text for group in groups for t in group.group.trajectories]


def test_a_prompt_is_stored_once_for_its_group_and_no_text_that_its_tokens_tell(tmp_path: Path) -> None:
    decoder, groups = english(2, size=4, num_tokens=50)
    path = archive.write(tmp_path, "version", 1, [Archived(0, group) for group in groups], decoder=decoder)
    table = pq.read_table(path)
    assert [ids is not None for ids in table["prompt_ids"].to_pylist()] == [index % 4 == 0 for index in range(8)]
    assert table["text"].null_count == 8


def test_a_text_that_its_tokens_do_not_tell_is_stored_and_comes_back_as_it_was_scored(tmp_path: Path) -> None:
    decoder, (group,) = english(1, size=3, num_tokens=50)
    first, *rest = group.group.trajectories
    odd = replace(group, group=replace(group.group, trajectories=[replace(first, text=f"{first.text} "), *rest]))
    path = archive.write(tmp_path, "version", 1, [Archived(0, odd)], decoder=decoder)
    assert pq.read_table(path)["text"].to_pylist() == [f"{first.text} ", None, None]
    (back,) = archive.read(path)
    assert same(back.group, odd)


def test_an_archive_without_its_tokenizer_or_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    decoder, groups = english(1, size=2, num_tokens=50)
    path = archive.write(tmp_path, "version", 1, [Archived(0, groups[0])], decoder=decoder)
    (tokenizer,) = tmp_path.glob("tokenizer-*.json")
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content + b" ")
    with pytest.raises(FileError, match=r"tokenizer-\w+\.json: was changed since version-000001\.parquet"):
        list(archive.read(path))
    tokenizer.unlink()
    with pytest.raises(FileError, match=r"version-000001\.parquet: its texts are decoded by tokenizer-\w+\.json"):
        list(archive.read(path))
    tokenizer.write_bytes(content)
    table = pq.read_table(path)
    old = {key: value for key, value in table.schema.metadata.items() if key != b"archive_format"}
    pq.write_table(table.replace_schema_metadata(old), path)
    with pytest.raises(FileError, match="read in format 2, and this file is of an earlier one"):
        list(archive.read(path))
    pq.write_table(table.slice(1), path)
    with pytest.raises(FileError, match="group 0 is without its first row, which holds the prompt"):
        list(archive.read(path))


def test_beyond_its_bound_an_archive_loses_its_oldest_files_but_never_the_newest_version(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        for kind in ("version", "unconsumed"):
            archive.write(tmp_path, kind, number, [Archived(None, scored([verdict(1.0)]))])
    size = (tmp_path / "version-000001.parquet").stat().st_size
    assert archive.prune(tmp_path, 6.5 * size) == []
    assert [path.name for path in archive.prune(tmp_path, 3.5 * size)] == [
        "version-000001.parquet", "unconsumed-000001.parquet", "version-000002.parquet",
    ]  # fmt: skip
    archive.prune(tmp_path, 1.0)
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["version-000003.parquet"]


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
        key = DeliveryKey(number // 2, number % 2)
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
        list(journal.read([DeliveryKey(4, 1)]))
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
            journal.forget([DeliveryKey(group_id - 10, 0)])
    assert (tmp_path / "journal").stat().st_size < 200 * 2**20
    assert psutil.Process().memory_info().rss - before < 60 * 2**20
    (back,) = journal.read([DeliveryKey(-1, 0)])
    assert same(back, kept)
    journal.close()


def test_parquet_files_are_readable_after_their_writer_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from tests.record.groups import scored, verdict\n"
        "from vtriune.record import archive\n"
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
