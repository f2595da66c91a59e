"""What a checkpoint keeps beside the learner's own state, and when one is written. Called by the controller.

    checkpoints/step-N/  manifest.json  run_state.json (this file's)  dcp/  hf/  … (the learner's)

The folder appears under its name only when it is whole: `vtriune.record.checkpoint` writes, hashes and renames.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vtriune.config.tree import Checkpoint, Config
from vtriune.record.checkpoint import CheckpointError, commit, prune, stage
from vtriune.roles import Learner, Recorder
from vtriune.run.ledger import LedgerState
from vtriune.run.schedule import ModeInForce, Progress, WorkDone, planned_progress
from vtriune.runtime import MeshFailure

log = logging.getLogger(__name__)

STATE_FILE = "run_state.json"
FINISH_S = 300.0
"""How long a run that has failed waits for the checkpoint in hand. A part of it that cannot be written ends the wait at once."""


class RunState(msgspec.Struct):
    """The controller's half of a checkpoint, taken between two versions."""

    version: int
    num_updates: int
    ledger: LedgerState
    cursor: dict[str, Any]
    filtered: list[int] = []
    """Groups filtered for each batch to come."""
    num_rows: int = sys.maxsize
    """Of the training data: with `run.epochs` the run's length follows from it, before any store is open. A checkpoint from before it
    was kept goes on."""
    progress: Progress | None = None
    """The run's line of progress; None in a checkpoint from before there was one."""
    requested: ModeInForce | None = None
    """Of a live switch."""
    has_ended: bool = True
    """The run came to its end, and its last version was evaluated; without it, data that are used up have still to be made one."""
    in_force: ModeInForce | None = None
    """What was in force, which a switch asked for since the last publish had not changed yet."""

    @property
    def done(self) -> WorkDone:
        """Work done until then."""
        return WorkDone(self.version, sum(sum(ends.values()) for ends in self.ledger.ended.values()))

    @property
    def num_lost(self) -> int:
        """Groups lost for good until then."""
        return sum(ends.get("lost", 0) for ends in self.ledger.ended.values())

    def progress_of(self, planned: Progress) -> Progress:
        """The line of progress of a run planned as `planned` that goes on from here."""
        return planned.resumed(self.progress or planned, self.done)

    def is_end_of(self, config: Config) -> bool:
        """Whether a run of `config` has nothing left to do: all versions are trained, or all epochs' samples accounted for."""
        planned = planned_progress(config, self.num_rows)
        if planned.unit == "versions":
            return self.version >= planned.total
        return self.has_ended and self.cursor["num_drawn"] >= planned.total and not self.ledger.open_groups


def read_state(checkpoint: Path) -> RunState:
    """The controller's half of a checkpoint that `vtriune.record.checkpoint.latest_complete` found whole."""
    return msgspec.json.decode((checkpoint / STATE_FILE).read_bytes(), type=RunState)


class Snapshots:
    """Writes and reads the checkpoints of one run folder. One at a time is written, beside the run.

    say   tells the user what the end of a failed run waits for
    A checkpoint gets its name only when everything that it implies is on disk: the state of all ranks, and the lines and archives
    of every version up to its own, so that whoever goes on from it has one whole history.
    """

    def __init__(self, folder: Path, settings: Checkpoint, say: Callable[[str], None] = log.info) -> None:
        self.folder = folder
        self.is_requested = False
        self._settings = settings
        self._say = say
        self._last: tuple[object, ...] = ()
        """What a stop compares, of the newest one."""
        self._whole: set[Path] = set()
        """Checkpoints that this process has read or written whole."""
        self._writing: asyncio.Task[None] | None = None

    def is_due(self, version: int, requested: ModeInForce | None = None, num_lost: int = 0, *, is_last: bool) -> bool:
        """At the end of the run or a stop, every `checkpoint.every` versions, or on request. For one version again only where a live
        switch was `requested` since, or groups were lost, which would stop the run that goes on once more."""
        every = self._settings.every
        is_wanted = is_last or self.is_requested or (every > 0 and version % every == 0)
        return is_wanted and (version, requested, num_lost) != self._last

    async def write(self, state: RunState, learner: Learner, recorder: Recorder) -> None:
        """Begin the checkpoint `step-<version>` and return when the learner's state is copied: it is written while the run goes on.

        Waits for the checkpoint before, and raises what broke it, or the copy. `settle` says when this one is complete. Cancelled, it
        leaves the checkpoint in hand, to be finished.
        """
        content, is_copied = msgspec.json.encode(state), asyncio.Event()  # Its groups go on changing.
        await self.settle(waits=True)
        self._writing = asyncio.create_task(self._complete(state.version, content, learner, recorder, is_copied))
        self._writing.add_done_callback(lambda _: is_copied.set())
        await is_copied.wait()
        await self.settle(waits=False)
        self.is_requested, self._last = False, (state.version, state.requested, state.num_lost)

    async def settle(self, *, waits: bool) -> None:
        """Raise what broke the checkpoint in hand; with `waits`, return only once there is none."""
        if self._writing is not None and (waits or self._writing.done()):
            try:
                await asyncio.shield(self._writing)
            finally:
                if self._writing.done():
                    self._writing = None

    async def finish(self) -> None:
        """The run has failed: wait until the checkpoint in hand is complete, or cannot be. Raises nothing, since the failure is what is
        to be told."""
        if self._writing is None or self._writing.done():
            return
        self._say(f"the run has failed; the checkpoint in hand is finished first, within {FINISH_S:.0f} s")
        try:
            async with asyncio.timeout(FINISH_S):
                await self.settle(waits=True)
        except (CheckpointError, MeshFailure, TimeoutError) as error:
            log.warning("the checkpoint in hand was not finished: %s", str(error) or "it took too long")

    async def _complete(
        self, version: int, content: bytes, learner: Learner, recorder: Recorder, is_copied: asyncio.Event
    ) -> None:
        """Copy; once all ranks' writes and the recorder's have ended: hash, seal, rename; checkpoints beyond `checkpoint.keep` are
        removed."""
        started = time.monotonic()
        try:
            staging = stage(self.folder, version)
            (staging / STATE_FILE).write_bytes(content)
            await learner.save.call(str(staging))
            blocked_s = time.monotonic() - started
            is_copied.set()
            await learner.saved.call()
            await recorder.recorded.call_one()
            final = await asyncio.to_thread(commit, staging)
            self._whole.add(final)
            await asyncio.to_thread(prune, self.folder, self._settings.keep, self._whole)
        except MeshFailure:
            raise  # A process is dead, and the account of that is of the process.
        except Exception as error:
            # Any error: it ends the run, and the account of that must say what was being written.
            raise CheckpointError(f"step-{version} could not be written: {error}") from error
        written_s = time.monotonic() - started - blocked_s
        log.info("checkpoint %s: training stood still for %.2f s, written in %.2f s", final, blocked_s, written_s)

    def read(self, folder: Path) -> RunState:
        """`read_state`; that is not written again."""
        state = read_state(folder)
        self._whole.add(folder)
        self._last = (state.version, state.requested, state.num_lost)
        return state
