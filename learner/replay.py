"""Train again from a run's archived trajectories, no generator needed: `python -m learner.replay RUN [section.key=value …]`.

Reads the run folder's configuration and its archive (`rollouts/version-*.parquet`), and gives the same groups with the same orders to
as many learner ranks as the run had, each with as many threads: for debugging losses, and for benchmarks. With the run's own
configuration the parameters and moments are those of the run, bit for bit on the same kind of machine, whatever generators did
meanwhile. Where the run was resumed its replay is, under what that start was configured to. Where the run has a checkpoint of the last
version that is replayed, the two are compared.

    --until VERSION    up to this version, instead of all that are archived
    --locate OTHER     train nothing: name the first place at which RUN and the run in OTHER were trained on different things
    section.key=value  another loss, correction, rate or number of ranks on the same data; what was ordered, `policy` and the run's
                       length, is not theirs to change

Writes one line per version to `<out>/metrics.jsonl`, and a checkpoint to `<out>/checkpoint` with `--save` or where one is compared.
Exit code 0; 1 where a difference was found that no override explains; 2 for a run that cannot be read.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from learner.archived_run import ArchivedBatch, ReplayError, last_version, read_run
from learner.rank_processes import RankProcesses
from verifiers import terminal
from verifiers.texts import FileError
from vtriune.config import Config, ConfigError, load
from vtriune.messages import TrainReport
from vtriune.record import starts
from vtriune.record.checkpoint import problems
from vtriune.run import orders

if TYPE_CHECKING:
    from learner.rank import LearnerRank

CHECKPOINT = "checkpoint"
"""The learner's part of a checkpoint at the end, below the folder that a replay writes to."""
RESUMED = "resumed"
"""The same where the run was resumed last."""
ORDERED = ("policy.", "run.steps=", "run.epochs=", "run.seed=")
"""Beginnings of overrides that would have no effect."""
_NAMED = 5
"""Differing tensors that are named; the others are counted."""


def replay(
    config_of: Callable[[int], Config], batches: Iterable[ArchivedBatch], out: Path, *, saves: bool
) -> Iterator[TrainReport]:
    """Train on each batch in turn, yielding its report. Where `config_of` gives a version another configuration (as an object) than the
    one before, the run was resumed there, and so is its replay: saved to `out`, opened anew, loaded. `saves`: also at the end."""
    learner: LearnerRank | RankProcesses | None = None
    config: Config | None = None
    with contextlib.ExitStack() as open_ranks:
        for batch in batches:
            wanted = config_of(batch.order.version + 1)
            if learner is None or wanted is not config:
                if learner is not None:
                    _save(learner, out / RESUMED)
                    open_ranks.close()
                learner = open_ranks.enter_context(contextlib.closing(_opened(wanted)))
                if config is not None:
                    learner.load(str(out / RESUMED))
                config = wanted
            for group in batch.groups:
                learner.deliver(group)
            yield learner.train(batch.order)
        if learner is not None and saves:
            _save(learner, out / CHECKPOINT)


def _opened(config: Config) -> "LearnerRank | RankProcesses":
    # torch is loaded by whoever trains, not by whoever reads `--help`.
    from learner.rank import LearnerRank

    folders, num_ranks = store_folders(config), config.cluster.learner.procs
    learner = LearnerRank(config, folders, 0, 1) if num_ranks == 1 else RankProcesses(config, folders)
    try:
        learner.connect("127.0.0.1", learner.open_store())
    except BaseException:  # Whatever failed, processes that did start are ended before the error goes on.
        learner.close()
        raise
    return learner


def _save(learner: "LearnerRank | RankProcesses", folder: Path) -> None:
    """The learner's part of a checkpoint; what an earlier replay left there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    learner.save(str(folder))
    learner.saved()


def store_folders(config: Config) -> list[str]:
    """The memory-mapped stores below the run's store folder; samples are found in them by fingerprint."""
    root = Path(config.data.store or Path(config.run.folder) / "stores")
    found = sorted(str(path.parent) for path in root.glob("*/index.json"))
    if not found:
        raise ReplayError(f"{root}: no store of samples; the replay needs the pixels that the run trained on")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="where to write; default: RUN/replay")
    parser.add_argument(
        "--until", type=int, metavar="VERSION", help="the last version to train or to compare; default: all archived"
    )
    parser.add_argument("--save", action="store_true", help="write a checkpoint at the end")
    parser.add_argument("--locate", type=Path, metavar="OTHER", help="compare with another run's folder; train nothing")
    options = parser.parse_intermixed_args(arguments)
    if options.locate is not None and (options.overrides or options.out or options.save):
        parser.error("--locate trains nothing and writes nothing: it takes no overrides, --out or --save")
    try:
        if options.locate is not None:
            return int(_locate(options.run, options.locate, options.until))
        if ordered := [text for text in options.overrides if text.startswith(ORDERED)]:
            raise ReplayError(
                f"{', '.join(ordered)}: a replay trains what was ordered; override keys of loss, optimizer or model"
            )
        return int(_replay(options.run, options.overrides, options.until, options.save, options.out))
    except (ConfigError, FileError, ReplayError) as error:
        print(f"cannot {'replay' if options.locate is None else 'compare'}: {error}", file=sys.stderr)
        return 2


