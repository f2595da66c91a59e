"""The time of a line: its parts are named and sum up, and every rate and share of it is over that time and no other."""

import asyncio
import time
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from tests.run.stage import FakeLearner, FakeRecorder, Stage
from vtriune import roles
from vtriune.config.tree import Policy
from vtriune.messages import GroupReport, Lease, PublishOrder, PublishReport, StepRecord
from vtriune.record.checkpoint import latest_complete
from vtriune.run.stopwatch import Part

SLOW = {"train": 0.06, "publish": 0.05, "evaluate": 0.08, "record": 0.04, "checkpoint": 0.07}
"""Seconds that each takes, at least."""


class SlowRecorder(FakeRecorder):
    async def record_step(self, record: StepRecord) -> dict[str, float]:
        await asyncio.sleep(SLOW["record"])
        return await super().record_step(record)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Six versions, evaluated and saved after every second one; everything but waiting takes the time of `SLOW`."""
    save, publish = FakeLearner.save, FakeLearner.publish

    async def slow_save(self: Any, folder: str) -> None:
        await asyncio.sleep(SLOW["checkpoint"])
        await save(self, folder)

    async def slow_publish(self: Any, order: PublishOrder) -> PublishReport:
        await asyncio.sleep(SLOW["publish"])
        return await publish(self, order)

    monkeypatch.setattr(FakeLearner, "save", slow_save)
    monkeypatch.setattr(FakeLearner, "publish", slow_publish)
    policy = Policy(mode="off_policy", max_staleness=1, rollout_batch=6, group_size=2)
    stage = Stage(
        tmp_path, policy, steps=6, training_s=SLOW["train"], checkpoint_every=2, evaluate_every=2, num_generators=1
    )
    stage.recorder = SlowRecorder(stage)
    stage.generation_s = lambda lease: SLOW["evaluate"] / 2 if lease.purpose == "evaluate" else 0.0005  # type: ignore[method-assign]
    return stage


async def test_the_parts_of_a_lines_time_sum_up_to_it_and_to_the_time_of_the_run(stage: Stage) -> None:
    controller = await stage.open()
    began = time.time()
    await controller.run()
    lines = [record.metrics for record in stage.records]
    assert len(lines) == 6
    for line in lines:
        parts = {part: line[f"time/{part}_s"] for part in get_args(Part)}
        assert sum(parts.values()) == pytest.approx(line["time/step_s"], abs=1e-9, rel=0)
    assert sum(line["time/other_s"] for line in lines) < 0.2 * sum(line["time/step_s"] for line in lines)
    stamps = [began, *(line["time/unix_s"] for line in lines)]
    for line, since, until in zip(lines, stamps[:-1], stamps[1:], strict=True):
        assert line["time/step_s"] == pytest.approx(until - since, abs=0.1)


async def test_each_part_stands_in_the_line_of_the_time_in_which_it_happened(stage: Stage) -> None:
    """What a version's line is followed by, its own writing and the version's checkpoint, is in the next line."""
    await stage.run()
    for record in stage.records:
        line, is_second, is_after_second = (
            record.metrics,
            record.version % 2 == 0,
            record.version % 2 and record.version > 1,
        )
        happened = {"train": True, "publish": True, "evaluate": is_second and record.version < 6,
                    "record": record.version > 1, "checkpoint": is_after_second}  # fmt: skip
        for part, did in happened.items():
            spent = line[f"time/{part}_s"]
            assert SLOW[part] <= spent if did else spent < SLOW[part], (record.version, part, spent)


async def test_rates_count_what_came_in_the_time_they_are_divided_by_and_evaluations_apart(stage: Stage) -> None:
    scored: list[Lease] = []

    async def on_scored(lease: Lease) -> None:
        scored.append(lease)

    stage.on_scored = on_scored  # type: ignore[method-assign]
    controller = await stage.run()
    counted = dict.fromkeys(("completions", "tokens", "eval_completions"), 0.0)
    for record in stage.records:
        for what in counted:
            of_line = record.metrics[f"throughput/{what}_per_s"] * record.metrics["time/step_s"]
            assert of_line == pytest.approx(round(of_line), abs=1e-6)
            counted[what] += of_line
        num_evaluated = sum(record.metrics.get(f"eval/{kind}/num_rows", 0.0) for kind in ("sampled", "greedy"))
        of_line = record.metrics["throughput/eval_completions_per_s"] * record.metrics["time/step_s"]
        assert of_line == pytest.approx(num_evaluated)
    assert counted["eval_completions"] == sum(lease.purpose == "evaluate" for lease in scored) == 2 * 2 * 4
    # Up to the last line: what was scored after it is in none.
    counts = controller.groups.counts()
    assert 2 * counts["consumed"] <= counted["completions"] <= 2 * (counts["consumed"] + counts["scored"])
    assert counted["tokens"] == 10 * counted["completions"]


async def test_the_idle_shares_of_a_line_are_of_its_time_and_know_of_evaluations(stage: Stage) -> None:
    controller = await stage.open()
    (generator,) = stage.generators
    generate = generator.generate

    async def verified_slowly(lease: Lease, others: list[roles.Generator]) -> GroupReport:
        report = await generate(lease, others)
        return msgspec.structs.replace(report, verification_s=0.02 if lease.purpose == "evaluate" else 0.0)

    generator.generate = verified_slowly  # type: ignore[method-assign]
    await controller.run()
    for record in stage.records:
        line = record.metrics
        worked = sum(line[f"time/{part}_s"] for part in ("train", "publish", "checkpoint"))
        assert line["throughput/learner/idle_share"] == pytest.approx(1 - worked / line["time/step_s"], abs=1e-9)
        is_evaluated = "eval/greedy/num_rows" in line
        assert (line["throughput/verifiers/idle_share"] < 1.0) is is_evaluated
        if is_evaluated:
            busy_s = (1 - line["throughput/verifiers/idle_share"]) * line["time/step_s"]
            assert 0.02 <= busy_s <= line["time/evaluate_s"] + 1e-6


async def test_a_run_that_stopped_before_its_first_version_has_one_line_of_version_0(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Policy(rollout_batch=6, group_size=2), steps=3)
    stage.config = msgspec.structs.replace(
        stage.config, evaluation=msgspec.structs.replace(stage.config.evaluation, before=True)
    )
    controller = await stage.open()
    controller.stop()
    await controller.run()
    checkpoint = latest_complete(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-0"
    resumed = await stage.open()
    await resumed.resume(checkpoint)
    await resumed.run()
    assert [record.version for record in stage.records] == [0, 1, 2, 3]
    assert stage.records[0].metrics["time/evaluate_s"] > 0
