"""Decides where a run's files go and whether it goes on from a checkpoint. Called by launch."""

import logging
from pathlib import Path

from vtriune.checkpoint import latest_complete
from vtriune.config import Config, ConfigError

log = logging.getLogger(__name__)


def claim(config: Config, *, must_resume: bool) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to resume from, if any.

    An unfinished run with a complete checkpoint is resumed. A finished one, or one that never reached a checkpoint, is moved
    aside as `<name>.1`, `<name>.2`, … so that nothing is overwritten. Raises ConfigError when `must_resume` finds nothing.
    """
    folder = Path(config.run.folder) / config.run.name
    checkpoint = latest_complete(folder / "checkpoints")
    if checkpoint is not None and _version(checkpoint) == config.run.steps and not must_resume:
        checkpoint = None
    if checkpoint is None:
        if must_resume:
            raise ConfigError(f"--resume: {folder} holds no complete checkpoint")
        _move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, checkpoint


def _version(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _move_aside(folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    log.info("moved the earlier run aside to %s", aside)