def _replay(run: Path, overrides: Sequence[str], until: int | None, saves: bool, out: Path | None) -> bool:
    """Train, print, write; whether the outcome is not the run's although nothing was overridden."""
    config_of, out = _configurations(run, overrides), out or run / "replay"
    last = _last_version(run, until)
    checkpoint = run / "checkpoints" / f"step-{last}"
    compares = checkpoint.is_dir() and (saves or not overrides)
    batches: Iterator[ArchivedBatch] = itertools.islice(read_run(run), last)
    if any(text.startswith("loss.correction=") for text in overrides):
        batches = _corrected(config_of, batches)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for report in replay(config_of, batches, out, saves=saves or compares):
            lines.write(json.dumps({"version": report.version + 1, **report.metrics}) + "\n")
            lines.flush()
            figures = ("loss", "grad_norm", "ratio/max", "mismatch/max_abs", "tokens/trained", "time/learn_s")
            shown = "  ".join(f"{key} {report.metrics[key]:.4g}" for key in figures if key in report.metrics)
            print(f"version {report.version + 1}: {shown}")
    if not checkpoint.is_dir():
        print(f"parameters are not compared: there is no {checkpoint}")
    differs = compares and _tell_tensors(last, out / CHECKPOINT, checkpoint)
    print(f"everything is in {out}")
    return differs and not overrides


def _configurations(run: Path, overrides: Sequence[str]) -> Callable[[int], Config]:
    """What each version was trained under, with `overrides`; one object for all versions of a start."""
    known = starts.starts(run) or [starts.Start(1, 0, run / "config.yaml")]
    configs = {start: load(start.path, overrides) for start in known}
    return lambda version: configs[starts.start_of(version, known)]


def _last_version(run: Path, until: int | None) -> int:
    """`until`, or the last archived version."""
    archived = last_version(run)
    if until is not None and not 1 <= until <= archived:
        raise ReplayError(f"--until {until}: {run / 'rollouts'} holds versions 1 to {archived}; name one of them")
    return until or archived


def _corrected(config_of: Callable[[int], Config], batches: Iterable[ArchivedBatch]) -> Iterator[ArchivedBatch]:
    """The same batches under the correction that is configured."""
    for batch in batches:
        order = batch.order
        correction = orders.correction(config_of(order.version + 1), order.max_staleness, len(order.updates))
        yield ArchivedBatch(batch.groups, msgspec.structs.replace(order, correction=correction))


def _locate(ours: Path, theirs: Path, until: int | None) -> bool:
    """Print where the run in `ours` and that in `theirs` part, up to a version; whether they do."""
    from learner.locate import compare, differing_keys

    print(f"here: {ours}, there: {theirs}")
    configs = (msgspec.to_builtins(load(run / "config.yaml")) for run in (ours, theirs))
    for line in differing_keys(*configs):
        print(f"configuration: {line}")
    last = _last_version(ours, until)
    num_equal, difference = compare(*(itertools.islice(read_run(run), last) for run in (ours, theirs)))
    if difference is not None:
        print(f"first difference: {difference}")
    else:
        print(f"trained on the same up to version {num_equal}, the last that was compared")
    return _parameters_differ(ours, theirs, num_equal) or difference is not None


def _parameters_differ(ours: Path, theirs: Path, num_equal: int) -> bool:
    """Print how the parameters of the last version compare that was trained on the same and of which both runs have a checkpoint."""
    both = [
        version
        for version in range(1, num_equal + 1)
        if all((run / "checkpoints" / f"step-{version}").is_dir() for run in (ours, theirs))
    ]
    if not both:
        print(f"parameters are not compared: no version up to {num_equal} has a checkpoint in both")
        return False
    return _tell_tensors(both[-1], *(run / "checkpoints" / f"step-{both[-1]}" for run in (ours, theirs)))


def _tell_tensors(version: int, ours: Path, theirs: Path) -> bool:
    """Print how parameters and moments of two checkpoints compare; whether any differ."""
    from learner.checkpointing import SavedTensors
    from learner.locate import differing_tensors

    # A replay's own has no manifest: it is the learner's part alone.
    if found := [text for folder in (ours, theirs) if folder.parent.name == "checkpoints" for text in problems(folder)]:
        raise ReplayError(f"{'; '.join(found)}; restore it, or compare another version")
    one = SavedTensors(ours)
    differing = list(differing_tensors(one, SavedTensors(theirs)))
    what = f"parameters and moments of version {version} against {theirs}:"
    if not differing:
        print(f"{what} the same bit for bit, {len(one)} tensors")
        return False
    print(f"{what} {len(differing)} of {len(one)} tensors differ")
    for tensor in differing[:_NAMED]:
        print(f"  {tensor}")
    return True


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())
