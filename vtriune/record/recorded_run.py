"""A run as it was recorded, for notebooks and scripts: `vtriune.record.open_run(RUN)`.

    digits = open_run("runs/digits")
    for answer in digits.answers("version", 12):                # what version 12 was trained on
        sample = digits.sample(answer)                          # its prompt, pictures and reward specification
        print(sample.source, sample.sample_id, answer.header.file, answer.verdict.reward, answer.text)

Nothing is written, and the run may go on meanwhile: files appear under their names only when they are whole.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from verifiers import ImageSize, Verdict
from vtriune.config import Config, ConfigError, load
from vtriune.data.schema import DataError, Sample
from vtriune.data.store import Store, StoreSet
from vtriune.messages import SampleHeader, SampleRef
from vtriune.record import archive


class Answer(NamedTuple):
    """One completion and what it was given."""

    version: int
    """Number of the file: the version that it was trained into, or that sampled it for an evaluation."""
    group_id: int
    completion: int
    """Its number within the group, from 0."""
    ref: SampleRef
    header: SampleHeader
    """Source, sample id, file and row of the data, reward specification."""
    image_sizes: list[ImageSize]
    text: str
    finish_reason: str
    verdict: Verdict


class RecordedRun:
    """What a run folder holds. Made by `open_run`."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one per version."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def answers(self, kind: archive.Kind = "version", number: int | None = None) -> Iterator[Answer]:
        """Archived completions in order, of one file or of all of that kind. Memory: about a million tokens."""
        for version, path in archive.files(self.folder / "rollouts", kind):
            if number in (None, version):
                for archived in archive.read(path):
                    scored = archived.group
                    lease = scored.group.lease
                    answered = zip(scored.group.trajectories, scored.verdicts, strict=True)
                    for index, (trajectory, verdict) in enumerate(answered):
                        yield Answer(
                            version, lease.group_id, index, lease.sample, lease.header, scored.group.image_sizes,
                            trajectory.text, trajectory.finish_reason, verdict,
                        )  # fmt: skip

    def sample(self, answer: Answer) -> Sample:
        """The row of the data that was asked. Raises DataError where the run's store is gone."""
        return self._stores.get(answer.ref)

    @cached_property
    def _stores(self) -> StoreSet:
        folder = Path(self.config.data.store or self.folder.parent / "stores")
        stores = [Store.open(path.parent) for path in sorted(folder.glob("*/index.json"))]
        if not stores:
            raise DataError(f"{folder}: no store is there; the run's own command builds it again, with --dry-run")
        return StoreSet(stores)


def open_run(folder: str | Path) -> RecordedRun:
    """The run in `folder`. Raises DataError when it is none."""
    folder = Path(folder)
    try:
        return RecordedRun(folder, load(folder / "config.yaml"))
    except ConfigError as error:
        raise DataError(f"{folder}: is no run folder ({error})") from error
