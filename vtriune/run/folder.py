"""Decides where a run's files go, whether it goes on from a checkpoint, and whether there is anything left to do. Called by launch.

What several starts leave in the folder of one run:

    config.yaml                          of the newest start
    config/start-002-at-version-9.yaml   of every start: version 10 was trained under the last one that began below it
    after-step-5.1/                      what had been made after step 5 when the run was taken back to it
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from vtriune import whole_files
from vtriune.config import Config, ConfigError, to_yaml
from vtriune.config.changes import Change, changes_between
from vtriune.config.modes import Choice, problems
from vtriune.data.loader import check_goes_on
from vtriune.data.store import Store
from vtriune.record import archive, checkpoint
from vtriune.record.starts import keep, start_of, starts
from vtriune.record.trackers import MetricsFile
from vtriune.run.schedule import planned_progress
from vtriune.run.snapshots import RunState, read_state

log = logging.getLogger(__name__)

Start = Literal["continue", "resume", "fresh"]
"""Go on or begin, whatever is there; refuse to begin; begin whatever is there."""

_OVERRULE_A_SWITCH = {"policy.mode", "policy.max_staleness", "policy.schedule"}


@contextlib.contextmanager
def writable(config: Config) -> Iterator[None]:
    """Around what makes and first writes the run's folder: ConfigError in place of what the disk answers."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(
            f"run.folder: {config.run.folder} cannot be used: {where}{error.strerror or error}; "
            "name a folder on a disk that can be written"
        ) from error


class Claim(NamedTuple):
    """What launch is to do with the run's folder."""

    folder: Path
    checkpoint: Path | None = None
    """To go on from."""
    finished: str | None = None
    """When nothing is left to train: what to tell the user. Nothing was touched then."""
    notes: tuple[str, ...] = ()
    """What differs from the start before, and which newer checkpoints are damaged: to be said and logged."""
    keeps_switch: bool = True
    """False where the file's mode was changed: its word is newer than the live switch in the checkpoint."""

    @property
    def outlook(self) -> str:
        """What a start would do, for `--dry-run`."""
        aside = ", moving an earlier run aside" if self.folder.exists() and any(self.folder.iterdir()) else ""
        how = f"goes on from {self.checkpoint}" if self.checkpoint else f"begins in {self.folder}{aside}"
        return self.finished or "\n".join([f"a start {how}", *self.notes])

    def check_data(self, config: Config, store: Store) -> None:
        """Raises DataError where the run does not go on over the rows of `store`."""
        if self.checkpoint is not None and self.finished is None:
            cursor, is_weighted = read_state(self.checkpoint).cursor, config.data.mixture.is_on
            check_goes_on(cursor, store, config.run.seed, is_weighted=is_weighted)


def folder_of(config: Config) -> Path:
    """Of the run."""
    return Path(config.run.folder) / config.run.name


def claim(config: Config, start: Start, step: str | None = None) -> Claim:
    """As `foresee`; and a folder to begin in is there and empty: an earlier run that reached no checkpoint, with `fresh` any run, is
    moved aside as `<name>.1`, `<name>.2`, … so that nothing is overwritten."""
    foreseen = foresee(config, start, step)
    folder = foreseen.folder
    if foreseen.checkpoint is not None:
        return foreseen
    notes: tuple[str, ...] = ()
    if folder.exists() and any(folder.iterdir()):
        aside = _unused(folder)
        folder.rename(aside)
        notes = (f"the earlier run was moved aside to {aside}",)
    folder.mkdir(parents=True, exist_ok=True)
    return foreseen._replace(notes=notes)


def foresee(config: Config, start: Start, step: str | None = None) -> Claim:
    """What a start would do, touching nothing: an unfinished run goes on from its newest whole checkpoint, or from `step`, the name or
    number of one.

    Raises ConfigError when there are checkpoints and none is whole, or `step` is not; when `resume` finds none; for a changed key that
    is refused; and for more steps of a finished run whose learning rate has fallen to 0.
    """
    folder = folder_of(config)
    found, damaged = _chosen(folder / "checkpoints", start, step)
    if found is None:
        return Claim(folder)
    state = read_state(found)
    if state.is_end_of(config):
        key = "run.steps" if config.run.steps is not None else "run.epochs"
        return Claim(
            folder,
            found,
            f"{config.run.name} is finished: its results are in {folder}, the model in {found}; raise {key} to train on, "
            "or give --fresh to begin anew",
        )
    before = _trained_under(folder, state.version)
    changes = changes_between(before, config) if before is not None else []
    keeps_switch = not any(change.key in _OVERRULE_A_SWITCH for change in changes)
    if refused := [*_refusals(config, changes, state, keeps_switch=keeps_switch)]:
        raise ConfigError("\n".join([f"{folder} does not go on from {found.name} like this:", *refused]))
    if before is None:
        damaged.append(f"{folder} keeps no configuration of an earlier start, so nobody can say what differs now")
    return Claim(folder, found, None, (*damaged, *map(str, changes)), keeps_switch)


