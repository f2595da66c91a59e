"""What an error costs a run is the kind that it declares, whatever its class is called."""

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest

from actors.engine.loop import EngineError, StepLoop
from actors.generator import Generator
from tests.actors.test_generator import GROUP, Verifiers
from tests.run.stage import Stage
from verifiers.pool.breaker import FaultRateError
from vtriune import roles
from vtriune.config.tree import Policy
from vtriune.messages import GroupReport, Lease, PublishOrder, PublishReport
from vtriune.runtime import ActorError
from vtriune.runtime.failure import error_from_note, note_from_error
from vtriune.transport.wire import PeerRef
from vtriune.weights.meeting import PeerFailure, PublishFailure

ON = Policy(mode="on_policy", rollout_batch=6, group_size=2)


def remote(error: Exception) -> Exception:
    """What a caller of another process gets for `error`."""
    return error_from_note(note_from_error(error), "endpoint", PeerRef("node", "ipc://x", "mesh", 0, "here", 1))


class Excused(PeerFailure):
    """A bystander's error under another name."""


class Tripped(FaultRateError):
    """A circuit breaker's error under a name that nothing in the run knows."""


class CircuitOpen(RuntimeError):
    """A user's error, of some electrical data set, that declares no kind."""


async def test_a_verifier_that_fails_on_most_answers_ends_the_run_whatever_its_errors_class_is_called(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, ON)
    verifiers = Verifiers(*[remote(Tripped("rows", 0.6, 64, "a sample")) for _ in range(100)])

    async def fail(lease: Lease, others: list[roles.Generator]) -> GroupReport:
        try:
            return await Generator(stage.config, [], verifiers, 0)._scored(GROUP)  # type: ignore[arg-type]
        except ActorError as error:
            raise remote(error) from None

    controller = await stage.open()
    for generator in stage.generators:
        generator.generate = fail  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as caught:
        await controller.run()
    assert caught.group_contains(ActorError, match="60% of the last 64 verdicts of source 'rows' are faults")
    assert controller.groups.counts()["lost"] == 0


async def test_an_error_of_a_class_that_happens_to_be_called_like_a_fatal_one_costs_its_lease_only(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, ON)
    controller = await stage.open()
    healthy, failed = stage.generators[0].generate, list[int]()

    async def fail_once(lease: Lease, others: list[roles.Generator]) -> GroupReport:
        if not failed:
            failed.append(lease.group_id)
            raise remote(CircuitOpen("no current flows"))
        return await healthy(lease, others)

    stage.generators[0].generate = fail_once  # type: ignore[method-assign]
    await controller.run()
    assert failed[0] in stage.consumed
    assert len(stage.consumed) == 36
    assert stage.records[-1].metrics["generators/deaths"] == 0


async def test_a_generator_whose_engine_has_stopped_is_replaced_though_its_process_lives(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, restarts=1)
    controller = await stage.open()
    loop = StepLoop(None)  # type: ignore[arg-type]  # closed before it needs the engine
    loop.start()
    loop.close()

    async def refuse(lease: Lease, others: list[roles.Generator]) -> GroupReport:
        try:
            await asyncio.wrap_future(loop.submit(None, 1).done)
        except EngineError as error:
            raise remote(error) from None
        raise AssertionError("a loop that is closed takes nothing")

    stage.generators[0].generate = refuse  # type: ignore[method-assign]
    await controller.run()
    assert len(stage.consumed) == 36
    assert stage.records[-1].metrics["generators/deaths"] == 1
    assert len(stage.generators) == 3


class Broken(RuntimeError):
    """What an engine that cannot go on answers."""

    kind = "engine"


class Hopeless(RuntimeError):
    kind = "fatal"


@pytest.mark.parametrize("call", ["generate", "canary"])
async def test_an_engine_that_says_it_is_broken_in_an_evaluation_or_a_canary_is_replaced(
    tmp_path: Path, call: str
) -> None:
    stage = Stage(tmp_path, ON, steps=3, evaluate_every=1, restarts=1)
    controller = await stage.open()
    broken = stage.generators[0]
    healthy = getattr(broken, call)

    @functools.wraps(healthy)
    async def refuse(*arguments: Any) -> Any:
        if (call == "canary" and broken.version == 1) or (call == "generate" and arguments[0].purpose == "evaluate"):
            raise remote(Broken("out of memory"))
        return await healthy(*arguments)

    setattr(broken, call, refuse)
    ended = await asyncio.gather(controller.run(), return_exceptions=True)
    assert not isinstance(ended[0], BaseException)
    assert stage.records[-1].metrics["generators/deaths"] == 1
    assert len(stage.generators) == 3


async def test_a_fatal_error_in_a_publish_ends_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=3, restarts=4)
    controller = await stage.open()

    async def fail(order: PublishOrder) -> PublishReport:
        raise remote(Hopeless("not this model"))

    stage.generators[0].receive = fail  # type: ignore[method-assign]
    ended = await asyncio.gather(controller.run(), return_exceptions=True)
    assert "not this model" in str(ended[0])
    assert len(stage.generators) == 2


async def test_a_publish_broken_by_one_engine_is_repeated_with_the_unharmed_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ON, steps=4)
    controller = await stage.open()
    culprit, bystander = stage.generators

    async def break_off(order: PublishOrder) -> PublishReport:
        raise remote(PublishFailure("load", "out of memory"))

    unharmed, num_failures = bystander.receive, 0

    async def fail_once(order: PublishOrder) -> PublishReport:
        nonlocal num_failures
        if order.version == 2 and not num_failures:
            num_failures += 1
            raise remote(Excused("load", "member 1 failed"))
        return await unharmed(order)

    healthy = culprit.receive

    async def break_at_two(order: PublishOrder) -> PublishReport:
        return await (break_off(order) if order.version == 2 else healthy(order))

    culprit.receive, bystander.receive = break_at_two, fail_once  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        await controller.run()
    assert num_failures == 1
    assert stage.records[-1].metrics["generators/deaths"] == 1
    assert len(stage.consumed) == 24
