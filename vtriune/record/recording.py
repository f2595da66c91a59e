"""A run's memory: every trajectory to Parquet, every version's figures to `metrics.jsonl`. Held by the recorder's actor.

add ───────▶ journal (on disk) + GroupStats (in memory)
step ──────▶ the version's line: source metrics over its groups, and the step's own
write_step ▶ rollouts/version-N.parquet, then the line in metrics.jsonl
forget_step  the journal's place is free

Each is on disk before the next begins: a line implies its version's archive, and a kill in between leaves groups in two places, never
in none.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from verifiers import RewardOptions, columns
from verifiers.texts import Decoder
from vtriune.config.sections.record import Record
from vtriune.messages import Example, Purpose, ScoredGroup, StepRecord, TrainOrder
from vtriune.record import archive
from vtriune.record.archive import Archived
from vtriune.record.journal import DeliveryKey, Journal, key_of, recover
from vtriune.record.source_metrics import GroupStats, evaluation_metrics, source_metrics, summarise
from vtriune.record.trackers import MetricsFile

log = logging.getLogger(__name__)


SamplingKind = Literal["sampled", "greedy"]

EXCERPT = 80
"""Characters of an example's beginning, and of its end."""


class Recording:
    """Groups in, files out. Not thread-safe but for `write_step`, which reads only what its ticket names.

    folder       the run folder
    options      what the groups are scored under: says what is correct, and stands in each file's metadata
    kept         of the trajectories, and how much of them
    decoder      gives the texts that need not be stored; None: all are
    Memory: the figures of groups that wait for a step, which are at most those that the window admits and those filtered since its
    oldest group was admitted; their tokens and texts are in the journal on disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kinds: Sequence[SamplingKind] = ("greedy",),
        options: RewardOptions | None = None,
        kept: Record | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._rollouts = folder / "rollouts"
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._kinds = kinds
        self._options = options or RewardOptions()
        self._kept = kept or Record()
        self._decoder = decoder
        self._stats: dict[DeliveryKey, GroupStats] = {}
        self._evaluations: dict[DeliveryKey, SamplingKind] = {}
        self._num_duplicates = 0
        self._num_removed = 0
        """Archive files, for `record.max_gib`."""
        self.examples: dict[Purpose, Example] = {}
        """A response of the last step, of what was trained on or else was left out; and one of its evaluation. Where there were any."""
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
        self._stats[key] = summarise(group, self._options)
        if lease.purpose == "evaluate":
            self._evaluations[key] = "sampled" if lease.sampling.temperature > 0 else "greedy"

    def is_complete(self, record: StepRecord) -> bool:
        """Whether the groups that `record` speaks of have arrived: those it consumed, and those it evaluated."""
        return all(key in self._stats for key in (*_keys(record), *_evaluated(record)))

    def step(self, record: StepRecord, *, tracker_failures: int = 0) -> tuple[dict[str, float], "StepTicket"]:
        """The line of `record.version`: its own figures over the source metrics of its groups and evaluations.

        `record.version` is the version that training on the groups made: the learner held the one before while it consumed
        them. Returns the line and the ticket for `write_step`, which archives the trajectories, those of the step, and as unconsumed
        what the controller says no later step will name, and writes the line.
        """
        named, named_too = _keys(record), _evaluated(record)
        known = [key for key in named if key in self._stats]
        evaluated = {key: self._evaluations[key] for key in named_too if key in self._evaluations}
        metrics = source_metrics((self._stats[key] for key in known), version=record.version - 1)
        for kind in dict.fromkeys(evaluated.values()):
            of_kind = [self._stats[key] for key, its_kind in evaluated.items() if its_kind == kind]
            metrics |= evaluation_metrics(of_kind, prefix=f"eval/{kind}")
            if kind == self._kinds[0]:
                metrics |= evaluation_metrics(of_kind)
        metrics |= {
            "archive/num_missing": float(len(named) + len(named_too) - len(known) - len(evaluated)),
            "archive/num_duplicates": float(self._num_duplicates),
            "archive/num_removed": float(self._num_removed),
            "tracking/num_failures": float(tracker_failures),
            **record.metrics,
            "version": record.version,
            "update": record.update,
        }
        # Of evaluations nothing is open: another attempt at a row, or one at a row that was left out, has come too late to count.
        open_from = record.order.open_from if record.order is not None else 0
        taken = {*known, *evaluated}
        ended = [key for key in self._stats if key.group_id < open_from and key not in taken]
        self.examples = {}
        for group in self._journal.read([*(known or ended)[:1], *list(evaluated)[:1]]):
            self.examples[group.group.lease.purpose] = _example(group)
        for key in (*taken, *ended):
            del self._stats[key]
        self._evaluations.clear()
        return metrics, StepTicket(metrics, record.version, known, list(evaluated), ended, record.order)

    def write_step(self, ticket: "StepTicket") -> None:
        """Archive a step's trajectories, then write its line. Slow at scale: the actor runs it beside its loop."""
        if ticket.order is not None:
            notes = {archive.ORDER: msgspec.json.encode(ticket.order).decode()}
            groups = (Archived(ticket.version - 1, group) for group in self._journal.read(ticket.consumed))
            self._archive("version", ticket.version, groups, notes)
        if ticket.evaluated:
            groups = (Archived(None, group) for group in self._journal.read(ticket.evaluated))
            self._archive("evaluation", ticket.version, groups)
        if ticket.ended:
            self._write_unconsumed(self._journal.read(ticket.ended))
        self._metrics.append(ticket.line)

    def forget_step(self, ticket: "StepTicket") -> None:
        """Free a written step's place in the journal."""
        self._journal.forget([*ticket.consumed, *ticket.evaluated, *ticket.ended])

    def truncate_after(self, version: int) -> int:
        """Forget what a run wrote after the checkpoint of `version` that it resumes from: lines, files, waiting groups.

        Groups that were archived unconsumed stay, and are generated again under the same ids: returned is an attempt above all of
        theirs.
        """
        num_lines = self._metrics.truncate_after(version)
        removed = archive.remove_after(self._rollouts, version)
        self._archive_unconsumed(list(self._stats))
        if num_lines or removed:
            log.info(
                "resuming at version %d: %d later lines and %d later files removed", version, num_lines, len(removed)
            )
        return 1 + max(
            (archive.last_attempt(file) for _, file in archive.files(self._rollouts, "unconsumed")), default=-1
        )

    def close(self) -> None:
        """Archive what was never consumed and remove the journal. Idempotent."""
        self._archive_unconsumed(list(self._stats))
        self._journal.close()

    def _archive_unconsumed(self, keys: Sequence[DeliveryKey]) -> None:
        if keys:
            self._write_unconsumed(self._journal.read(keys))
            self._journal.forget(keys)
        for key in keys:
            del self._stats[key]
            self._evaluations.pop(key, None)

    def _write_unconsumed(self, groups: Iterable[ScoredGroup]) -> None:
        numbers = [number for number, _ in archive.files(self._rollouts, "unconsumed")]
        self._archive("unconsumed", max(numbers, default=0) + 1, (Archived(None, group) for group in groups))

    def _archive(
        self, kind: archive.Kind, number: int, groups: Iterable[Archived], notes: Mapping[str, str] | None = None
    ) -> None:
        options = msgspec.json.encode(self._options).decode()
        notes = {columns.OPTIONS: options, **(notes or {})}
        archive.write(
            self._rollouts, kind, number, groups, notes, decoder=self._decoder, keeps_logprobs=self._kept.logprobs
        )
        if self._kept.max_gib is not None:
            removed = archive.prune(self._rollouts, self._kept.max_gib * 2**30)
            self._num_removed += len(removed)
            for path in removed:
                log.info(
                    "%s is removed: the archive would take more than record.max_gib %g", path.name, self._kept.max_gib
                )

    def _salvage(self, path: Path) -> None:
        """Groups that a killed recorder left in its journal become unconsumed ones, unless the newest files have them."""
        left = recover(path)
        if left:
            newest = [file for kind in get_args(archive.Kind) for _, file in archive.files(self._rollouts, kind)[-1:]]
            archived = {_name(item.group) for file in newest for item in archive.read(file)}
            left = [group for group in left if _name(group) not in archived]
        if left:
            log.warning("%d groups that a killed recorder had not archived yet are archived as unconsumed", len(left))
            self._write_unconsumed(left)
        path.unlink(missing_ok=True)


