"""Every figure of `metrics.jsonl` that is a function of the trajectories, computed again from `rollouts/*.parquet` alone.

Independent of the product's metrics on purpose: Parquet, NumPy and the definitions of the documentation, written down a second time.
"""

import asyncio
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.run.recorded_stage import RecordedStage
from vtriune.config.tree import Policy
from vtriune.messages import Lease, StepRecord
from vtriune.record.checkpoint import latest_complete
from vtriune.run.schedule import ModeInForce

Row = dict[str, Any]
WORDS = ["re-check", "re-evaluate", "re-examine", "re-think", "recheck", "reevaluate", "reexamine", "reevaluation", "rethink",
         "check_again", "think_again", "try_again", "verify", "wait", "yet"]  # fmt: skip
EVALUATED = ("reward/", "correct/rate", "length/mean", "truncation/rate", "verdict/num_faults", "batch/num_responses")
COUNTED = {
    "archive/num_missing",
    "archive/num_duplicates",
    "archive/num_removed",
    "tracking/num_failures",
    "version",
    "update",
}
"""What the recorder says of its own work."""


class Run(RecordedStage):
    """Off-policy with a filter, lost connections and a dead generator; switched, stopped, and resumed to its end."""

    def __init__(self, folder: Path) -> None:
        policy = Policy("off_policy", 2, rollout_batch=5, group_size=4, filter="zero_variance")
        super().__init__(folder, policy, steps=18, training_s=0.003, evaluate_every=3, num_generators=3, restarts=1)
        self.given: dict[int, StepRecord] = {}
        self.cut = self._cut

    def _cut(self, lease: Lease) -> Any:
        is_spared = lease.purpose == "evaluate" or lease.attempt % 3
        return None if is_spared else (None, None, "mid-group", "mid-ack")[lease.group_id % 4]

    async def whole(self) -> None:
        controller = await self.open()
        running = asyncio.create_task(controller.run())
        await self._reach(3)
        self.generators[0].is_dead = True
        await self._reach(5)
        controller.switch(ModeInForce("on_policy", 0))
        await self._reach(8)
        controller.switch(ModeInForce("off_policy", 1))
        await self._reach(10)
        controller.stop()
        async with asyncio.timeout(60):
            await running
        await self.close()
        self.stopped_at = controller.groups.version
        checkpoint = latest_complete(self.folder / "checkpoints")
        assert checkpoint is not None
        controller = await self.open()
        await controller.resume(checkpoint)
        async with asyncio.timeout(60):
            await controller.run()
        await self.close()

    async def _reach(self, version: int) -> None:
        while self.controller.groups.version < version:
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"))
    asyncio.run(run.whole())
    return run


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def rows(run: Run, kind: str, version: int) -> tuple[list[Row], dict[str, Any]]:
    """A file's rows, and the reward options of its metadata; no rows where there is no file."""
    path = run.folder / "rollouts" / f"{kind}-{version:06d}.parquet"
    if not path.exists():
        return [], {}
    return pq.read_table(path).to_pylist(), json.loads(pq.read_metadata(path).metadata[b"reward_options"])


def mean(values: Sequence[float]) -> float:
    return float(np.mean(np.asarray(values, np.float64))) if len(values) else math.nan


def is_right(row: Row, options: dict[str, Any]) -> bool:
    """By accuracy; boxes by the component that the options name, where it is there."""
    if json.loads(row["reward_model"]).get("verifier", "mathverify") == "detection":
        for name, value in row["components"]:
            if name == options["correct_component"]:
                return bool(value >= options["correct_threshold"])
    return bool(row["accuracy"] >= 1 - 1e-6)


def occurrences(text: str) -> dict[str, int]:
    """Of each reflection word, where words end at what is no letter, digit or underscore; any space between two words of one."""
    patterns = {word: r"(?<!\w)" + word.replace("_", r"\s+") + r"(?!\w)" for word in WORDS}
    return {word: len(re.findall(pattern, text.lower())) for word, pattern in patterns.items()}


