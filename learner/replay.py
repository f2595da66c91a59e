"""Train again from a run's archived trajectories, no generator needed: `python -m learner.replay RUN [section.key=value …]`.

Reads the run folder's configuration, its archive (`rollouts/version-*.parquet`) and `metrics.jsonl`, and gives the same groups to
one learner rank in the order in which they were consumed: for debugging losses, and for benchmarks. With the run's own
configuration, one rank and as many threads the parameters are those of the run, bit for bit on one CPU. Overrides try another
loss, correction or rate on the same data. Writes one line per version to `<out>/metrics.jsonl`, and a checkpoint to
`<out>/checkpoint` with `--save`.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtriune.config import Config, ConfigError, load
from vtriune.data import archive
from vtriune.data.store import StoreSet
from vtriune.messages import ScoredGroup, TrainOrder, TrainReport
from vtriune.schedule import Stance, correction, num_versions, update_batches


class ReplayError(ValueError):
    """A run folder that cannot be replayed: says which file is missing or does not fit."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one version was made of."""

    groups: list[ScoredGroup]
    order: TrainOrder


def read_run(config: Config, run: Path) -> Iterator[Batch]:
    """Archived versions in order, with the orders that the controller gave. Memory: one version.

    Raises ReplayError when the archive is empty or a version is missing.
    """
    files = archive.files(run / "rollouts", "version")
    if not files:
        raise ReplayError(f"{run / 'rollouts'}: no archived version; name the folder of a run that trained")
    modes = _modes(run / "metrics.jsonl")
    policy = config.policy
    per_version = policy.rollout_batch // (policy.update_batch or policy.rollout_batch)
    num_updates_total = _num_versions(config, files[0][1]) * per_version
    num_updates = 0
    for expected, (number, path) in enumerate(files, 1):
        if number != expected:
            raise ReplayError(f"{path}: expected version {expected} next; every version from 1 on is needed")
        groups = [archived.group for archived in archive.read(path)]
        ids = [group.group.lease.group_id for group in groups]
        updates = update_batches(ids, policy.update_batch or policy.rollout_batch)
        stance = Stance("off_policy" if modes.get(number) else "on_policy", 0)
        oldest = min(t.oldest_version for group in groups for t in group.group.trajectories)
        order = TrainOrder(
            version=number - 1,
            updates=updates,
            max_staleness=number - 1 - oldest,
            correction=correction(config, stance),
            first_update=num_updates,
            num_updates_total=num_updates_total,
            attempts={group.group.lease.group_id: group.group.lease.attempt for group in groups},
        )
        num_updates += len(updates)
        yield Batch(groups, order)


def replay(config: Config, run: Path, batches: Iterable[Batch], save_to: Path | None = None) -> Iterator[TrainReport]:
    """Train on each batch in turn, yielding its report; at the end write the learner's part of a checkpoint to `save_to`."""
    # torch is loaded by whoever trains, not by whoever reads `--help`.
    from learner.service import LearnerService

    service = LearnerService(config, str(run), store_folders(config), rank=0, num_ranks=1)
    try:
        service.connect("127.0.0.1", service.open_store())
        for batch in batches:
            for group in batch.groups:
                service.deliver(group)
            yield service.train(batch.order)
        if save_to is not None:
            save_to.mkdir(parents=True, exist_ok=True)
            service.save(str(save_to))
            service.saved()
    finally:
        service.close()


def _num_versions(config: Config, first: Path) -> int:
    """Of the whole run, which may have archived fewer so far: warm-up is a share of it."""
    if config.run.steps is not None:
        return config.run.steps
    sample = next(archive.read(first)).group.group.lease.sample
    return num_versions(config, len(StoreSet.open(store_folders(config)).store_of(sample)))


def store_folders(config: Config) -> list[str]:
    """The memory-mapped stores below the run's store folder; samples are found in them by fingerprint."""
    root = Path(config.data.store or Path(config.run.folder) / "stores")
    found = sorted(str(path.parent) for path in root.glob("*/index.json"))
    if not found:
        raise ReplayError(f"{root}: no store of samples; the replay needs the pixels that the run trained on")
    return found


def _modes(path: Path) -> dict[int, float]:
    """Version → whether it was trained off-policy, from the run's metrics."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise ReplayError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run that trained"
        ) from error
    return {int(line["version"]): line.get("policy/is_off_policy", 0.0) for line in lines}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="where to write; default: RUN/replay")
    parser.add_argument("--versions", type=int, help="only the first so many versions")
    parser.add_argument("--save", action="store_true", help="write a checkpoint at the end")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "replay"
    try:
        config = load(options.run / "config.yaml", options.overrides)
        out.mkdir(parents=True, exist_ok=True)
        with (out / "metrics.jsonl").open("w") as lines:
            batches = _first(read_run(config, options.run), options.versions)
            for report in replay(config, options.run, batches, out / "checkpoint" if options.save else None):
                lines.write(json.dumps({"version": report.version + 1, **report.metrics}) + "\n")
                lines.flush()
                figures = ("loss", "grad_norm", "ratio/max", "mismatch/max_abs", "tokens/trained", "time/learn_s")
                shown = "  ".join(f"{key} {report.metrics[key]:.4g}" for key in figures if key in report.metrics)
                print(f"version {report.version + 1}: {shown}")
    except (ConfigError, ReplayError) as error:
        print(f"cannot replay: {error}", file=sys.stderr)
        return 2
    print(f"everything is in {out}")
    return 0


def _first(batches: Iterator[Batch], limit: int | None) -> Iterator[Batch]:
    for number, batch in enumerate(batches, 1):
        if limit is not None and number > limit:
            return
        yield batch


if __name__ == "__main__":
    sys.exit(main())
