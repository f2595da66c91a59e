"""Hands groups to generators and takes their reports: cursor, window and ledger in one place. Called by the controller.

    cursor ─▶ window.admit ─▶ ledger.lease ─▶ generator ─▶ verifiers ─▶ learner's queue
                                   ▲               │                        │
                                   └── lose_lease ─┘        report ─▶ window.mark_scored | filtered

A lease ends by its report, by an error, or by its deadline. An error that is no process's death is a fault of ours or of the
sample; the group is tried again elsewhere and, after `ledger.max_failures`, lost by name. Many lost groups end the run.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from vtriune.busy import Busy
from vtriune.config.tree import Config
from vtriune.data.loader import Cursor
from vtriune.data.store import Store
from vtriune.fleet import Engine, Fleet
from vtriune.ledger import Ledger, LedgerState, OpenGroup
from vtriune.messages import GroupReport, Lease, Sampling
from vtriune.runtime import ActorError, ConnectionLost, MeshFailure
from vtriune.window import Window

log = logging.getLogger(__name__)

FATAL_ERRORS = ("CircuitOpen",)
"""Remote errors that end the run at once, by class name: a verifier that fails on most of a source's answers."""


class TooManyLost(RuntimeError):
    """Groups keep failing for reasons of ours, whichever generator takes them."""


class Leasing:
    """The loop that keeps generators full. `ring` is called on every change that others may wait for."""

    def __init__(
        self, config: Config, store: Store, fleet: Fleet, window: Window, num_versions: int, ring: Callable[[], None]
    ) -> None:
        self.ledger = Ledger()
        self.window = window
        self.cursor = Cursor(store, seed=config.run.seed, epochs=config.run.epochs)
        self.is_stopped = False
        self._num_completions = 0
        self._num_tokens = 0
        self._verifying = Busy(time.monotonic())
        self._config = config
        self._store = store
        self._fleet = fleet
        self._num_versions = num_versions
        self._ring = ring

    async def lease_groups(self, wait_for_change: Callable[[], Awaitable[None]]) -> None:
        """Waits for a group that may be leased and a generator with room; every ring of the bell makes it look again."""
        async with asyncio.TaskGroup() as following:
            while True:
                engine = None if self.is_stopped else self._fleet.pick(self._config.policy.group_size)
                group = self._next_group() if engine is not None else None
                if engine is None or group is None:
                    await wait_for_change()
                    continue
                deadline = time.monotonic() + self._config.policy.lease_s
                attempt = self.ledger.lease(group.group_id, engine.rank, deadline)
                lease = self._lease(group, attempt)
                num_left = 1 + self.ledger.num_to_lease + self.window.num_admissible
                others = self._fleet.pick_others(engine, num_left, lease.num_completions)
                self._fleet.reserve(engine, lease, others)
                following.create_task(self._follow(engine, lease, others))

    def reissue_overdue(self) -> None:
        """Leases past their deadline are lost; called every second."""
        for group in self.ledger.overdue(time.monotonic()):
            self._lose(group.group_id, group.attempt, "lease overdue")

    def take_counts(self) -> tuple[int, int]:
        """Completions and tokens reported since the last call."""
        counts = self._num_completions, self._num_tokens
        self._num_completions = self._num_tokens = 0
        return counts

    def take_verifier_idle_share(self) -> float:
        """Share of the time since the last call in which no group was being verified."""
        return self._verifying.take_idle_share(time.monotonic())

    def restore(self, state: LedgerState, cursor: dict[str, object], version: int, num_filtered: int) -> None:
        """Take up again from a checkpoint."""
        self.ledger.restore(state)
        self.cursor.load_state_dict(cursor)
        self.window.restore(version, self.ledger.bounds(), num_filtered)

    def _next_group(self) -> OpenGroup | None:
        """The oldest group without a generator, else a new one if the window admits it."""
        waiting = self.ledger.first_to_lease()
        if waiting is not None or not self.window.can_admit():
            return waiting
        sample = next(self.cursor, None)
        if sample is None:
            self.window.close()
            self._ring()
            return None
        group = self.ledger.admit(sample, self._store.source(sample.row), self.window.limits.max_staleness)
        self.window.admit(group.group_id)
        return group

    def _lease(self, group: OpenGroup, attempt: int) -> Lease:
        sampling, seed = self._config.sampling, self._config.run.seed
        size = self._config.policy.group_size
        return Lease(
            group_id=group.group_id,
            attempt=attempt,
            sample=group.sample,
            num_completions=size,
            sampling=Sampling(
                sampling.temperature,
                sampling.max_tokens,
                (seed * 1_000_003 + group.group_id) * size if sampling.seeded else None,
            ),
            progress=self.window.version / self._num_versions,
            prompt_seed=seed + group.group_id if self._config.data.prompt_pool else None,
        )

    async def _follow(self, engine: Engine, lease: Lease, others: list[Engine]) -> None:
        """Sees one lease to its report, or loses it."""
        incarnation = engine.incarnation
        try:
            report = await self._fleet.generate(engine, lease, others)
        except MeshFailure as failure:
            if engine.incarnation == incarnation:
                self._fleet.bury(engine, str(failure).splitlines()[0])
            self._lose(lease.group_id, lease.attempt, "generator died", is_death=True)
        except ConnectionLost as error:
            # The generator lives, and may even deliver: the ledger takes whichever attempt is reported first.
            self._lose(lease.group_id, lease.attempt, str(error), is_death=True)
        except ActorError as error:
            if error.type_name.rpartition(".")[2] in FATAL_ERRORS:
                raise
            log.warning("group %d, attempt %d: lease lost: %s", lease.group_id, lease.attempt, error)
            self._lose(lease.group_id, lease.attempt, str(error).splitlines()[0])
        else:
            self._resolve(report)

    def _resolve(self, report: GroupReport) -> None:
        """A scored group joins the window, or is filtered."""
        self._verifying.ended(report.verification_s, time.monotonic())
        if self.ledger.report(report.group_id, report.attempt, report.oldest_version):
            self._num_completions += len(report.rewards) + report.num_faults
            self._num_tokens += report.num_tokens
            if self._is_filtered(report):
                self.ledger.filter(report.group_id)
                self.window.drop(report.group_id)
            else:
                self.window.mark_scored(report.group_id)
        self._ring()

    def _is_filtered(self, report: GroupReport) -> bool:
        """Fewer than two verdicts give no baseline; equal rewards give no gradient."""
        if len(report.rewards) < 2:
            return True
        return self._config.policy.filter == "zero_variance" and max(report.rewards) - min(report.rewards) < 1e-8

    def _lose(self, group_id: int, attempt: int, reason: str, *, is_death: bool = False) -> None:
        self.ledger.lose_lease(group_id, attempt, reason, is_death=is_death)
        if not self.ledger.is_open(group_id) and group_id in self.window:
            self.window.drop(group_id, is_filtered=False)
            counts = self.ledger.counts()
            if counts["lost"] > max(3, 0.05 * sum(counts.values())):
                raise TooManyLost(
                    f"{counts['lost']} groups were lost after {self.ledger.max_failures} failures each: "
                    f"{dict(self.ledger.lost_reasons)}; the traceback is in logs/"
                )
        self._ring()
