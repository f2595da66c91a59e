"""A run's archive as the batches that the learner trained on, version by version. Read by `learner.replay` and `learner.locate`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa

from vtriune.messages import ScoredGroup, TrainOrder
from vtriune.record import archive


class ReplayError(ValueError):
    """A run folder that cannot be replayed: says which file is missing or does not fit."""


@dataclass(frozen=True, slots=True, eq=False)
class ArchivedBatch:
    """What one version was made of."""

    groups: list[ScoredGroup]
    order: TrainOrder


def read_run(run: Path) -> Iterator[ArchivedBatch]:
    """Archived versions in order, with the orders that the controller gave. Memory: one version.

    Raises ReplayError when the archive is empty, or a version, its order or one of its groups is missing or damaged.
    """
    for expected, (number, path) in enumerate(_files(run), 1):
        if number != expected:
            raise ReplayError(
                f"{path}: expected version {expected} next; every version from 1 on is needed, and record.max_gib keeps the newest only"
            )
        try:
            batch = _batch_of(path)
        except pa.ArrowInvalid as error:
            raise ReplayError(
                f"{path}: is damaged ({error}); put back a whole copy, or name an earlier --until"
            ) from error
        yield batch


def _batch_of(path: Path) -> ArchivedBatch:
    if not archive.has_logprobs(path):
        raise ReplayError(f"{path}: written under record.logprobs: false; a replay needs the sampler's log-probs")
    order = _order_of(path)
    groups = [archived.group for archived in archive.read(path)]
    missing = set(order.group_ids) - {group.group.lease.group_id for group in groups}
    if missing:
        raise ReplayError(f"{path}: groups {sorted(missing)} were trained on and are not in the archive")
    return ArchivedBatch(groups, order)


def last_version(run: Path) -> int:
    """The last archived version. Raises ReplayError when there is none."""
    return _files(run)[-1][0]


def _files(run: Path) -> list[tuple[int, Path]]:
    files = archive.files(run / "rollouts", "version")
    if not files:
        raise ReplayError(f"{run / 'rollouts'}: no archived version; name the folder of a run that trained")
    return files


def _order_of(path: Path) -> TrainOrder:
    stored = archive.notes_of(path).get(archive.ORDER)
    if stored is None:
        raise ReplayError(
            f"{path}: does not say what was ordered, because an older version wrote it; "
            "replay it with that version, or run the training again"
        )
    try:
        return msgspec.json.decode(stored, type=TrainOrder)
    except msgspec.DecodeError as error:
        raise ReplayError(
            f"{path}: what was ordered cannot be read ({error}); replay with the version that wrote it"
        ) from error