def begin(claimed: Claim, config: Config, store: Store, say: Callable[[str], None]) -> None:
    """The start is under way, over the data of `store`: says and keeps what differs from the one before. Raises DataError where the
    data do, before anything is written."""
    claimed.check_data(config, store)
    version = checkpoint.step_of(claimed.checkpoint) if claimed.checkpoint is not None else 0
    for note in claimed.notes:
        say(note)
        log.info("at version %d: %s", version, note)
    keep(claimed.folder, version, to_yaml(config).encode())


def take_back(folder: Path, version: int) -> Path | None:
    """Where there are checkpoints later than `version`, damaged or not, move them and all that was recorded with them to
    `after-step-<version>.1`, `….2` and so on, and return that folder; else None. In their place they would be taken for what the run
    makes from there on.

    What a run that crashed recorded after its last checkpoint is another matter: it is made again, see `Recording.truncate_after`.
    """
    later = [path for path in checkpoint.all_steps(folder / "checkpoints") if checkpoint.step_of(path) > version]
    if not later:
        return None
    aside = _unused(folder / f"after-step-{version}")
    for kind in get_args(archive.Kind):
        later += [
            path
            for number, path in archive.files(folder / "rollouts", kind)
            if number > version and kind != "unconsumed"
        ]
    for path in later:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    whole_files.write(aside / "metrics.jsonl", MetricsFile(folder / "metrics.jsonl").lines_after(version))
    return aside


def _chosen(folder: Path, start: Start, step: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and a line for each newer one that is damaged."""
    if start == "fresh":
        return None, []
    names = [path.name for path in checkpoint.all_steps(folder)]
    if step is not None:
        name = step if step.startswith("step-") else f"step-{step}"
        if name not in names:
            raise ConfigError(f"--resume-from {step}: {folder} holds {', '.join(names) or 'no checkpoint'}")
        if reasons := checkpoint.problems(folder / name):
            raise ConfigError(f"--resume-from {step}: {reasons[0]}; name another one of {', '.join(names)}")
        return folder / name, []
    found, broken = checkpoint.newest_whole(folder)
    damaged = [f"{path.name} is damaged and left out: {reasons[0]}" for path, reasons in broken.items()]
    if found is None and damaged:
        raise ConfigError(
            "\n".join([
                f"{folder} holds no whole checkpoint, and nothing was touched: put a whole copy there (--resume-from step-N goes on "
                f"from that one), or give --fresh, which moves the run aside and begins anew",
                *damaged,
            ])
        )  # fmt: skip
    if found is None and start == "resume":
        raise ConfigError(f"--resume: {folder.parent} holds no complete checkpoint")
    return found, damaged


def _refusals(config: Config, changes: list[Change], state: RunState, *, keeps_switch: bool) -> list[str]:
    """Why the run does not go on from `state`, a line each."""
    found = [change.refusal for change in changes if change.refusal is not None]
    if state.requested is not None and keeps_switch:
        found += [
            f"{problem}; {state.requested.mode} is in force by a live switch, which a change of policy.mode overrules"
            for problem in problems(config, Choice("", *state.requested))
        ]
    decay = config.optimizer.decay
    if decay != "none" and state.progress_of(planned_progress(config, state.num_rows)).at(state.done) == 1.0:
        found.append(
            f"optimizer.decay: {decay} has let the rate fall to 0 at the end of the run, so that more steps would train nothing; "
            "write optimizer.decay=none, or begin a new run from its weights"
        )
    return found


def _trained_under(folder: Path, version: int) -> Mapping[str, Any] | None:
    """The configuration under which `version` was trained, as its file has it; None when the folder keeps none."""
    known = starts(folder)
    path = start_of(version, known).path if known else folder / "config.yaml"
    if not path.exists():
        return None
    try:
        tree: object = yaml.safe_load(path.read_bytes())
        if not isinstance(tree, dict):
            raise yaml.YAMLError("it holds no sections")
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: what the run was trained under cannot be read ({error}); restore it, or remove it to go on without comparing"
        ) from error
    return tree


def _unused(path: Path) -> Path:
    """`path` with the first number behind it that no other has."""
    return next(
        aside for number in itertools.count(1) if not (aside := path.with_name(f"{path.name}.{number}")).exists()
    )