def _keys(record: StepRecord) -> list[DeliveryKey]:
    """Of the groups that were trained on."""
    order = record.order
    return [] if order is None else [DeliveryKey(key, order.attempts.get(key, 0)) for key in order.group_ids]


def _evaluated(record: StepRecord) -> list[DeliveryKey]:
    """Of the held-out rows that were scored."""
    return [DeliveryKey(group_id, attempt) for group_id, attempt in record.evaluated.items()]


def _example(group: ScoredGroup) -> Example:
    text = group.group.trajectories[0].text
    ends = text if len(text) <= 2 * EXCERPT else f"{text[:EXCERPT]} … {text[-EXCERPT:]}"
    return Example(group.group.lease.header, ends)


def _name(group: ScoredGroup) -> tuple[int, int, bytes]:
    """What tells groups apart, token by token: evaluations of different versions, or of several starts, reuse their ids."""
    lease = group.group.lease
    return lease.group_id, lease.attempt, b"".join(each.token_ids.tobytes() for each in group.group.trajectories)


class StepTicket(msgspec.Struct, frozen=True):
    """A version's line, and which groups of the journal belong to its files."""

    line: dict[str, float]
    version: int
    consumed: list[DeliveryKey]
    evaluated: list[DeliveryKey]
    ended: list[DeliveryKey]
    """Filtered, or other attempts of groups that were trained on."""
    order: TrainOrder | None
    """What the version was trained under; None for version 0."""
