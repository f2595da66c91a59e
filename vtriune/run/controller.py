"""The controller: moves work through the run. One process, one asyncio loop; it sees ids and counts, no tokens, no pixels.

Three loops, each a watched task; the first to fail ends the run:

| loop           | waits for                                        | unblocked by                                               |
| -------------- | ------------------------------------------------ | ---------------------------------------------------------- |
| `lease_groups` | a slot in the window and a generator with room   | a publish, a report, an engine that became healthy         |
| `_train`       | a batch that the window can cut                  | reports, the end of the data, a started engine; each lease |
|                |                                                  | ends by its deadline, and a group by its attempts          |
|                | an evaluation, a publish                         | their own tables, in `evaluation` and `publisher`          |
|                | the verifiers' and generators' figures           | `FIGURES_S`                                                |
|                | the learner, the recorder                        | their answer or end; where they hang: `cluster.stall_s`    |
| `_watch`       | a lease past its deadline                        | the clock                                                  |

Every change of state wakes whoever waits, who looks again. Whatever else keeps a run from getting anything done ends it, by name,
after `cluster.stall_s`.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from vtriune import roles
from vtriune.config.load import ConfigError
from vtriune.config.modes import Choice, problems
from vtriune.config.tree import Config
from vtriune.data.store import Store
from vtriune.messages import StepRecord, TrainOrder
from vtriune.run import orders
from vtriune.run.alarm_bell import AlarmBell
from vtriune.run.evaluation import Evaluated, HeldOutEvaluation
from vtriune.run.first_to_end import first_to_end
from vtriune.run.fleet import Fleet
from vtriune.run.groups import Groups
from vtriune.run.interval import Interval
from vtriune.run.leasing import Leasing
from vtriune.run.publisher import Publisher
from vtriune.run.schedule import ModeInForce, WorkDone, mode_in_force, num_versions, planned_progress
from vtriune.run.snapshots import RunState, Snapshots
from vtriune.runtime import report_step

log = logging.getLogger(__name__)


class Controller:
    """One training run over actors that exist already: `launch` made them and ends them. `show` takes each line of `metrics.jsonl`,
    `say` what else a person should read."""

    def __init__(
        self,
        config: Config,
        store: Store,
        fleet: Fleet,
        publisher: Publisher,
        evaluation: HeldOutEvaluation | None,
        learner: roles.Learner,
        verifiers: roles.VerifierPool,
        recorder: roles.Recorder,
        snapshots: Snapshots,
        show: Callable[[dict[str, float]], None],
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.num_versions = num_versions(config, len(store))
        self.in_force = mode_in_force(config.policy, 0.0)
        limits = self.in_force.limits(config.policy)
        self.groups = Groups(limits, config.policy.rollout_batch, max_oversample=config.policy.max_oversample)
        self.bell = AlarmBell(config, store, self.groups, recorder, say, self.stop)
        self.leasing = Leasing(config, store, fleet, self.groups, lambda: self.progress, self.wake, self.bell.lost)
        self.num_updates = 0
        self._store = store
        self._fleet = fleet
        self._publisher = publisher
        self._evaluation = evaluation
        self._learner = learner
        self._recorder = recorder
        self._snapshots = snapshots
        self._show = show
        self._progress = planned_progress(config, len(store))
        self._has_ended = False
        """The last version is published: that of `run.steps`, or that which left nothing of the epochs' data."""
        self._requested: ModeInForce | None = None
        self._is_resumed = False
        self._interval = Interval(config, fleet, self.leasing, verifiers)
        self._changed = asyncio.Event()

    # What launch and control call.

    async def run(self, *beside: Coroutine[Any, Any, None]) -> None:
        """Train to the end, or until `stop`, with others' works `beside` the run's own. Raises the first failure of any, once the
        checkpoint in hand is complete or cannot be; leaves no task running."""
        try:
            await first_to_end(self._train(), self.leasing.lease_groups(self._change), self._watch(), *beside)
        except Exception:  # Whatever failed; a cancellation, as by a second Ctrl-C, ends at once.
            await self._snapshots.finish()
            raise

    async def resume(self, folder: Path, *, keeps_switch: bool = True) -> None:
        """Take up again from a complete checkpoint, before `run`; without `keeps_switch` the mode is as configured."""
        report_step("controller", f"waits for the learner to load {folder}")
        state = self._snapshots.read(folder)
        await self._learner.load.call(str(folder))
        state.ledger.first_attempt = await self._recorder.truncate_after.call_one(state.version)
        self.leasing.restore(state.ledger, state.cursor, state.version, state.filtered)
        self.num_updates = state.num_updates
        self.num_versions = num_versions(self.config, len(self._store), state.done)
        self._has_ended = state.is_end_of(self.config)
        planned, self._progress = self._progress, state.progress_of(self._progress)
        if state.progress is not None and self._progress is not state.progress:
            log.warning(
                "the run's length was changed, %d → %d %s: progress goes on from %.4f linearly to 1",
                state.progress.total, planned.total, planned.unit, self.progress,
            )  # fmt: skip
        self._restore_mode(state, keeps_switch=keeps_switch)
        self._is_resumed = True
        log.info("resumed at version %d from %s", state.version, folder)

    @property
    def ending(self) -> str:
        """Once it has ended: why, in one line."""
        version, counts = self.groups.version, self.groups.counts()
        planned = f"version {version} of {self.num_versions}"
        goes_on = "" if self._has_ended else "; the same command goes on"
        if (alarm := self.bell.stopped_by) is not None:
            return f"stopped at {planned} by alarms.{alarm.name}: {alarm.text}{goes_on}"
        if not self._has_ended:
            return f"stopped at {planned} on request{goes_on}"
        if self._progress.unit == "versions":
            return f"trained to {planned}"
        left_out = [f"{counts[end]} {end}" for end in ("filtered", "faulted", "lost") if counts[end]]
        why = f": of {self.groups.num_ended} groups {' and '.join(left_out)}" if left_out else ""
        return f"the data of {self.config.run.epochs} epochs are used up at {planned} planned{why}"

    @property
    def progress(self) -> float:
        """Share of the run done: what mode, bound, rate and IoU threshold follow, in lines, leases and evaluations alike."""
        return self._progress.at(self._done)

    def stop(self) -> None:
        """End after the work in hand: a batch in training is still published, then a checkpoint written. Idempotent."""
        self.leasing.is_stopped = True
        self.wake()

    def switch(self, wanted: ModeInForce) -> None:
        """Change mode and bound at the next publish; overrides the file and its schedule from then on. Raises ConfigError for what the
        file could not ask for either."""
        if found := list(problems(self.config, Choice("", *wanted))):
            raise ConfigError("; ".join(found))
        self._requested = wanted

    def weigh(self, source: str, weight: float) -> None:
        """Draw more or less of a source from the next period of draws on; in the checkpoint, and over the file's weights from then on.
        Raises DataError for a source that is not there, and where sources are not weighted."""
        self.leasing.cursor.set_weight(source, weight)
        log.info("the weight of %s is %g from the next period of draws on", source, weight)

    def request_checkpoint(self) -> None:
        """Write a checkpoint after the version in hand."""
        self._snapshots.is_requested = True

    def wake(self) -> None:
        """Something changed: every waiter looks again."""
        self._changed.set()

    def status(self) -> dict[str, Any]:
        """Mode, window, and who waits for whom."""
        return {
            "version": self.groups.version,
            "num_versions": self.num_versions,
            "progress": self.progress,
            "mode": self.in_force.mode,
            "max_staleness": self.in_force.max_staleness,
            "requested": self._requested._asdict() if self._requested else None,
            "window": self.groups.slots(),
            "ledger": self.groups.counts(),
            "generators": {
                str(engine.rank): {
                    "health": engine.health.value,
                    "completions": engine.num_leased,
                    "waiting for": None if engine.num_leased else "slots in the window",
                }
                for engine in self._fleet.engines
            },
            "learner": "training" if self.groups.is_training else "waiting for groups",
            "idle": self._interval.idle,
        }

    # The loops.

    async def _train(self) -> None:
        """Per version: wait, train, publish, evaluate, record, checkpoint."""
        self._interval.begin()
        with self._interval.on("publish"):
            metrics = await self._publisher.refit(self.groups.version)
        # Resumed at version 0, the run has its line already.
        if self.groups.version == 0 and self.config.evaluation.before and not self._is_resumed:
            await self._record(metrics, None, await self._evaluate(is_due=True))
        self.wake()
        while not self._has_ended:
            batch = await self._wait_for_batch()
            if batch is None:
                break
            order = orders.make(self.config, self.in_force, self._progress, self._done, self.groups, batch)
            metrics = await self._train_on(order)
            # Before the publish, which lets the next batch's groups in.
            metrics |= await self._interval.verifier_figures()
            metrics |= await self._publish()
            metrics |= self._finish_version(order)
            await self._record(metrics, order, await self._evaluate(self._is_evaluation_due()))
            await self._save(is_last=False)
        await self._save(is_last=True)
        log.info(self.ending)

    async def _watch(self) -> None:
        """Waits for the clock; leases past their deadline are issued again."""
        while True:
            await asyncio.sleep(1.0)
            self.leasing.reissue_overdue()

    async def _change(self) -> None:
        """Returns at the next change."""
        self._changed.clear()
        await self._changed.wait()

    # One version.

    async def _wait_for_batch(self) -> list[int] | None:
        """The window's next batch, empty where the data ended without another group. None when stopped."""
        report_step("controller", f"waits for the groups of version {self.groups.version + 1}")
        with self._interval.on("wait"):
            while not self.leasing.is_stopped:
                batch = self.groups.cut()
                if batch is not None:
                    return batch
                await self._tend_fleet()
        return None

    async def _tend_fleet(self) -> None:
        """Brings engines that have started to the current version; where there is none, waits for a change."""
        self._fleet.raise_if_exhausted()
        if self._fleet.stale:
            await self._publisher.refit(self.groups.version)
            self.wake()
        else:
            await self._change()

    @property
    def _done(self) -> WorkDone:
        """Versions published and samples accounted for."""
        return WorkDone(self.groups.version, self.groups.num_ended)

    async def _train_on(self, order: TrainOrder) -> dict[str, float]:
        report_step("controller", f"waits for the learner to train version {order.version + 1}")
        with self._interval.on("train"):
            report = (await self._learner.train.call(order)).rank_value(0)
        self.num_updates += len(order.updates)
        return report.metrics

    async def _publish(self) -> dict[str, float]:
        with self._interval.on("publish"):
            return await self._publisher.publish(self.groups.version + 1)

    def _finish_version(self, order: TrainOrder) -> dict[str, float]:
        """The version is published: its groups end, a switch applies. Returns what its batch was trained under, and the accounts."""
        self.groups.publish()
        self.leasing.cursor.learn({group.row: group.solve_rate for group in self.groups.take_solved()})
        is_over_samples = self._progress.unit == "samples"
        self._has_ended = self.groups.is_exhausted if is_over_samples else self.groups.version >= self.num_versions
        self._enter(self._requested or self._configured)
        self.wake()
        return {
            "policy/is_off_policy": float(order.mode == "off_policy"),
            "policy/max_staleness": float(order.max_staleness),
            "policy/is_corrected": float(order.correction != "none"),
            "batch/groups": float(len(order.group_ids)),
            **self.groups.figures(),
            **self.leasing.cursor.figures(),
            "generators/deaths": float(self._fleet.num_deaths),
            "generators/shared_groups": float(self._fleet.num_shared),
        }

    def _restore_mode(self, state: RunState, *, keeps_switch: bool) -> None:
        """As it was, also a live switch that was to take effect at the next publish; else as configured."""
        if keeps_switch:
            self._requested = state.requested
        elif state.requested is not None:
            log.info("the live switch to %s is over: the mode was changed in the configuration", state.requested)
        self._enter((keeps_switch and state.in_force) or self._configured)

    @property
    def _configured(self) -> ModeInForce:
        return mode_in_force(self.config.policy, self.progress)

    def _enter(self, wanted: ModeInForce) -> None:
        if wanted != self.in_force:
            log.info("version %d: %s, max_staleness %d", self.groups.version, wanted.mode, wanted.max_staleness)
            self.in_force = wanted
            self.groups.switch(wanted.limits(self.config.policy))

    def _is_evaluation_due(self) -> bool:
        evaluation = self.config.evaluation
        if self._has_ended:
            return evaluation.after
        return evaluation.every > 0 and self.groups.version % evaluation.every == 0

    async def _evaluate(self, is_due: bool) -> Evaluated:
        if not is_due or self._evaluation is None:
            return Evaluated({}, {})
        report_step("controller", f"evaluates version {self.groups.version}")
        with self._interval.on("evaluate"):
            return await self._evaluation.run(self._tend_fleet)

    async def _record(self, metrics: dict[str, float], order: TrainOrder | None, evaluated: Evaluated) -> None:
        report_step("controller", f"waits for the recorder to write version {self.groups.version}")
        with self._interval.on("record"):
            metrics = {**metrics, **evaluated.metrics, **await self._fleet.figures()}
            metrics |= {**self._interval.take(metrics), "progress": self.progress}
            record = StepRecord(self.groups.version, self.num_updates, metrics, order, evaluated.attempts)
            line = await self._recorder.record_step.call_one(record)
            self.leasing.cursor.learn_held_out(line)
            self._show(line)
            await self.bell.recorded(line)

    async def _save(self, *, is_last: bool) -> None:
        """Begin a checkpoint if one is due; the window is between batches here. The last one is waited for."""
        report_step("controller", f"waits for a checkpoint, if one is due at version {self.groups.version}")
        with self._interval.on("checkpoint"):
            await self._snapshots.settle(waits=False)
            requested, num_lost = self._requested, self.groups.counts()["lost"]
            if self._snapshots.is_due(self.groups.version, requested, num_lost, is_last=is_last):
                state = RunState(
                    self.groups.version,
                    self.num_updates,
                    self.groups.state(),
                    self.leasing.cursor.state_dict(),
                    self.groups.filtered,
                    len(self._store),
                    self._progress,
                    self._requested,
                    self._has_ended,
                    self.in_force,
                )
                await self._snapshots.write(state, self._learner, self._recorder)
            await self._snapshots.settle(waits=is_last)
        if is_last and self._requested != requested:  # A live switch, while it was being written.
            await self._save(is_last=True)
