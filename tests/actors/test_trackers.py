"""metrics.jsonl and wandb: whole lines, cut where a run resumes, failures counted."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from actors.trackers import MetricsFile, Wandb


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


def test_wandb_offline_writes_a_run_and_ends(tmp_path: Path) -> None:
    tracker = Wandb("offline", "vtriune-tests", tmp_path, {"run": {"name": "x"}})
    tracker.log({"reward/mean": 0.5}, 0)
    tracker.log({"reward/mean": 0.75}, 1)
    tracker.close()
    tracker.close()
    assert tracker.num_failures == 0
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class _Broken:
    """A wandb whose every call fails."""

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
