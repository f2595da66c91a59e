"""What each start of a run was configured to: kept by `vtriune.run.folder`, asked by whoever must know what
a version was trained under.

<run>/config.yaml                          of the newest start
<run>/config/start-002-at-version-9.yaml   of the second start, which went on from version 9
"""

import re
from pathlib import Path
from typing import NamedTuple

from vtriune import whole_files

_NAME = re.compile(r"start-(\d+)-at-version-(\d+)\.yaml")


class Start(NamedTuple):
    """One start of a run's command."""

    number: int
    """From 1."""
    version: int
    """What it went on from; 0: it began."""
    path: Path
    """The resolved configuration."""


def keep(run: Path, version: int, configuration: bytes) -> None:
    """A start of the run in folder `run` goes on from `version` under `configuration`, resolved, as YAML."""
    number = 1 + max((start.number for start in starts(run)), default=0)
    (run / "config").mkdir(exist_ok=True)
    whole_files.write(run / "config" / f"start-{number:03}-at-version-{version}.yaml", configuration)
    whole_files.write(run / "config.yaml", configuration)


def starts(run: Path) -> list[Start]:
    """Every start of the run in folder `run`, in order; empty where none was kept."""
    named = ((_NAME.fullmatch(path.name), path) for path in (run / "config").glob("*.yaml"))
    return sorted(Start(int(match[1]), int(match[2]), path) for match, path in named if match is not None)


def start_of(version: int, starts: list[Start]) -> Start:
    """The start that trained `version`: the last that went on from below it, since what an earlier one made beyond was made again."""
    oldest = min(start.version for start in starts)
    return [start for start in starts if start.version < max(version, oldest + 1)][-1]
