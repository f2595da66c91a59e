"""The controller: moves work through the run. One process, one asyncio loop; it sees ids and counts, no tokens, no pixels.

Three loops, each a watched task; the first to fail ends the run:

| loop           | waits for                                        | unblocked by                                      |
| -------------- | ------------------------------------------------ | ------------------------------------------------- |
| `lease_groups` | a slot in the window and a generator with room   | a publish, a report, an engine that became healthy |
| `_train`       | a batch that the window can cut                  | reports of scored groups                          |
| `_watch`       | a lease past its deadline                        | the clock                                         |

Every change of state rings one bell; whoever waits looks again.
"""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Protocol

from vtriune.config.tree import Config
from vtriune.data.store import Store
from vtriune.evaluation import Evaluation
from vtriune.first_to_end import first_to_end
from vtriune.fleet import Fleet
from vtriune.leasing import Leasing
from vtriune.messages import StepRecord, TrainOrder, TrainReport
from vtriune.publisher import Publisher
from vtriune.run_state import RunState, Snapshots
from vtriune.schedule import Stance, correction, num_versions, stance, update_batches
from vtriune.window import Window

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who is told of each finished version: the console."""

    def show(self, metrics: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, as written."""


class Controller:
    """One training run over actors that exist already: `launch` made them and ends them."""

    def __init__(
        self,
        config: Config,
        store: Store,
        fleet: Fleet,
        publisher: Publisher,
        evaluation: Evaluation | None,
        learner: Any,
        recorder: Any,
        snapshots: Snapshots,
        watcher: Watcher,
    ) -> None:
        self.config = config
        self.num_versions = num_versions(config, len(store))
        self.stance = stance(config.policy, 0.0)
        limits = self.stance.limits(config.policy)
        self.window = Window(limits, config.policy.rollout_batch, max_oversample=config.policy.max_oversample)
        self.leasing = Leasing(config, store, fleet, self.window, self.num_versions, self.ring)
        self.num_updates = 0
        self._fleet = fleet
        self._publisher = publisher
        self._evaluation = evaluation
        self._learner = learner
        self._recorder = recorder
        self._snapshots = snapshots
        self._watcher = watcher
        self._requested: Stance | None = None
        self._idle: dict[str, float] = {}
        """Share of the last version's time that each role waited."""
        self._bell = asyncio.Event()

    # What launch and control call.

    async def run(self) -> None:
        """Train to the end, or until `stop`. Raises the first failure of any loop; leaves no task running."""
        await first_to_end(self._train(), self.leasing.lease_groups(self._change), self._watch())

    async def resume(self, folder: Path) -> None:
        """Take up again from a complete checkpoint, before `run`."""
        state = self._snapshots.read(folder)
        await self._learner.load.call(str(folder))
        self.leasing.restore(state.ledger, state.cursor, state.version, state.num_filtered)
        self.num_updates = state.num_updates
        await self._recorder.truncate_after.call_one(state.version)
        log.info("resumed at version %d from %s", state.version, folder)

    def stop(self) -> None:
        """End after the work in hand: a batch in training is still published, then a checkpoint written. Idempotent."""
        self.leasing.is_stopped = True
        self.ring()

    def switch(self, wanted: Stance) -> None:
        """Change mode and bound at the next publish; overrides the file and its schedule from then on."""
        self._requested = wanted

    def request_checkpoint(self) -> None:
        """Write a checkpoint after the version in hand."""
        self._snapshots.is_requested = True

    def ring(self) -> None:
        """Something changed: every waiter looks again."""
        self._bell.set()

    def status(self) -> dict[str, Any]:
        """Mode, window, and who waits for whom."""
        return {
            "version": self.window.version,
            "num_versions": self.num_versions,
            "mode": self.stance.mode,
            "max_staleness": self.stance.max_staleness,
            "requested": self._requested._asdict() if self._requested else None,
            "window": {
                "active": self.window.num_active,
                "capacity": self.window.capacity,
                "overtakes": self.window.overtakes(),
            },
            "ledger": self.leasing.ledger.counts(),
            "generators": {
                str(engine.rank): {
                    "health": engine.health.value,
                    "completions": engine.num_leased,
                    "waiting for": None if engine.num_leased else "slots in the window",
                }
                for engine in self._fleet.engines
            },
            "learner": "training" if self.window.is_training else "waiting for groups",
            "idle": self._idle,
        }

    # The loops.

    async def _train(self) -> None:
        """Per version: wait, train, publish, evaluate, record, checkpoint."""
        await self._publisher.refit(self.window.version)
        if self.window.version == 0 and self.config.evaluation.before:
            await self._record(0, {}, await self._evaluate(is_due=True))
        self.ring()
        while self.window.version < self.num_versions:
            started = time.monotonic()
            batch = await self._wait_for_batch()
            if batch is None:
                break
            waited = time.monotonic() - started
            attempts = self.leasing.ledger.attempts(batch)
            metrics = await self._train_on(batch, attempts)
            metrics |= await self._publisher.publish(self.window.version + 1)
            metrics |= self._finish_version(batch, waited, time.monotonic() - started)
            metrics |= await self._fleet.figures()
            metrics["verifiers/idle_share"] = self.leasing.take_verifier_idle_share()
            self._idle = {
                "learner": metrics["time/wait_s"] / metrics["time/step_s"],
                "generators": metrics.get("generators/idle_share", 0.0),
                "verifiers": metrics["verifiers/idle_share"],
            }
            metrics |= await self._evaluate(self._is_evaluation_due())
            await self._record(self.window.version, attempts, metrics)
            await self._save(is_last=False)
        await self._save(is_last=True)

    async def _watch(self) -> None:
        """Waits for the clock; leases past their deadline are issued again."""
        while True:
            await asyncio.sleep(1.0)
            self.leasing.reissue_overdue()

    async def _change(self) -> None:
        """Returns at the next ring of the bell."""
        self._bell.clear()
        await self._bell.wait()

    # One version.

    async def _wait_for_batch(self) -> list[int] | None:
        """The window's next batch; brings dead engines back meanwhile. None when stopped, or when the data are used up."""
        while not self.leasing.is_stopped:
            batch = self.window.cut()
            if batch is not None:
                return batch
            if self.window.is_exhausted:
                return None
            await self._tend_fleet()
        return None

    async def _tend_fleet(self) -> None:
        """Brings dead engines back to the current version; with nothing to bring back, waits for a change."""
        await self._fleet.revive()
        if self._fleet.stale:
            await self._publisher.refit(self.window.version)
            self.ring()
        else:
            await self._change()

    async def _train_on(self, batch: list[int], attempts: dict[int, int]) -> dict[str, float]:
        policy, ledger = self.config.policy, self.leasing.ledger
        is_on_policy = self.stance.mode == "on_policy"
        update_batch = policy.rollout_batch if is_on_policy else policy.update_batch or policy.rollout_batch
        order = TrainOrder(
            version=self.window.version,
            updates=update_batches(batch, update_batch),
            max_staleness=max((ledger.get(group_id).max_staleness for group_id in batch), default=0),
            correction=correction(self.config, self.stance),
            first_update=self.num_updates,
            num_updates_total=self.num_versions * (policy.rollout_batch // update_batch),
            attempts=attempts,
            open_from=ledger.open_from(batch),
        )
        started = time.monotonic()
        reports: list[TrainReport] = [report for _, report in (await self._learner.train.call(order)).items()]
        self.num_updates += len(order.updates)
        self._fleet.on_report()
        return {**reports[0].metrics, "time/train_s": time.monotonic() - started}

    def _finish_version(self, batch: list[int], waited_s: float, step_s: float) -> dict[str, float]:
        """The version is published: account for its groups, release their slots, apply a switch. Returns the loop's metrics."""
        trained = self.stance
        self.leasing.ledger.consume(batch)
        self.window.publish()
        self._apply_stance()
        completions, tokens = self.leasing.take_counts()
        ledger = self.leasing.ledger.counts()
        self.ring()
        return {
            "time/step_s": step_s,
            "time/wait_s": waited_s,
            "throughput/completions_per_s": completions / step_s,
            "throughput/tokens_per_s": tokens / step_s,
            "policy/is_off_policy": float(trained.mode == "off_policy"),
            "policy/max_staleness": float(trained.max_staleness),
            "window/active": float(self.window.num_active),
            "batch/groups": float(len(batch)),
            "ledger/consumed": float(ledger["consumed"]),
            "ledger/filtered": float(ledger["filtered"]),
            "ledger/lost": float(ledger["lost"]),
            "ledger/duplicates": float(self.leasing.ledger.num_duplicates),
            "ledger/reissues": float(self.leasing.ledger.num_reissues),
            "generators/deaths": float(self._fleet.num_deaths),
            "generators/shared_groups": float(self._fleet.num_shared),
        }

    def _apply_stance(self) -> None:
        wanted = self._requested or stance(self.config.policy, self.window.version / self.num_versions)
        if wanted != self.stance:
            log.info("version %d: %s, max_staleness %d", self.window.version, wanted.mode, wanted.max_staleness)
            self.stance = wanted
            self.window.switch(wanted.limits(self.config.policy))

    def _is_evaluation_due(self) -> bool:
        evaluation, version = self.config.evaluation, self.window.version
        if version == self.num_versions:
            return evaluation.after
        return evaluation.every > 0 and version % evaluation.every == 0

    async def _evaluate(self, is_due: bool) -> dict[str, float]:
        if not is_due or self._evaluation is None:
            return {}
        started = time.monotonic()
        metrics = await self._evaluation.run(self._tend_fleet)
        return {**metrics, "time/evaluate_s": time.monotonic() - started}

    async def _record(self, version: int, attempts: dict[int, int], metrics: dict[str, float]) -> None:
        record = StepRecord(version, self.num_updates, list(attempts), metrics, attempts)
        self._watcher.show(await self._recorder.record_step.call_one(record))

    async def _save(self, *, is_last: bool) -> None:
        """Begin a checkpoint if one is due; the window is between batches here. The last one is waited for."""
        await self._snapshots.settle(waits=False)
        if self._snapshots.is_due(self.window.version, is_last=is_last):
            state = RunState(
                self.window.version,
                self.num_updates,
                self.leasing.ledger.state(),
                self.leasing.cursor.state_dict(),
                self.window.num_filtered,
            )
            await self._snapshots.write(state, self._learner)
        await self._snapshots.settle(waits=is_last)
