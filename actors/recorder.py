"""The recorder's actor: one process per run around `vtriune.record.recording`. Spawned by `vtriune.run.processes`.

    verifier pool ──record_group──▶ recording
    controller ────record_step────▶ recording ──▶ the line: back to the console, and to wandb
                                        └─ in the background ─▶ rollouts/version-N.parquet, then metrics.jsonl

A group comes from the pool and its step from the controller, so the step may be first: it waits for its groups, for a bounded time,
and counts what is missing.
"""

import asyncio
import logging
from pathlib import Path

import msgspec

from vtriune.config.tree import Config
from vtriune.data.processing import response_decoder
from vtriune.messages import Example, Purpose, ScoredGroup, StepRecord
from vtriune.record.recording import Recording, StepTicket
from vtriune.record.trackers import Wandb
from vtriune.runtime import Actor, Kind, endpoint

log = logging.getLogger(__name__)

ARRIVAL_S = 30.0
"""How long a step waits for groups that are still on their way."""


class RecordError(RuntimeError):
    """A group cannot be written, as on a full disk: no other attempt would fare better."""

    kind: Kind = "fatal"


class Recorder(Actor):
    """The recorder's actor. Endpoints run on one loop; only writing leaves it, one step at a time."""

    def __init__(self, config: Config, folder: str) -> None:
        kinds = config.evaluation.sampling or ["greedy"]
        decoder = response_decoder(config.model.path) if config.model.path else None
        self._recording = Recording(
            Path(folder), kinds=kinds, options=config.rewards.options, kept=config.record, decoder=decoder
        )
        tracking = config.tracking
        self._wandb = Wandb(tracking.wandb, tracking.project, Path(folder), msgspec.to_builtins(config))
        self._arrival = asyncio.Condition()
        self._writing: asyncio.Task[None] | None = None

    @endpoint
    async def record_group(self, group: ScoredGroup) -> None:
        """Take in a scored group, of training or evaluation."""
        async with self._arrival:
            try:
                self._recording.add(group)
            except OSError as error:
                raise RecordError(f"a group cannot be recorded: {error}") from error
            self._arrival.notify_all()

    @endpoint
    async def record_step(self, record: StepRecord) -> dict[str, float]:
        """Begin to archive one version's groups and to write its line, which is returned. Raises what broke a write before."""
        await self.recorded()
        async with self._arrival:
            try:
                async with asyncio.timeout(ARRIVAL_S):
                    await self._arrival.wait_for(lambda: self._recording.is_complete(record))
            except TimeoutError:
                log.warning("version %d: not all of its groups arrived within %g s", record.version, ARRIVAL_S)
            metrics, ticket = self._recording.step(record, tracker_failures=self._wandb.num_failures)
        self._writing = asyncio.create_task(self._write(ticket))
        self._wandb.log(metrics, record.version)
        return metrics

    @endpoint
    async def example(self, purpose: Purpose) -> Example | None:
        """A response of the version recorded last, or of its evaluation; None when there was none."""
        return self._recording.examples.get(purpose)

    @endpoint
    async def recorded(self) -> None:
        """Returns once the archives and lines of every version so far are on disk. Raises what broke a write, from then on always."""
        if self._writing is not None:
            await asyncio.shield(self._writing)

    @endpoint
    async def truncate_after(self, version: int) -> int:
        """Forget what was written after the checkpoint of `version`; call before the resumed run's first group. Returns an attempt
        above that of every group that was archived unconsumed."""
        return self._recording.truncate_after(version)

    @endpoint
    async def close(self) -> None:
        """Everything on disk, trackers finished. Idempotent. After a write that broke, the journal stays, and the next start finds the
        groups in it."""
        try:
            await self.recorded()
            self._recording.close()
        finally:
            await asyncio.to_thread(self._wandb.close)

    async def __cleanup__(self, error: Exception | None) -> None:
        await self.close()

    async def _write(self, ticket: StepTicket) -> None:
        await asyncio.to_thread(self._recording.write_step, ticket)
        self._recording.forget_step(ticket)
