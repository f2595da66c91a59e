"""What a checkpoint keeps beside the learner's own state, and when one is written. Called by the controller.

    checkpoints/step-N/  manifest.json  run_state.json (this file's)  dcp/  hf/  … (the learner's)

The folder appears under its name only when it is whole: `vtriune.checkpoint` writes, hashes and renames.
"""

import logging
from pathlib import Path
from typing import Any

import msgspec

from vtriune.checkpoint import commit, prune, stage
from vtriune.config.tree import Checkpoint
from vtriune.ledger import LedgerState

log = logging.getLogger(__name__)

STATE_FILE = "run_state.json"


class RunState(msgspec.Struct):
    """The controller's half of a checkpoint, taken between two versions."""

    version: int
    num_updates: int
    ledger: LedgerState
    cursor: dict[str, Any]
    num_filtered: int
    """Groups filtered for the batch that is to come."""


class Snapshots:
    """Writes and reads the checkpoints of one run folder."""

    def __init__(self, folder: Path, settings: Checkpoint) -> None:
        self.folder = folder
        self.is_requested = False
        self._settings = settings
        self._last_version: int | None = None

    def is_due(self, version: int, *, is_last: bool) -> bool:
        """At the end of the run or a stop, every `checkpoint.every` versions, or on request; never twice for one version."""
        every = self._settings.every
        is_wanted = is_last or self.is_requested or (every > 0 and version % every == 0)
        return is_wanted and version != self._last_version

    async def write(self, state: RunState, learner: Any) -> Path:
        """Save `state` and the learner under `step-<version>`; older checkpoints beyond `checkpoint.keep` are removed."""
        staging = stage(self.folder, state.version)
        (staging / STATE_FILE).write_bytes(msgspec.json.encode(state))
        await learner.save.call(str(staging))
        final = commit(staging)
        prune(self.folder, self._settings.keep)
        self.is_requested, self._last_version = False, state.version
        log.info("checkpoint %s", final)
        return final

    def read(self, folder: Path) -> RunState:
        """The controller's half of a checkpoint that `vtriune.checkpoint.latest_complete` vouched for."""
        state = msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=RunState)
        self._last_version = state.version
        return state
