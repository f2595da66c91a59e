"""The run's memory: every trajectory to Parquet, every version's figures to `metrics.jsonl` and wandb. One process per run.

    verifier pool ──record_group──▶ journal (on disk) + GroupStats (in memory)
                                        │
    controller ────record_step────▶ source metrics + the step's own ──▶ metrics.jsonl, wandb, and back to the console
                                        └─ in the background ─▶ rollouts/version-N.parquet

`Recording` is the logic and knows nothing of messages; `Recorder` is the actor around it. A group reaches this process from the pool
and its step from the controller, so the step may be first: it waits for its groups, for a bounded time, and counts what is missing.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from actors.trackers import MetricsFile, Wandb
from vtriune.config.tree import Config
from vtriune.data import archive
from vtriune.data.archive import Archived
from vtriune.data.journal import Journal, Key, key_of, recover
from vtriune.messages import ScoredGroup, StepRecord
from vtriune.metrics import BY_ACCURACY_OR_IOU, GroupStats, evaluation_metrics, source_metrics, summarise
from vtriune.runtime import Actor, endpoint

log = logging.getLogger(__name__)

ARRIVAL_S = 30.0
"""How long a step waits for groups that are still on their way."""

SamplingKind = Literal["sampled", "greedy"]


class Recording:
    """Groups in, files out. Not thread-safe but for `write_step`, which reads only what its ticket names.

    folder       the run folder
    max_pending  groups kept waiting for a step; beyond it the oldest are archived as unconsumed
    Memory: the figures of pending groups; their tokens and texts are in the journal on disk.
    """

    def __init__(
        self, folder: Path, *, max_pending: int = 100_000, kinds: Sequence[SamplingKind] = ("greedy",)
    ) -> None:
        self._rollouts = folder / "rollouts"
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._max_pending = max_pending
        self._kinds = kinds
        self._stats: dict[Key, GroupStats] = {}
        self._evaluations: dict[Key, SamplingKind] = {}
        self._num_duplicates = 0
        self._salvage(self._rollouts / "journal")
        self._journal = Journal(self._rollouts / "journal")

    def add(self, group: ScoredGroup) -> None:
        """Take in a scored group. A second arrival of the same attempt is counted and dropped, as at the learner; of several attempts
        the step names the one that was trained on, and the others end as unconsumed."""
        lease = group.group.lease
        key = key_of(lease)
        if key in self._journal:
            self._num_duplicates += 1
            log.info("group %d arrived again (attempt %d); the first is kept", lease.group_id, lease.attempt)
            return
        self._journal.append(group)
        self._stats[key] = summarise(group, BY_ACCURACY_OR_IOU)
        if lease.purpose == "evaluate":
            self._evaluations[key] = "sampled" if lease.sampling.temperature > 0 else "greedy"
        # Evaluation groups do not count: the next step takes them all, however many rows are held out.
        if len(self._stats) - len(self._evaluations) > self._max_pending:
            # The oldest quarter at once: a file per group would be many files.
            waiting = [key for key in self._stats if key not in self._evaluations]
            self._archive_unconsumed(waiting[: max(1, self._max_pending // 4)])

    def is_complete(self, record: StepRecord) -> bool:
        """Whether the groups that `record` speaks of have arrived: those it consumed, and its evaluations once one has."""
        num_evaluated = sum(len(self._stats[key].responses) for key in self._evaluations)
        num_expected = sum(
            int(record.metrics.get(f"eval/{kind}/num_rows", 0) + record.metrics.get(f"eval/{kind}/num_faults", 0))
            for kind in ("sampled", "greedy")
        )
        has_evaluations = num_evaluated == 0 or num_evaluated >= num_expected
        return has_evaluations and all(key in self._stats for key in _keys(record))

    def step(self, record: StepRecord, *, tracker_failures: int = 0) -> tuple[dict[str, float], "StepTicket"]:
        """Write the line of `record.version`: its own figures over the source metrics of its groups and evaluations.

        `record.version` is the version that training on the groups made: the learner held the one before while it consumed
        them. Returns the line and the ticket for `write_step`, which archives the trajectories.
        """
        known = [key for key in _keys(record) if key in self._stats]
        evaluated = dict(self._evaluations)
        metrics = source_metrics((self._stats[key] for key in known), version=record.version - 1)
        for kind in dict.fromkeys(evaluated.values()):
            of_kind = [self._stats[key] for key, its_kind in evaluated.items() if its_kind == kind]
            metrics |= evaluation_metrics(of_kind, prefix=f"eval/{kind}")
            if kind == self._kinds[0]:
                metrics |= evaluation_metrics(of_kind)
        metrics |= {
            "archive/num_missing": float(len(record.group_ids) - len(known)),
            "archive/num_duplicates": float(self._num_duplicates),
            "tracking/num_failures": float(tracker_failures),
            **record.metrics,
            "version": record.version,
            "update": record.update,
        }
        self._metrics.append(metrics)
        for key in (*known, *evaluated):
            del self._stats[key]
        self._evaluations.clear()
        notes = {
            "mode": "off_policy" if record.metrics.get("policy/is_off_policy") else "on_policy",
            "max_staleness": f"{record.metrics.get('policy/max_staleness', 0):.0f}",
        }
        return metrics, StepTicket(record.version, known, list(evaluated), notes)

    def write_step(self, ticket: "StepTicket") -> list[Path]:
        """Archive a step's trajectories; returns the files written. Slow at scale: the actor runs it beside its loop."""
        paths = []
        if ticket.consumed:
            groups = (Archived(ticket.version - 1, group) for group in self._journal.read(ticket.consumed))
            paths.append(archive.write(self._rollouts, "version", ticket.version, groups, ticket.notes))
        if ticket.evaluated:
            groups = (Archived(None, group) for group in self._journal.read(ticket.evaluated))
            paths.append(archive.write(self._rollouts, "evaluation", ticket.version, groups))
        return paths

    def forget_step(self, ticket: "StepTicket") -> None:
        """Free a written step's place in the journal."""
        self._journal.forget([*ticket.consumed, *ticket.evaluated])

    def truncate_after(self, version: int) -> None:
        """Forget what a run wrote after the checkpoint of `version` that it resumes from: lines, files, waiting groups."""
        num_lines = self._metrics.truncate_after(version)
        removed = archive.remove_after(self._rollouts, version)
        self._archive_unconsumed(list(self._stats))
        if num_lines or removed:
            log.info(
                "resuming at version %d: %d later lines and %d later files removed", version, num_lines, len(removed)
            )

    def close(self) -> None:
        """Archive what was never consumed and remove the journal. Idempotent."""
        self._archive_unconsumed(list(self._stats))
        self._journal.close()

    def _archive_unconsumed(self, keys: Sequence[Key]) -> None:
        if keys:
            self._write_unconsumed(Archived(None, group) for group in self._journal.read(keys))
            self._journal.forget(keys)
        for key in keys:
            del self._stats[key]
            self._evaluations.pop(key, None)

    def _write_unconsumed(self, groups: Iterable[Archived]) -> None:
        numbers = [number for number, _ in archive.files(self._rollouts, "unconsumed")]
        archive.write(self._rollouts, "unconsumed", max(numbers, default=0) + 1, groups)

    def _salvage(self, path: Path) -> None:
        """Groups that a killed recorder left in its journal become unconsumed ones, unless the newest files have them."""
        left = recover(path)
        if left:
            newest = [
                file for kind in ("version", "evaluation") for _, file in archive.files(self._rollouts, kind)[-1:]
            ]
            archived = {_name(item.group) for file in newest for item in archive.read(file)}
            left = [group for group in left if _name(group) not in archived]
        if left:
            log.warning("%d groups that a killed recorder had not archived yet are archived as unconsumed", len(left))
            self._write_unconsumed(Archived(None, group) for group in left)
        path.unlink(missing_ok=True)