def figures(rows: Sequence[Row], options: dict[str, Any], version: int | None) -> dict[str, float]:
    """Every key of one set of rows; a mean over nothing is NaN."""
    judged = [row for row in rows if row["status"] != "fault"]
    right = [row for row in judged if is_right(row, options)]
    wrong = [row for row in judged if not is_right(row, options)]
    words = [occurrences(row["text"]) for row in rows]
    reflects = {id(row): any(counts.values()) for row, counts in zip(rows, words, strict=True)}
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["group_id"], row["attempt"]), []).append(row)
    compared = [
        kept for group in groups.values() if len(kept := [row for row in group if row["status"] != "fault"]) > 1
    ]
    flat = [np.ptp([row["reward"] for row in group]) <= 1e-6 for group in compared]
    all_right = [all(is_right(row, options) for row in group) for group in compared]
    found = {
        **{f"reward/{key}": mean([row[name] for row in judged]) for key, name in (("mean", "reward"), ("accuracy", "accuracy"),
                                                                               ("format", "format"))},
        "correct/rate": len(right) / len(judged) if judged else math.nan,
        "group/zero_variance": mean(flat),
        "group/all_right": mean([is_flat and ok for is_flat, ok in zip(flat, all_right, strict=True)]),
        "group/all_wrong": mean([is_flat and not ok for is_flat, ok in zip(flat, all_right, strict=True)]),
        "reflection/ratio": mean(list(reflects.values())),
        "verdict/num_faults": float(len(rows) - len(judged)),
        "batch/num_groups": float(len(groups)),
        "batch/num_responses": float(len(rows)),
        "entropy/sampled": -sum(math.fsum(row["logprobs"]) for row in rows) / sum(len(row["logprobs"]) for row in rows),
    }  # fmt: skip
    for part, those in (("mean", rows), ("correct", right), ("incorrect", wrong)):
        found[f"length/{part}"] = mean([len(row["token_ids"]) for row in those])
        found[f"truncation/{'rate' if part == 'mean' else part}"] = mean(
            [row["finish_reason"] == "length" for row in those]
        )
    for status in ("ok", "bad_answer", "fault"):
        found[f"verdict/{status}"] = mean([row["status"] == status for row in rows])
    for name in {name for row in judged for name, _ in row["components"]}:
        found[f"component/{name}"] = mean([value for row in judged for key, value in row["components"] if key == name])
    for part, does in (("with", True), ("without", False)):
        those = [row for row in judged if reflects[id(row)] is does]
        found[f"reflection/correct_{part}"] = mean([is_right(row, options) for row in those])
    for word in WORDS:
        found[f"reflection/word/{word}"] = sum(counts[word] for counts in words) / len(rows)
    if version is not None:
        ages = [version - min(span["version"] for span in row["spans"]) for row in rows]
        found |= {"staleness/mean": mean(ages), "staleness/max": float(max(ages))}
    return {key: value for key, value in found.items() if not math.isnan(value)}


def by_source(rows: Sequence[Row], options: dict[str, Any], version: int | None) -> dict[str, float]:
    """`figures` of all rows, and of each source's."""
    if not rows:
        return {}
    found = figures(rows, options, version)
    for source in {row["source"] for row in rows}:
        own = figures([row for row in rows if row["source"] == source], options, version)
        found |= {f"source/{source}/{key}": value for key, value in own.items()}
        found[f"source/{source}/batch/share"] = own["batch/num_groups"] / found["batch/num_groups"]
    return found


def of_evaluation(rows: Sequence[Row], options: dict[str, Any]) -> dict[str, float]:
    """Under `eval/<kind>/`, and under `eval/` those of the kind that the configuration names first."""
    found: dict[str, float] = {}
    kinds = {
        "sampled": [row for row in rows if row["temperature"]],
        "greedy": [row for row in rows if not row["temperature"]],
    }
    for kind, those in kinds.items():
        for key, value in by_source(those, options, None).items():
            bare = re.sub(r"^source/[^/]+/", "", key)
            if bare.startswith((*EVALUATED, "component/")):
                found[f"eval/{kind}/{key}"] = value
                if kind == "sampled":
                    found[f"eval/{key}"] = value
    return found


def test_every_figure_of_the_trajectories_is_what_the_archive_says(run: Run) -> None:
    given = {record.version: record.metrics for record in run.records}
    num_compared = 0
    for line in lines(run):
        version = line["version"]
        trained, options = rows(run, "version", version)
        evaluated, its_options = rows(run, "evaluation", version)
        expected = by_source(trained, options, version - 1) | of_evaluation(evaluated, its_options or options)
        ours = {key: value for key, value in line.items() if key not in {*given[version], *COUNTED}}
        assert ours.keys() == expected.keys(), f"version {version}: {sorted(ours.keys() ^ expected.keys())}"
        for key, value in ours.items():
            assert value == pytest.approx(expected[key], abs=1e-9, rel=0), f"version {version}, {key}"
        num_compared += len(ours)
    assert num_compared > 18 * 100


def test_the_run_had_a_filter_faults_a_switch_and_a_resume(run: Run) -> None:
    written = lines(run)
    assert [line["version"] for line in written] == list(range(1, 19))
    assert 10 <= run.stopped_at < 18
    assert all(line["archive/num_missing"] == 0 for line in written)
    last = written[-1]
    assert (
        min(last["ledger/filtered"], last["ledger/reissues"], sum(line["verdict/num_faults"] for line in written)) > 0
    )
    assert {line["policy/is_off_policy"] for line in written} == {0.0, 1.0}
    assert max(line["staleness/max"] for line in written) > 0
    assert sum("eval/reward/mean" in line for line in written) == 5
    assert len(list((run.folder / "rollouts").glob("unconsumed-*.parquet"))) > 2


def test_what_a_line_says_of_its_batch_is_what_was_ordered_archived_and_trained(run: Run) -> None:
    """Also of the batches after a switch, whose groups were admitted before it."""
    trained = {order.version + 1: order for order in run.orders}
    for line in lines(run):
        version = line["version"]
        path = run.folder / "rollouts" / f"version-{version:06d}.parquet"
        order = json.loads(pq.read_metadata(path).metadata[b"order"])
        assert order == msgspec.to_builtins(trained[version], str_keys=True)
        assert line["staleness/max"] <= line["policy/max_staleness"] == order["max_staleness"]
        assert line["policy/is_off_policy"] == (order["mode"] == "off_policy")
        assert line["policy/is_corrected"] == (order["correction"] != "none") >= (line["staleness/max"] > 0)
        assert line["progress"] == order["progress"][-1]
        table = pq.read_table(path, columns=["group_id", "attempt", "consumed_version"]).to_pylist()
        assert {row["group_id"]: row["attempt"] for row in table} == {
            int(key): n for key, n in order["attempts"].items()
        }
        assert list(dict.fromkeys(row["group_id"] for row in table)) == [key for ids in order["updates"] for key in ids]
        assert {row["consumed_version"] for row in table} == {order["version"]} == {version - 1}


def test_group_and_attempt_name_one_delivery_over_all_starts_of_a_run(run: Run) -> None:
    named: dict[tuple[int, int], str] = {}
    for path in sorted((run.folder / "rollouts").glob("*.parquet")):
        table = pq.read_table(path, columns=["group_id", "attempt", "purpose"]).to_pylist()
        for key in {(row["group_id"], row["attempt"]) for row in table if row["purpose"] == "train"}:
            assert key not in named, f"{key} is in {named[key]} and in {path.name}"
            named[key] = path.name
    assert any(attempt > 0 for _, attempt in named)
