"""What a checkpoint keeps beside the learner's own state, and when one is written. Called by the controller.

    checkpoints/step-N/  manifest.json  run_state.json (this file's)  dcp/  hf/  … (the learner's)

The folder appears under its name only when it is whole: `vtriune.checkpoint` writes, hashes and renames.
"""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import msgspec

from vtriune.checkpoint import CheckpointError, commit, prune, stage
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
    """Writes and reads the checkpoints of one run folder. One at a time is written, beside the run."""

    def __init__(self, folder: Path, settings: Checkpoint) -> None:
        self.folder = folder
        self.is_requested = False
        self._settings = settings
        self._last_version: int | None = None
        self._writing: asyncio.Task[None] | None = None

    def is_due(self, version: int, *, is_last: bool) -> bool:
        """At the end of the run or a stop, every `checkpoint.every` versions, or on request; never twice for one version."""
        every = self._settings.every
        is_wanted = is_last or self.is_requested or (every > 0 and version % every == 0)
        return is_wanted and version != self._last_version

    async def write(self, state: RunState, learner: Any) -> None:
        """Begin the checkpoint `step-<version>` and return when the learner's state is copied: it is written while the run goes on.

        Waits for the checkpoint before, and raises what broke it. `settle` says when this one is complete.
        """
        await self.settle(waits=True)
        started = time.monotonic()
        staging = stage(self.folder, state.version)
        (staging / STATE_FILE).write_bytes(msgspec.json.encode(state))
        await learner.save.call(str(staging))
        blocked_s = time.monotonic() - started
        self.is_requested, self._last_version = False, state.version
        self._writing = asyncio.create_task(self._complete(staging, learner, blocked_s))

    async def settle(self, *, waits: bool) -> None:
        """Raise what broke the checkpoint in hand; with `waits`, return only once there is none."""
        if self._writing is not None and (waits or self._writing.done()):
            writing, self._writing = self._writing, None
            await writing

    async def _complete(self, staging: Path, learner: Any, blocked_s: float) -> None:
        """Once all ranks' writes have ended: hash, seal, rename; checkpoints beyond `checkpoint.keep` are removed."""
        started = time.monotonic()
        try:
            await learner.saved.call()
            final = await asyncio.to_thread(commit, staging)
            await asyncio.to_thread(prune, self.folder, self._settings.keep)
        except Exception as error:
            # Any error: it ends the run, and the account of that must say what was being written.
            raise CheckpointError(f"{staging.name} could not be written: {error}") from error
        log.info(
            "checkpoint %s: training stood still for %.2f s, written in %.2f s",
            final,
            blocked_s,
            time.monotonic() - started,
        )

    def read(self, folder: Path) -> RunState:
        """The controller's half of a checkpoint that `vtriune.checkpoint.latest_complete` vouched for."""
        state = msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=RunState)
        self._last_version = state.version
        return state
