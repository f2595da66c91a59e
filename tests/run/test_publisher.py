"""What a version's line says of its publish: measured, of every engine that took part, or absent."""

import math
from pathlib import Path

import pytest

from tests.run.stage import FakeGenerator, Stage
from vtriune.config.tree import Policy
from vtriune.messages import Canary, PublishOrder, PublishReport
from vtriune.run.fleet import Health
from vtriune.run.publisher import PublishError
from vtriune.runtime import MeshFailure
from vtriune.transport.wire import FailureNote

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2)


def off_by(generator: FakeGenerator, nats: float, pause_s: float = 0.0) -> None:
    """It answers the canary this far from the learner, and pauses so long for a publish."""

    async def canary(canary: Canary) -> list[float]:
        return [-1.0, -2.0 - nats, -3.0]

    async def receive(order: PublishOrder) -> PublishReport:
        generator.version = order.version
        return PublishReport(order.version, 1, 4, f"sum-{order.version}", 0.5, pause_s)

    generator.canary, generator.receive = canary, receive  # type: ignore[method-assign]


async def opened(tmp_path: Path) -> Stage:
    """Two generators, of which the second waits for a refit."""
    stage = Stage(tmp_path, ON)
    await stage.open()
    await stage.controller._publisher.refit(0)
    stage.controller._fleet.engines[1].health = Health.STALE
    return stage


async def test_a_publish_that_also_refits_an_engine_tells_the_worst_canary_and_the_sum_of_both(tmp_path: Path) -> None:
    stage = await opened(tmp_path)
    off_by(stage.generators[0], 5e-4, pause_s=0.25)
    off_by(stage.generators[1], 1e-4, pause_s=0.125)
    metrics = await stage.controller._publisher.publish(0)
    assert metrics["publish/canary_max_abs"] == pytest.approx(5e-4), "not the refitted engine's alone"
    assert (metrics["time/publish/transfer_s"], metrics["time/publish/pause_s"], metrics["publish/bytes"]) == (
        1.0,
        0.25,
        8.0,
    )


async def test_a_version_whose_only_engine_is_refitted_has_its_canary(tmp_path: Path) -> None:
    stage = await opened(tmp_path)
    stage.controller._fleet.mark_dead(stage.controller._fleet.engines[0], "for the test")
    off_by(stage.generators[1], 1e-4)
    assert (await stage.controller._publisher.publish(0))["publish/canary_max_abs"] == pytest.approx(1e-4)


async def test_a_canary_that_no_engine_lived_to_answer_is_absent_and_not_zero(tmp_path: Path) -> None:
    stage = await opened(tmp_path)
    stage.controller._fleet.mark_dead(stage.controller._fleet.engines[1], "for the test")

    async def die(canary: Canary) -> list[float]:
        raise MeshFailure(FailureNote("generator", 0, "here", 1, "signal", signal=9))

    stage.generators[0].canary = die  # type: ignore[method-assign]
    metrics = await stage.controller._publisher.publish(0)
    assert "publish/canary_max_abs" not in metrics
    assert metrics["publish/bytes"] == 4


async def test_a_canary_that_is_not_a_number_fails_the_publish(tmp_path: Path) -> None:
    stage = await opened(tmp_path)
    off_by(stage.generators[0], math.nan)
    with pytest.raises(PublishError, match="differ by nan nats"):
        await stage.controller._publisher.publish(0)


async def test_every_versions_line_has_a_canary_the_initial_evaluations_too(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=2, evaluate_before=True)
    await stage.run()
    assert [line["version"] for line in stage.lines if "publish/canary_max_abs" in line] == [0, 1, 2]


async def test_figures_of_the_generators_are_means_over_those_that_have_them(tmp_path: Path) -> None:
    stage = await opened(tmp_path)
    stage.controller._fleet.engines[1].health = Health.HEALTHY

    async def idle() -> dict[str, float]:
        return {"idle_share": 1.0, "tokens_per_s": 0.0}

    for generator in stage.generators:
        generator.stats = idle  # type: ignore[method-assign]
        figures = await stage.controller._fleet.figures()
        assert figures["throughput/generators/idle_share"] == (0.625 if generator is stage.generators[0] else 1.0)
        assert figures.get("throughput/generators/tokens_per_step") == (
            1.0 if generator is stage.generators[0] else None
        )
