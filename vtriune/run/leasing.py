"""Hands groups to generators and takes their reports. Called by the controller.

    cursor ─▶ groups.admit ─▶ groups.lease ─▶ generator ─▶ verifiers ─▶ learner's queue
                                   ▲               │                        │
                                   └─ groups.lose ─┘                  groups.report

A lease ends by its report, by an error, or by its deadline; after that its generator keeps the places until it answers, so that one
that hangs is leased no more than it has room for. An error of a living process costs what its kind says, by default the
lease: the group is tried again elsewhere and, after several attempts, lost for good, of which `report_lost` is told.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from vtriune.config.tree import Config
from vtriune.data.loader import Cursor, bounds_of
from vtriune.data.store import Store
from vtriune.messages import GroupReport, Lease, SampleRef, Sampling
from vtriune.run.fleet import EngineSlot, Fleet, LeaseLost
from vtriune.run.groups import Groups
from vtriune.run.ledger import LedgerState, OpenGroup
from vtriune.runtime import report_step

log = logging.getLogger(__name__)


class Leasing:
    """The loop that keeps generators full. `progress` says how far the run is; `wake` is called on every change that others await;
    `report_lost` is told of each group lost for good, and why."""

    def __init__(
        self,
        config: Config,
        store: Store,
        fleet: Fleet,
        groups: Groups,
        progress: Callable[[], float],
        wake: Callable[[], None],
        report_lost: Callable[[SampleRef, str], None],
    ) -> None:
        self.groups = groups
        self.cursor = Cursor(store, config.run.seed, config.run.epochs, config.data.mixture, bounds_of(config.data))
        self.is_stopped = False
        self._num_completions = 0
        self._num_tokens = 0
        self._config = config
        self._store = store
        self._fleet = fleet
        self._progress = progress
        self._wake = wake
        self._report_lost = report_lost

    async def lease_groups(self, wait_for_change: Callable[[], Awaitable[None]]) -> None:
        """Waits for a group that may be leased and a generator with room; every change makes it look again."""
        async with asyncio.TaskGroup() as following:
            while True:
                engine = None if self.is_stopped else self._fleet.pick(self._config.policy.group_size)
                group = self._next_group() if engine is not None else None
                if engine is None or group is None:
                    await wait_for_change()
                    continue
                deadline = time.monotonic() + self._config.policy.lease_s
                attempt = self.groups.lease(group.group_id, deadline)
                lease = self._lease(group, attempt)
                others = self._fleet.pick_others(engine, 1 + self.groups.num_to_lease, lease.num_completions)
                self._fleet.reserve(engine, lease, others)
                following.create_task(self._follow(engine, lease, others))

    def reissue_overdue(self) -> None:
        """Leases past their deadline are lost; called every second."""
        for group in self.groups.overdue(time.monotonic()):
            report_step("groups", f"the lease of group {group.group_id} is overdue")
            self._lose(group, "lease overdue")

    def take_counts(self) -> tuple[int, int]:
        """Completions and tokens reported since the last call."""
        counts = self._num_completions, self._num_tokens
        self._num_completions = self._num_tokens = 0
        return counts

    def restore(self, state: LedgerState, cursor: dict[str, object], version: int, filtered: list[int]) -> None:
        """Take up again from a checkpoint."""
        self.groups.restore(state, version, filtered)
        self.cursor.load_state_dict(cursor)
        self._close_at_end()

    def _next_group(self) -> OpenGroup | None:
        """The oldest group without a generator, else a new one if the window admits it."""
        waiting = self.groups.first_to_lease()
        if waiting is not None or not self.groups.can_admit():
            return waiting
        self.cursor.progress = self._progress()
        sample = next(self.cursor)
        group = self.groups.admit(sample, self._store.source(sample.row))
        self._close_at_end()
        return group

    def _close_at_end(self) -> None:
        """At once with the last draw, so that whoever publishes the last batch knows that it was the last."""
        if self.cursor.is_used_up:
            self.groups.close()

    def _lease(self, group: OpenGroup, attempt: int) -> Lease:
        sampling, seed = self._config.sampling, self._config.run.seed
        size = self._config.policy.group_size
        return Lease(
            group_id=group.group_id,
            attempt=attempt,
            sample=group.sample,
            header=self._store.header(group.sample.row),
            num_completions=size,
            sampling=Sampling(
                sampling.temperature,
                sampling.max_tokens,
                (seed * 1_000_003 + group.group_id) * size if sampling.seeded else None,
                sampling.top_p,
                sampling.top_k,
            ),
            progress=self._progress(),
            prompt_seed=seed + group.group_id if self._config.data.prompt_pool else None,
        )

    async def _follow(self, engine: EngineSlot, lease: Lease, others: list[EngineSlot]) -> None:
        """Sees one lease to its report, or loses it."""
        try:
            report = await self._fleet.generate(engine, lease, others)
        except LeaseLost as lost:
            self._lose(lease, lost.reason, is_death=lost.is_death)
        else:
            self._resolve(report)

    def _resolve(self, report: GroupReport) -> None:
        """A scored group joins the next batch, or is filtered."""
        # Fewer than two verdicts give no baseline; equal rewards give no gradient.
        is_faulted = len(report.rewards) < 2
        is_flat = is_faulted or max(report.rewards) - min(report.rewards) < 1e-8
        is_filtered = is_flat and self._config.policy.filter == "zero_variance"
        if self.groups.report(
            report.group_id,
            report.attempt,
            is_filtered=is_filtered,
            is_faulted=is_faulted,
            solve_rate=report.solve_rate,
        ):
            self._num_completions += len(report.rewards) + report.num_faults
            self._num_tokens += report.num_tokens
        self._wake()

    def _lose(self, lost: Lease | OpenGroup, reason: str, *, is_death: bool = False) -> None:
        log.warning("group %d, attempt %d: lease lost: %s", lost.group_id, lost.attempt, reason)
        if self.groups.lose(lost.group_id, lost.attempt, reason, is_death=is_death):
            self._report_lost(lost.sample, reason)
        self._wake()