def _keys(record: StepRecord) -> list[Key]:
    """Of the groups that were trained on."""
    return [Key(group_id, record.attempts.get(group_id, 0)) for group_id in record.group_ids]


def _name(group: ScoredGroup) -> tuple[int, int, int]:
    """What tells groups apart: evaluations of different versions reuse their ids."""
    lease = group.group.lease
    return lease.group_id, lease.attempt, group.group.trajectories[0].oldest_version


class StepTicket(msgspec.Struct, frozen=True):
    """Which groups of the journal belong to a version's files."""

    version: int
    consumed: list[Key]
    evaluated: list[Key]
    notes: dict[str, str]
    """The policy in force while the groups were consumed."""


class Recorder(Actor):
    """The recorder's actor. Endpoints run on one loop; only writing Parquet leaves it, one step at a time."""

    def __init__(self, config: Config, folder: str) -> None:
        policy = config.policy
        # Everything the window may hold, twice over: what lies longer than that was filtered and is consumed by no step.
        window = (max(policy.max_staleness or 0, 2) + 2) * policy.rollout_batch * policy.max_oversample
        self._recording = Recording(
            Path(folder), max_pending=int(2 * window), kinds=config.evaluation.sampling or ["greedy"]
        )
        tracking = config.tracking
        self._wandb = Wandb(tracking.wandb, tracking.project, Path(folder), msgspec.to_builtins(config))
        self._arrival = asyncio.Condition()
        self._writing: asyncio.Task[None] | None = None

    @endpoint
    async def ready(self) -> None:
        """Returns once the actor can take groups."""

    @endpoint
    async def record_group(self, group: ScoredGroup) -> None:
        """Take in a scored group, of training or evaluation."""
        async with self._arrival:
            self._recording.add(group)
            self._arrival.notify_all()

    @endpoint
    async def record_step(self, record: StepRecord) -> dict[str, float]:
        """Write one version's line and archive its groups; returns the line. Raises what archiving the version before raised."""
        await self._finish_writing()
        async with self._arrival:
            try:
                async with asyncio.timeout(ARRIVAL_S):
                    await self._arrival.wait_for(lambda: self._recording.is_complete(record))
            except TimeoutError:
                log.warning("version %d: not all of its groups arrived within %g s", record.version, ARRIVAL_S)
            metrics, ticket = self._recording.step(record, tracker_failures=self._wandb.num_failures)
        self._writing = asyncio.create_task(self._write(ticket))
        self._wandb.log(metrics, record.version)
        return metrics

    @endpoint
    async def truncate_after(self, version: int) -> None:
        """Forget what was written after the checkpoint of `version`; call before the resumed run's first group."""
        await self._finish_writing()
        self._recording.truncate_after(version)

    @endpoint
    async def close(self) -> None:
        """Everything on disk, trackers finished. Idempotent."""
        await self._close()

    async def __cleanup__(self, error: Exception | None) -> None:
        await self._close()

    async def _close(self) -> None:
        await self._finish_writing()
        self._recording.close()
        await asyncio.to_thread(self._wandb.close)

    async def _write(self, ticket: StepTicket) -> None:
        await asyncio.to_thread(self._recording.write_step, ticket)
        self._recording.forget_step(ticket)

    async def _finish_writing(self) -> None:
        """Wait for the step that is being archived, and raise what it raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing
