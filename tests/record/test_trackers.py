"""metrics.jsonl and wandb: whole lines, cut where a run resumes, failures counted."""

import json
import math
import os
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vtriune.record.trackers import MetricsFile, Wandb


def test_lines_are_flat_objects_in_order(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for version in range(3):
        file.append({"version": version, "reward/mean": version / 2})
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines == [{"version": version, "reward/mean": version / 2} for version in range(3)]


def test_a_value_that_json_cannot_hold_is_named_not_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"version": 1, "loss": math.nan, "grad": math.inf})
    assert json.loads(file.path.read_text()) == {"version": 1, "_not_finite": ["grad", "loss"]}


def test_truncation_removes_later_and_torn_lines_only(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.truncate_after(0) == 0
    for version in range(6):
        file.append({"version": version})
    kept = b"".join(file.path.read_bytes().splitlines(keepends=True)[:3])
    with file.path.open("ab") as torn:
        torn.write(b'{"version": 1, "rew')
    assert file.truncate_after(2) == 4
    assert file.path.read_bytes() == kept
    assert file.truncate_after(2) == 0


def records(path: Path) -> Iterator[Any]:
    """What a `.wandb` file holds: LevelDB's log format behind 7 bytes, as `wandb sync` reads it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def of_kind(path: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def curve(path: Path) -> list[tuple[float, float]]:
    """Version and mean reward of each logged line."""
    lines = [
        {item.nested_key[0]: json.loads(item.value_json) for item in line.item} for line in of_kind(path, "history")
    ]
    return [(line["version"], line["reward/mean"]) for line in lines]


def test_in_wandb_every_start_is_a_run_of_one_group_whose_figures_stand_over_the_version(tmp_path: Path) -> None:
    starts = [[0, 1, 2, 3], [2, 3, 4]]
    for versions in starts:
        tracker = Wandb("offline", "vtriune-tests", tmp_path, {"run": {"name": "x"}})
        for version in versions:
            tracker.log({"reward/mean": version / 8}, version)
        tracker.close()
        tracker.close()
        assert tracker.num_failures == 0
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 60  # Its service writes on after `finish`.
    while sum(len(curve(path)) for path in files) < 7 and time.monotonic() < deadline:
        time.sleep(0.1)
    files.sort(key=lambda path: of_kind(path, "run")[0].display_name)
    assert [curve(path) for path in files] == [[(version, version / 8) for version in start] for start in starts]
    metrics = [
        [(metric.name or metric.glob_name, metric.step_metric) for metric in of_kind(path, "metric")] for path in files
    ]
    assert metrics == [[("version", ""), ("*", "version")]] * 2
    runs = [of_kind(path, "run")[0] for path in files]
    assert runs[0].run_group == runs[1].run_group != ""
    assert runs[0].run_id != runs[1].run_id
    assert [run.display_name for run in runs] == [tmp_path.name, f"{tmp_path.name}, start 2"]


FROZEN = """
import os, signal, sys, time
from pathlib import Path
import psutil
from vtriune.record.trackers import Wandb

tracker = Wandb("offline", "vtriune-tests", Path(sys.argv[1]), {})
service = next(child for child in psutil.Process().children(recursive=True) if "wandb" in child.name())
service.suspend()
started = time.monotonic()
for version in range(1500):
    tracker.log({f"{name}/{version}": 0.5 for name in range(200)}, version)
logged_s = time.monotonic() - started
tracker.close(within_s=1.0)
print(logged_s, tracker.num_failures, flush=True)
service.kill()
os._exit(0)
"""


def test_a_wandb_that_hangs_holds_up_neither_a_version_nor_the_end(tmp_path: Path) -> None:
    # Not the service that an earlier test of this process has started.
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    program = [sys.executable, "-c", FROZEN, str(tmp_path)]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    logged_s, num_failures = done.stdout.split()[-2:]
    assert float(logged_s) < 10
    assert int(num_failures) >= 1


class _Broken:
    """A wandb whose every call fails."""

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the service is gone")

    def finish(self) -> None:
        raise TimeoutError("no answer")


def test_whatever_fails_in_wandb_is_counted_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise PermissionError("no key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, Settings=dict))
    tracker = Wandb("online", "p", tmp_path, {})
    tracker.log({"a": 1.0}, 0)
    tracker.close()
    assert tracker.num_failures == 1
    assert "could not start wandb (PermissionError: no key); metrics.jsonl has everything" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: _Broken(), Settings=dict))
    tracker = Wandb("offline", "p", tmp_path, {})
    tracker.log({"a": 1.0}, 0)
    tracker.close()
    assert tracker.num_failures == 2


def test_off_means_that_wandb_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Wandb("off", "p", tmp_path, {})
    tracker.log({"a": 1.0}, 0)
    tracker.close()
    assert tracker.num_failures == 0
