"""One held-out evaluation: every chosen row once per kind of sampling, at the version the generators hold. Called by the controller.

Evaluation leases carry negative ids: they are in no window, and the learner never sees them. They have a ledger of their own, by
which a row is tried as often, and as long, as a group of training (`policy.lease_s`); one that still has no score is left out, named
and counted: nobody's fault of ours is the model's.

| waits for                 | unblocked by                                                                                  |
| ------------------------- | --------------------------------------------------------------------------------------------- |
| a report                  | the report, an error, the lease's deadline, which is looked at every second                    |
| room, with rows running   | the same; a row whose time is over holds its place until it ends, so that an engine that hangs |
|                           | is leased no more than it has room for. When all hang: `cluster.stall_s`                       |
| room, with none running   | the controller's `wait_for_engine`: a training group's report, a successor's start             |
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

from msgspec.structs import replace

from vtriune.config.tree import Config
from vtriune.data.store import Store
from vtriune.messages import GroupReport, Lease, Sampling
from vtriune.run.fleet import EngineSlot, Fleet, LeaseLost
from vtriune.run.ledger import Ledger, OpenGroup
from vtriune.runtime import report_step

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between looks at the leases' deadlines, while nothing else happens."""


class Evaluated(NamedTuple):
    """What an evaluation was; the rewards are the recorder's to report, which has the groups themselves."""

    metrics: dict[str, float]
    """`eval/<kind>/num_rows`, `…/num_faults` and `…/num_lost`."""
    attempts: dict[int, int]
    """Group id → the attempt that counts, of every row that was scored."""


class HeldOutEvaluation:
    """Held-out rows of `store`, at most `evaluation.rows` of them, spread evenly over the sources. `say` names what is left out."""

    def __init__(self, config: Config, store: Store, fleet: Fleet, say: Callable[[str], None]) -> None:
        self._config = config
        self._fleet = fleet
        self._store = store
        self._say = say
        self._rows = store.spread(config.evaluation.rows)
        self._next_id = -1

    async def run(self, wait_for_engine: Callable[[], Awaitable[None]]) -> Evaluated:
        """Evaluate by every kind of `evaluation.sampling`. Raises what a generator raises of kind `fatal`.

        `wait_for_engine` is awaited while no engine has room and nothing runs; it returns at any change.
        """
        metrics: dict[str, float] = {}
        attempts: dict[int, int] = {}
        for kind in self._config.evaluation.sampling:
            one = _Pass(self._config, self._store, self._fleet, kind, self._next_id, iter(self._rows))
            self._next_id -= len(self._rows)
            await one.run(wait_for_engine)
            # As they were leased, whatever order they came in: a sum of floats depends on it.
            reports = sorted(one.reports, key=lambda report: -report.group_id)
            metrics[f"eval/{kind}/num_rows"] = float(sum(len(report.rewards) for report in reports))
            metrics[f"eval/{kind}/num_faults"] = float(sum(report.num_faults for report in reports))
            metrics[f"eval/{kind}/num_lost"] = float(len(one.lost))
            attempts |= {report.group_id: report.attempt for report in reports}
            for text in one.lost:
                log.warning(text)
                self._say(text)
        return Evaluated(metrics, attempts)


class _Pass:
    """Every row once by one kind of sampling. `run` may be called once."""

    def __init__(
        self, config: Config, store: Store, fleet: Fleet, kind: str, first_id: int, rows: Iterator[int]
    ) -> None:
        self.reports: list[GroupReport] = []
        self.lost: list[str] = []
        """A line for each row that is left out."""
        self._store, self._fleet, self._kind, self._rows = store, fleet, kind, rows
        self._first_id = first_id
        """Of a lease; later ones fall by one, as the ledger's ids rise."""
        self._ledger = Ledger()
        self._lease_s = config.policy.lease_s
        self._sampling = Sampling(
            temperature=1.0 if kind == "sampled" else 0.0,
            max_tokens=config.sampling.max_tokens,
            top_p=config.evaluation.top_p,
            top_k=config.evaluation.top_k,
        )
        self._seed = config.run.seed * 1_000_003 if config.sampling.seeded else None
        """Plus its row, of each lease: seeded, a row draws numbers of its own, the same at every version."""

    async def run(self, wait_for_engine: Callable[[], Awaitable[None]]) -> None:
        """Returns when every row is scored or left out."""
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                while (group := self._next_group()) is not None and (engine := self._fleet.pick(1)) is not None:
                    running.add(asyncio.create_task(self._follow(engine, group, self._lease(engine, group))))
                if not self._ledger.num_open:
                    return
                if not running:
                    await wait_for_engine()
                    continue
                done, running = await asyncio.wait(running, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if not done:
                    for group in self._ledger.overdue(time.monotonic()):
                        report_step("groups", f"the lease of a held-out row, {group.sample.row}, is overdue")
                        self._lose(group, group.attempt, LeaseLost("lease overdue"))
        finally:
            for task in running:
                task.cancel()

    def _next_group(self) -> OpenGroup | None:
        """A row that is to be tried again, else the next one."""
        if (waiting := self._ledger.first_to_lease()) is not None or (row := next(self._rows, None)) is None:
            return waiting
        return self._ledger.admit(self._store.ref(row), self._store.source(row), 0)

    def _lease(self, engine: EngineSlot, group: OpenGroup) -> Lease:
        """The row is the engine's from here on."""
        attempt = self._ledger.lease(group.group_id, time.monotonic() + self._lease_s)
        group_id, header = self._first_id - group.group_id, self._store.header(group.sample.row)
        seed = None if self._seed is None else self._seed + group.sample.row
        sampling = replace(self._sampling, seed=seed)
        lease = Lease(group_id, attempt, group.sample, header, 1, sampling, "evaluate", progress=None)
        self._fleet.reserve(engine, lease)
        return lease

    async def _follow(self, engine: EngineSlot, group: OpenGroup, lease: Lease) -> None:
        """Sees one lease to its report, or loses it."""
        try:
            report = await self._fleet.generate(engine, lease)
        except LeaseLost as lost:
            self._lose(group, lease.attempt, lost)
        else:
            if self._ledger.report(group.group_id, report.attempt):
                self._ledger.consume([group.group_id])
                self.reports.append(report)

    def _lose(self, group: OpenGroup, attempt: int, lost: LeaseLost) -> None:
        if self._ledger.lose_lease(group.group_id, attempt, lost.reason, is_death=lost.is_death):
            header = self._store.header(group.sample.row)
            self.lost.append(
                f"evaluation, {self._kind}: row {header.file_row} of {header.file} is left out after "
                f"{group.num_failures + group.num_deaths} attempts: {lost.reason}"
            )
