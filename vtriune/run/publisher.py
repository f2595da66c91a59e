"""Sends a version's weights from the learner to generators and proves that they arrived. Called by the controller.

One publish: rank 0 of the learner opens a rendezvous; the learner sends while the generators receive; checksums of both
sides are compared; a canary (a fixed prompt with an image) is scored on both sides. A generator that breaks in the middle
is dead and the publish is repeated with the others; a learner that breaks ends the run.

| waits for                          | unblocked by                                                                          |
| ---------------------------------- | ------------------------------------------------------------------------------------- |
| the learner's port, send, canary   | its answer, its end, `DEADLINE_S` of the transfer; where it hangs: `cluster.stall_s`  |
| each generator's receipt, canary   | its answer, its end, `ANSWER_S`, after which it counts as dead                        |
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from msgspec.structs import replace

from vtriune import roles
from vtriune.messages import Canary, PublishOrder, PublishReport, Rendezvous
from vtriune.run.fleet import EngineSlot, Fleet, Health
from vtriune.runtime import (
    ActorError,
    ConnectionLost,
    DeadlineExceeded,
    Future,
    MeshFailure,
    ValueMesh,
    kind_of,
    report_step,
)

T = TypeVar("T")


_TOGETHER: dict[str, Callable[[Iterable[float]], float]] = {
    "time/publish/total_s": sum,
    "time/publish/transfer_s": sum,
    "time/publish/pause_s": max,
    "publish/bytes": sum,
    "publish/canary_max_abs": max,
}
"""What a metric of one publish after the other to different engines is. An engine pauses in one of them only."""

DEADLINE_S = 120.0
"""Of a whole publish, for all who take part."""
ANSWER_S = 2 * DEADLINE_S
"""Until a generator that still has not said how its part went is taken for dead."""


class PublishError(RuntimeError):
    """Weights did not arrive as sent."""


class Publisher:
    """Publishes to `fleet`; `max_canary_error` is in nats, on any token of the canary's response."""

    def __init__(
        self,
        learner: roles.Learner,
        fleet: Fleet,
        canary: Canary,
        *,
        max_canary_error: float,
        report_lost: Callable[[Rendezvous, int, str], None] | None = None,
    ) -> None:
        """`report_lost` tells the others of a publish about a member that cannot; None: `vtriune.weights.meeting.report_lost`."""
        self._learner = learner
        self._fleet = fleet
        self._canary = canary
        self._max_canary_error = max_canary_error
        self._report_lost = report_lost or _report_lost

    async def publish(self, version: int) -> dict[str, float]:
        """Send `version` to every healthy engine, then refit the stale ones. Returns `publish/*` and `time/publish/*`, of both."""
        sent = await self._send(version, self._fleet.healthy, full=False)
        refitted = await self.refit(version)
        return {
            key: _TOGETHER[key](figures[key] for figures in (sent, refitted) if key in figures)
            for key in sent | refitted
        }

    async def refit(self, version: int) -> dict[str, float]:
        """Bring stale engines to `version` with a full publish; they are healthy afterwards. Returns `publish/*` metrics."""
        stale = self._fleet.stale
        metrics = await self._send(version, stale, full=True)
        for engine in stale:
            if engine.health is Health.STALE:
                engine.health = Health.HEALTHY
        return metrics

    async def _send(self, version: int, engines: Sequence[EngineSlot], *, full: bool) -> dict[str, float]:
        start = time.monotonic()
        while engines := [engine for engine in engines if engine.health is not Health.DEAD]:
            report_step("publish", f"version {version} to {len(engines)} generators", DEADLINE_S)
            reports = await self._attempt(version, engines, full=full)
            if reports is not None:
                self._compare(version, reports)
                report_step("publish", f"version {version} has arrived; the canary is scored")
                error = await self._canary_error(engines)
                return {
                    "time/publish/total_s": time.monotonic() - start,
                    "time/publish/transfer_s": max(report.transfer_s for report in reports),
                    "time/publish/pause_s": max(report.pause_s for report in reports),
                    "publish/bytes": float(reports[0].num_bytes),
                } | ({} if error is None else {"publish/canary_max_abs": error})
        return {}

    async def _attempt(self, version: int, engines: Sequence[EngineSlot], *, full: bool) -> list[PublishReport] | None:
        """The learner's report, then one per engine; None when an engine broke and the publish is to be repeated."""
        rendezvous = await self._learner.slice(procs=0).open_rendezvous.call_one(1 + len(engines))
        order = PublishOrder(version, rendezvous, full, DEADLINE_S)
        sent, *received = reports = await asyncio.gather(
            _of_rank_0(self._learner.publish.call(order)),
            *(self._received(engine, replace(order, member=member)) for member, engine in enumerate(engines, 1)),
            return_exceptions=True,
        )
        failed = [report for report in reports if isinstance(report, BaseException)]
        for error in failed:
            if kind_of(error) == "fatal":
                raise error
        guilty = [
            (engine, error)
            for engine, error in zip(engines, received, strict=True)
            if isinstance(error, BaseException) and kind_of(error) != "bystander"
        ]
        # A learner whose error is of an engine has waited for one: an engine that failed meanwhile explains it.
        excuses = ("bystander", "engine") if guilty else ("bystander",)
        if isinstance(sent, BaseException) and kind_of(sent) not in excuses:
            raise sent
        for engine, error in guilty:
            self._fleet.mark_dead(engine, f"publish of version {version} failed: {error}")
        if guilty:
            return None
        if failed:
            raise PublishError(f"publish of version {version} failed and nobody says why: {failed[0]}") from failed[0]
        return [report for report in reports if not isinstance(report, BaseException)]

    async def _received(self, engine: EngineSlot, order: PublishOrder) -> PublishReport:
        try:
            return await engine.actor.receive.within(ANSWER_S).call_one(order)
        except MeshFailure as failure:
            await asyncio.to_thread(self._report_lost, order.rendezvous, order.member, str(failure).splitlines()[0])
            raise

    def _compare(self, version: int, reports: Sequence[PublishReport]) -> None:
        for member, report in enumerate(reports[1:], 1):
            if (report.version, report.checksum) != (version, reports[0].checksum):
                raise PublishError(
                    f"version {version}: member {member} holds version {report.version} with checksum {report.checksum}, "
                    f"the learner sent {reports[0].checksum} ({reports[0].num_tensors} tensors, {report.num_tensors} received)"
                )

    async def _canary_error(self, engines: Sequence[EngineSlot]) -> float | None:
        """Largest |log π_learner − log π_engine| over the canary's tokens, in nats; raises PublishError above the limit.

        An engine that dies, breaks, hangs or is cut off over the canary is dead; the others' answers count. None: there was no other.
        """
        ours, *theirs = await asyncio.gather(
            _of_rank_0(self._learner.canary.call(self._canary)),
            *(engine.actor.canary.within(ANSWER_S).call_one(self._canary) for engine in engines),
            return_exceptions=True,
        )
        if isinstance(ours, BaseException):
            raise ours
        errors: list[float] = []
        for engine, answer in zip(engines, theirs, strict=True):
            is_broken = isinstance(answer, ActorError) and answer.kind == "engine"
            if is_broken or isinstance(answer, MeshFailure | ConnectionLost | DeadlineExceeded):
                self._fleet.mark_dead(engine, f"canary: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                errors += (abs(a - b) for a, b in zip(ours, answer, strict=True))
        if not errors:
            return None
        # Python's max passes over a nan; numpy's does not.
        error = float(np.max(errors))
        if not error <= self._max_canary_error:
            raise PublishError(
                f"canary after publish: learner and generators differ by {error:.2e} nats "
                f"(limit {self._max_canary_error:.0e}); the weights arrived, so a cache or a packed copy of a weight is out of date"
            )
        return error


def _report_lost(rendezvous: Rendezvous, member: int, reason: str) -> None:
    from vtriune.weights.meeting import report_lost  # torch, which the controller does without until then

    report_lost(rendezvous, member, reason)


async def _of_rank_0(call: Future[ValueMesh[T]]) -> T:
    return (await call).rank_value(0)
