"""Sends a version's weights from the learner to generators and proves that they arrived. Called by the controller.

One publish: rank 0 of the learner opens a rendezvous; the learner sends while the generators receive; checksums of both
sides are compared; a canary (a fixed prompt with an image) is scored on both sides. A generator that breaks in the middle
is buried and the publish is repeated with the others; a learner that breaks ends the run.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from vtriune.fleet import Engine, Fleet, Health
from vtriune.messages import Canary, PublishOrder, PublishReport, Rendezvous
from vtriune.runtime import ActorError, ConnectionLost, MeshFailure

log = logging.getLogger(__name__)


class PublishError(RuntimeError):
    """Weights did not arrive as sent."""


class Publisher:
    """Publishes to `fleet`; `max_canary_error` is in nats, on any token of the canary's response."""

    def __init__(
        self,
        learner: Any,
        fleet: Fleet,
        canary: Canary,
        *,
        max_canary_error: float,
        deadline_s: float = 120.0,
        report_lost: Callable[[Rendezvous, int, str], None] | None = None,
    ) -> None:
        """`report_lost` tells the others of a publish about a member that cannot; None: `vtriune.weight_group.report_lost`."""
        self._learner = learner
        self._fleet = fleet
        self._canary = canary
        self._max_canary_error = max_canary_error
        self._deadline_s = deadline_s
        self._report_lost = report_lost or _report_lost

    async def publish(self, version: int) -> dict[str, float]:
        """Send `version` to every healthy engine, then refit the stale ones. Returns `publish/*` metrics."""
        metrics = await self._send(version, self._fleet.healthy, full=False)
        return metrics | await self.refit(version)

    async def refit(self, version: int) -> dict[str, float]:
        """Bring stale engines to `version` with a full publish; they are healthy afterwards."""
        stale = self._fleet.stale
        metrics = await self._send(version, stale, full=True)
        for engine in stale:
            if engine.health is Health.STALE:
                engine.health = Health.HEALTHY
        return metrics

    async def _send(self, version: int, engines: Sequence[Engine], *, full: bool) -> dict[str, float]:
        while engines := [engine for engine in engines if engine.health is not Health.DEAD]:
            start = time.monotonic()
            reports = await self._attempt(version, engines, full=full)
            if reports is not None:
                self._compare(version, reports)
                error = await self._canary_error(engines)
                return {
                    "publish/seconds": time.monotonic() - start,
                    "publish/transfer_s": max(report.transfer_s for report in reports),
                    "publish/pause_s": max(report.pause_s for report in reports),
                    "publish/bytes": float(reports[0].num_bytes),
                    "publish/canary_max_abs": error,
                }
        return {}

    async def _attempt(self, version: int, engines: Sequence[Engine], *, full: bool) -> list[PublishReport] | None:
        """The learner's report, then one per engine; None when an engine broke and the publish is to be repeated."""
        rendezvous: Rendezvous = await self._learner.slice(procs=0).open_rendezvous.call_one(1 + len(engines))
        order = PublishOrder(version, rendezvous, full, self._deadline_s)
        sending = asyncio.ensure_future(_values(self._learner.publish.call(order)))
        receiving = [
            asyncio.ensure_future(self._received(engine, msgspec.structs.replace(order, member=member)))
            for member, engine in enumerate(engines, 1)
        ]
        sent, *received = await asyncio.gather(sending, *receiving, return_exceptions=True)
        errors = [
            (engine, result)
            for engine, result in zip(engines, received, strict=True)
            if isinstance(result, BaseException)
        ]
        guilty = [(engine, error) for engine, error in errors if not _is_bystander(error)]
        if isinstance(sent, BaseException) and not _is_bystander(sent) and not (guilty and _is_late(sent)):
            raise sent
        for engine, error in guilty:
            self._fleet.bury(engine, f"publish of version {version} failed: {error}")
        if guilty:
            return None
        for error in (sent, *(error for _, error in errors)):
            if isinstance(error, BaseException):
                raise PublishError(f"publish of version {version} failed and nobody says why: {error}") from error
        return [sent[0], *received]

    async def _received(self, engine: Engine, order: PublishOrder) -> PublishReport:
        try:
            report: PublishReport = await engine.actor.receive.call_one(order)
            return report
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

    async def _canary_error(self, engines: Sequence[Engine]) -> float:
        """Largest |log π_learner − log π_engine| over the canary's tokens, in nats; raises PublishError above the limit.

        An engine that dies or is cut off over the canary is buried; the others' answers count.
        """
        ours, *theirs = await asyncio.gather(
            _values(self._learner.canary.call(self._canary)),
            *(_value(engine.actor.canary.call_one(self._canary)) for engine in engines),
            return_exceptions=True,
        )
        if isinstance(ours, BaseException):
            raise ours
        error = 0.0
        for engine, answer in zip(engines, theirs, strict=True):
            if isinstance(answer, MeshFailure | ConnectionLost):
                self._fleet.bury(engine, f"canary: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                error = max(error, *(abs(a - b) for a, b in zip(ours[0], answer, strict=True)))
        if not error <= self._max_canary_error:
            raise PublishError(
                f"canary after publish: learner and generators differ by {error:.2e} nats "
                f"(limit {self._max_canary_error:.0e}); the weights arrived, so a cache or a packed copy of a weight is out of date"
            )
        return error


def _is_bystander(error: BaseException) -> bool:
    """A member that took part without harm: the cause lies with another, and it can take the next attempt."""
    return isinstance(error, ActorError) and error.type_name.endswith(".PeerFailure")


def _is_late(error: BaseException) -> bool:
    """It waited for somebody until the deadline."""
    return isinstance(error, ActorError) and error.type_name.endswith("._Late")


def _report_lost(rendezvous: Rendezvous, member: int, reason: str) -> None:
    from vtriune.weight_group import report_lost  # torch, which the controller does without until then

    report_lost(rendezvous, member, reason)


async def _value(future: Any) -> Any:
    return await future


async def _values(future: Any) -> list[Any]:
    """The values of a call on every rank, by rank."""
    return [value for _, value in (await future).items()]
