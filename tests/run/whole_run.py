"""A model of the whole run: the real controller over fake actors in virtual time, against the same run left alone.

Hypothesis draws a plan (mode, bound, batches, filter, epochs or steps, schedule, live switches, rows that fail or are flat) and what
befalls the run: deaths, broken connections, overdue leases, stops, kills at any moment, resumes with changes. The plan is also run
without any of that. Checked at the end:

- it ended, by itself, and nothing waited for ever (`VirtualTime` finds that out);
- every line is true of its batch: mode, bound, correction, updates, and the bounds its groups were admitted under;
- no sample is trained on twice or beyond its bound, and every draw has an end;
- the interrupted run equals the one left alone, version by version: mode, bound, progress (which rate, IoU threshold and schedule
  follow); and, where groups cannot overtake each other, the rows and their order, and corrections.

`python -m tests.run.whole_run --sequences 100000`.
"""

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from bench.machine import describe, heading
from tests.run.stage import FakeRecorder, Stage
from tests.run.virtual_time import VirtualTime, cancel_all, virtual_time
from vtriune.config.sections.alarms import Alarms, EmptyBatches, LostShare
from vtriune.config.sections.mixture import Mixture
from vtriune.config.sections.policy import Phase as SchedulePhase
from vtriune.config.tree import Policy
from vtriune.data.loader import ShuffledRows
from vtriune.messages import Lease, StepRecord, TrainOrder
from vtriune.record.checkpoint import all_steps, latest_complete, step_of
from vtriune.run.controller import Controller
from vtriune.run.folder import take_back
from vtriune.run.schedule import ModeInForce, mode_in_force
from vtriune.run.snapshots import read_state
from vtriune.runtime import ActorError

LEASE_S = 20.0
NUM_HELD_OUT = 4
END_S = 1_000.0
"""Virtual seconds within which every run must have ended."""

MAX_ALARMS = 200
"""Stops of one run by alarms, of which each row can ring one an epoch."""


class Plan(NamedTuple):
    """What the user asks for, and what the data are like."""

    policy: Policy
    steps: int | None
    epochs: int | None
    num_rows: int
    flat: frozenset[int]
    """Rows whose completions are all rewarded alike."""
    failing: frozenset[int]
    """Rows that every generator refuses."""
    unreadable: frozenset[int]
    """Held-out rows that every generator refuses."""
    stops_at_alarms: bool
    """At every empty batch and every lost group."""
    saving_s: float
    switches: dict[int, ModeInForce]
    """Live switches: version whose line is written when it is asked for → mode."""
    evaluate_every: int
    checkpoint_every: int
    num_generators: int
    training_s: float
    seed: int
    weights: tuple[float, float] | None = None
    """Of even and odd rows, which are the sources; None: an epoch shows every row once."""

    @property
    def keeps_order(self) -> bool:
        """Whether what a batch is made of follows from the plan alone: no group overtakes another, and the filter's budget does not
        depend on how far generation has run ahead."""
        is_ever_off = any(mode.mode == "off_policy" for mode in (*self.switches.values(), *_modes(self.policy)))
        return not is_ever_off or (self.policy.look_ahead == 1 and not self.flat and not self.failing)


def _modes(policy: Policy) -> list[ModeInForce]:
    return [mode_in_force(policy, progress / 100) for progress in range(101)]


@st.composite
def modes(draw: st.DrawFn) -> ModeInForce:
    """On-policy, or off-policy with a bound of 0 to 3."""
    bound = draw(st.integers(-1, 3))
    return ModeInForce("on_policy", 0) if bound < 0 else ModeInForce("off_policy", bound)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Small runs of every kind."""
    size = draw(st.integers(1, 4))
    first, second = draw(modes()), draw(modes())
    has_schedule = draw(st.booleans())
    has_filter = draw(st.booleans())
    steps = draw(st.one_of(st.none(), st.integers(2, 8)))
    num_rows = draw(st.integers(1, 24))
    rows = st.integers(0, num_rows - 1)
    policy = Policy(
        mode=first.mode,
        max_staleness=None if has_schedule else first.max_staleness,
        look_ahead=draw(st.sampled_from([1, 1, None])),
        rollout_batch=size,
        update_batch=draw(st.sampled_from([None, *(n for n in (1, 2) if size % n == 0)])),
        group_size=2,
        filter="zero_variance" if has_filter else "none",
        max_oversample=draw(st.sampled_from([1.0, 1.5, 3.0])),
        schedule=[
            SchedulePhase(until=0.5, mode=first.mode, max_staleness=first.max_staleness),
            SchedulePhase(mode=second.mode, max_staleness=second.max_staleness),
        ] if has_schedule else [],
        lease_s=LEASE_S,
    )  # fmt: skip
    return Plan(
        policy,
        steps,
        None if steps is not None else draw(st.integers(1, 2)),
        num_rows,
        draw(st.frozensets(rows, max_size=num_rows // 2)) if has_filter else frozenset(),
        draw(st.frozensets(rows, max_size=1)) if num_rows > 8 and draw(st.booleans()) else frozenset(),
        draw(st.frozensets(st.integers(0, NUM_HELD_OUT - 1), max_size=2)),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.004])),
        draw(st.dictionaries(st.integers(1, 5), modes(), max_size=2)),
        draw(st.sampled_from([0, 0, 2])),
        draw(st.sampled_from([0, 1, 2, 3])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0.0, 0.003])),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from([(1.0, 1.0), (3.0, 1.0), (0.2, 0.5)])) if num_rows > 1 and draw(st.booleans()) else None,
    )


class PlannedStage(Stage):
    """A stage on which a plan is played, over any number of starts."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        super().__init__(
            folder, plan.policy, steps=plan.steps, epochs=plan.epochs, num_rows=plan.num_rows, num_generators=plan.num_generators,
            restarts=1000, training_s=plan.training_s, seed=plan.seed, checkpoint_every=plan.checkpoint_every,
            evaluate_every=plan.evaluate_every,
        )  # fmt: skip
        self.config = replace(self.config, evaluation=replace(self.config.evaluation, after=True))
        if plan.weights is not None:
            mixture = Mixture(weights=dict(zip(("even", "odd"), plan.weights, strict=True)))
            self.config = replace(self.config, data=replace(self.config.data, mixture=mixture))
        self.saving_s = plan.saving_s
        self.plan = plan
        self.recorder = PlannedRecorder(self)
        self.bounds: dict[int, set[int]] = {}
        """Group → the bound in force when it was admitted; several where a smaller batch may have left it to be admitted again: at the
        next start under bound 0, or later under the one in force."""
        self.reopened: set[int] = set()
        """Groups that were open at a resume, once the batch has been changed."""
        self.rows: dict[int, int] = {}
        """Group → row."""
        self.num_cut = 0
        """Leases to come that a broken connection costs."""
        self.num_late = 0
        """Leases to come that take longer than they may."""
        self.cut = lambda lease: self._cut()

    def _cut(self) -> Any:
        self.num_cut, is_cut = max(self.num_cut - 1, 0), self.num_cut > 0
        return ("mid-group" if self.random.random() < 0.5 else "mid-ack") if is_cut else None

    async def open(self) -> Controller:
        """Notes what is in force when a group is leased for the first time, which is when it is admitted. (A switch may come before the
        generator hears of it.)"""
        controller = await super().open()
        lease = controller.groups.lease

        def noted(group_id: int, deadline: float) -> int:
            if group_id not in self.bounds or group_id in self.reopened:
                is_again = group_id in self.reopened
                self.bounds.setdefault(group_id, set()).update(
                    {controller.in_force.max_staleness, *([0] if is_again else [])}
                )
                self.reopened.discard(group_id)
            return lease(group_id, deadline)

        controller.groups.lease = noted
        return controller

    def generation_s(self, lease: Lease) -> float:
        if lease.purpose == "train":
            self.rows[lease.group_id] = lease.sample.row
        if self.num_late and lease.purpose == "train":
            self.num_late -= 1
            return LEASE_S + 5.0
        return self.random.random() * 0.004

    def rewards(self, lease: Lease) -> list[float]:
        if lease.purpose == "train" and lease.sample.row in self.plan.failing:
            raise ActorError("generate", "builtins.ValueError", f"row {lease.sample.row} cannot be read", "")
        if lease.purpose == "evaluate" and lease.sample.row in self.plan.unreadable:
            raise ActorError("generate", "builtins.ValueError", f"held-out row {lease.sample.row} cannot be read", "")
        is_flat = lease.purpose == "train" and lease.sample.row in self.plan.flat
        return [1.0] * lease.num_completions if is_flat else [float(i % 2) for i in range(lease.num_completions)]

    def roll_back(self, version: int, next_id: int) -> None:
        """What happened after the checkpoint of `version` did not."""
        self.orders = [order for order in self.orders if order.version < version]
        kept = {group_id for order in self.orders for group_id in order.group_ids}
        self.consumed = {group_id: staleness for group_id, staleness in self.consumed.items() if group_id in kept}
        self.records = [record for record in self.records if record.version <= version]
        self.bounds = {group_id: bounds for group_id, bounds in self.bounds.items() if group_id < next_id}
        self.rows = {group_id: row for group_id, row in self.rows.items() if group_id < next_id}
        self.delivered.clear()


class PlannedRecorder(FakeRecorder):
    """Asks for the plan's live switches when their line is written."""

    stage: PlannedStage

    async def record_step(self, record: StepRecord) -> dict[str, float]:
        wanted = self.stage.plan.switches.get(record.version)
        if wanted is not None:
            self.stage.controller.switch(wanted)
        return await super().record_step(record)


def left_alone(plan: Plan, folder: Path) -> PlannedStage:
    """The plan without interruptions."""
    with virtual_time() as loop:
        stage = PlannedStage(folder, plan)
        loop.run_until_complete(asyncio.wait_for(_begin_and_end(stage), END_S))
    return stage


async def _begin_and_end(stage: PlannedStage) -> None:
    controller = await stage.open()
    await controller.run()
    controller.groups.audit()


class WholeRun(RuleBasedStateMachine):
    """One plan and what befalls it."""

    @initialize(plan=plans())
    def begin(self, plan: Plan) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="whole-run-", dir=_memory()))
        self.plan = plan
        self.twin = left_alone(plan, self.folder / "alone")
        self.stage = PlannedStage(self.folder / "interrupted", plan)
        if plan.stops_at_alarms:
            alarms = Alarms(
                empty_batches=EmptyBatches(versions=1, action="stop"), lost_share=LostShare(share=0.0, action="stop")
            )
            self.stage.config = replace(self.stage.config, alarms=alarms)
        self.is_comparable = True
        self._was_weighed = False
        self.num_resumes = 0
        self.is_ended_early = False
        """Its length was cut down to what it had behind it."""
        self._time = virtual_time()
        self.loop: VirtualTime = self._time.__enter__()
        self._start(None, keeps_switch=True)

    # What may befall it.

    @rule(milliseconds=st.integers(1, 12))
    def time_passes(self, milliseconds: int) -> None:
        self._pass(milliseconds / 1000)

    @rule(num_versions=st.integers(1, 3))
    def versions_are_made(self, num_versions: int) -> None:
        target = self.controller.groups.version + num_versions
        seconds = 0.001
        while not self.running.done() and self.controller.groups.version < target:
            self._pass(seconds)
            # A version that waits for an overdue lease takes 20 s: thousands of looks would show nothing else.
            seconds *= 1.1

    @precondition(lambda self: not self.running.done())
    @rule(rank=st.integers(0, 2))
    def a_generator_dies(self, rank: int) -> None:
        alive = [generator for generator in self.stage.generators if not generator.is_dead]
        if alive:
            alive[rank % len(alive)].is_dead = True

    @precondition(lambda self: self.plan.weights is not None and not self.running.done())
    @rule(weight=st.sampled_from([0.0, 0.1, 2.0]))
    def a_source_is_weighed_anew(self, weight: float) -> None:
        self.controller.weigh("odd", weight)
        self.is_comparable, self._was_weighed = False, True

    @rule(number=st.integers(1, 2))
    def connections_break(self, number: int) -> None:
        self.stage.num_cut += number

    @rule()
    def a_lease_is_late(self) -> None:
        self.stage.num_late += 1

    @precondition(lambda self: not self.running.done())
    @rule()
    def a_checkpoint_is_asked_for(self) -> None:
        self.controller.request_checkpoint()

    @rule(num_generators=st.integers(1, 3), training_s=st.sampled_from([0.0, 0.003]), every=st.sampled_from([0, 1, 2]))
    def it_is_stopped_and_resumed_on_another_machine(self, num_generators: int, training_s: float, every: int) -> None:
        self._stop()
        self._resume(num_generators, training_s, every)

    @rule(num_generators=st.integers(1, 3), training_s=st.sampled_from([0.0, 0.003]))
    def it_is_killed_and_resumed(self, num_generators: int, training_s: float) -> None:
        self._kill()
        self._resume(num_generators, training_s, self.plan.checkpoint_every)

    @rule(size=st.integers(1, 4), mode=modes())
    def it_is_stopped_and_resumed_with_another_batch_and_mode(self, size: int, mode: ModeInForce) -> None:
        self._stop()
        policy = replace(
            self.stage.config.policy, rollout_batch=size, update_batch=None, mode=mode.mode,
            max_staleness=mode.max_staleness, look_ahead=None, schedule=[],
        )  # fmt: skip
        self.is_comparable = False
        self.stage.config = replace(self.stage.config, policy=policy)
        self._resume(self.plan.num_generators, self.plan.training_s, self.plan.checkpoint_every, keeps_switch=False)

    @rule(
        steps=st.integers(-2, 4), epochs=st.integers(1, 3), is_by_steps=st.booleans(), has_filter=st.booleans(),
        update_batch=st.sampled_from([None, 1, 2]), size=st.integers(1, 4), group_size=st.integers(2, 4),
        oversample=st.sampled_from([1.0, 2.0]),
    )  # fmt: skip
    def it_is_stopped_and_resumed_with_another_length_and_other_groups(
        self, steps: int, epochs: int, is_by_steps: bool, has_filter: bool, update_batch: int | None, size: int, group_size: int,
        oversample: float,
    ) -> None:  # fmt: skip
        self._stop()
        version = self.controller.groups.version
        config = self.stage.config
        length = (
            {"steps": max(version + steps, 1), "epochs": None} if is_by_steps else {"steps": None, "epochs": epochs}
        )
        policy = replace(
            config.policy, filter="zero_variance" if has_filter else "none", max_oversample=oversample, group_size=group_size,
            rollout_batch=size * (update_batch or 1), update_batch=update_batch, look_ahead=None,
        )  # fmt: skip
        self.is_comparable = False
        self.stage.config = replace(config, policy=policy, run=replace(config.run, **length))
        self._resume(self.plan.num_generators, self.plan.training_s, self.plan.checkpoint_every)

    @rule(mode=modes())
    def it_is_switched_and_stopped_at_once_and_resumed(self, mode: ModeInForce) -> None:
        if not self.running.done():
            self.controller.switch(mode)
        self.is_comparable = False
        self._stop()
        requested = self.controller._requested
        self._resume(self.plan.num_generators, self.plan.training_s, self.plan.checkpoint_every)
        assert self.controller._requested == requested

    @rule(place=st.integers(0, 2))
    def it_is_killed_and_taken_back(self, place: int) -> None:
        self._kill()
        steps = all_steps(self.stage.folder / "checkpoints")
        self._resume(
            self.plan.num_generators, self.plan.training_s, self.plan.checkpoint_every,
            checkpoint=steps[place % len(steps)] if steps else None,
        )  # fmt: skip

    # The end.

    def teardown(self) -> None:
        if not hasattr(self, "_time"):
            return
        try:
            if sys.exc_info()[0] is None:
                self._finish()
        finally:
            self._time.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    def _finish(self) -> None:
        self.loop.run_until_complete(asyncio.wait([self.running], timeout=END_S))
        assert self.running.done(), f"it has not ended: {self.controller.status()}"
        self.running.result()
        num_alarms = 0
        while self.controller.bell.stopped_by is not None and not self.controller._has_ended:
            num_alarms += 1
            assert num_alarms < MAX_ALARMS, f"the same alarm stops it for ever: {self.controller.status()}"
            if not self._resume(self.plan.num_generators, self.plan.training_s, self.plan.checkpoint_every):
                break
            self._pass(END_S)
            assert self.running.done(), f"it has not ended: {self.controller.status()}"
        self.controller.groups.audit()
        self._check_accounts()
        check_lines(self.stage, is_ended_early=self.is_ended_early)
        has_lost_more = self._num_lost(self.stage) > self._num_lost(self.twin)
        if self.is_comparable and not has_lost_more:
            compare(self.twin, self.stage)

    @property
    def _share_of_even(self) -> float:
        """As the mixture takes it, in thousandths."""
        assert self.plan.weights is not None
        return round(1000 * self.plan.weights[0] / sum(self.plan.weights)) / 1000

    def _num_lost(self, stage: PlannedStage) -> int:
        """A group that is late or cut off too often is lost for good, and another takes its place."""
        return stage.controller.groups.counts()["lost"]

    def _check_accounts(self) -> None:
        """Every draw has an end; over epochs every row was drawn as often as there are epochs, unless these were cut down."""
        counts = self.controller.groups.counts()
        assert counts["consumed"] == len(self.stage.consumed), counts
        assert counts["consumed"] == sum(len(order.group_ids) for order in self.stage.orders)
        epochs = self.stage.config.run.epochs
        if epochs is not None and not self.is_ended_early:
            assert counts["admitted"] + counts["leased"] + counts["scored"] == 0, counts
            num_drawn = self.controller.leasing.cursor.num_drawn
            assert sorted(self.stage.rows) == list(range(num_drawn))
            assert num_drawn == epochs * self.plan.num_rows or (
                num_drawn > epochs * self.plan.num_rows and not self.is_comparable
            )
        if self.plan.weights is not None:
            even = sum(1 for row in self.stage.rows.values() if row % 2 == 0)
            assert self._was_weighed or abs(even - len(self.stage.rows) * self._share_of_even) <= 1
            return
        order = ShuffledRows(self.plan.num_rows, self.stage.config.run.seed)
        for group_id, row in self.stage.rows.items():
            epoch, place = divmod(group_id, self.plan.num_rows)
            assert row == int(order.order(epoch)[place]), f"group {group_id} is row {row}"

    # How it is started and ended.

    def _start(self, checkpoint: Path | None, keeps_switch: bool) -> None:
        self.controller: Controller = self.loop.run_until_complete(self.stage.open())
        if checkpoint is not None:
            self.loop.run_until_complete(self.controller.resume(checkpoint, keeps_switch=keeps_switch))
            self.controller.bell.recall({**record.metrics, "version": record.version} for record in self.stage.records)
        self.running = self.loop.create_task(self.controller.run())

    def _pass(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.wait([self.running], timeout=seconds))
        if self.running.done():
            self.running.result()

    def _stop(self) -> None:
        self.controller.stop()
        self._pass(END_S)
        assert self.running.done(), f"a stop did not end it: {self.controller.status()}"

    def _kill(self) -> None:
        cancel_all(self.loop)

    def _resume(
        self, num_generators: int, training_s: float, checkpoint_every: int, *, keeps_switch: bool = True,
        checkpoint: Path | None = None,
    ) -> bool:  # fmt: skip
        """False where it has nothing left to do."""
        stage = self.stage
        stage._fleet_size, stage.training_s = num_generators, training_s
        stage.config = replace(stage.config, checkpoint=replace(stage.config.checkpoint, every=checkpoint_every))
        stage.num_cut = stage.num_late = 0
        checkpoint = checkpoint or latest_complete(stage.folder / "checkpoints")
        if checkpoint is not None and read_state(checkpoint).is_end_of(stage.config):
            self.is_ended_early |= not read_state(checkpoint).has_ended
            return False
        if checkpoint is not None:
            take_back(stage.folder, step_of(checkpoint))
        if checkpoint is None:
            shutil.rmtree(stage.folder, ignore_errors=True)
            stage.roll_back(0, 0)
            stage.records.clear()
        else:
            state = read_state(checkpoint)
            stage.roll_back(state.version, state.ledger.next_id)
        stage.reopened = set() if self.is_comparable else set(stage.bounds) - set(stage.consumed)
        self.num_resumes += 1
        self.is_ended_early = False
        self._start(checkpoint, keeps_switch=keeps_switch)
        return True


def check_lines(stage: PlannedStage, *, is_ended_early: bool) -> None:
    """Every line is true of the batch that was trained on."""
    lines = [record for record in stage.records if record.order is not None]
    assert [record.version for record in lines] == list(range(1, len(lines) + 1))
    assert [record.order for record in lines] == stage.orders, "a line speaks of another batch than was trained on"
    progress = [record.metrics["progress"] for record in lines]
    assert progress == sorted(progress)
    for record, order in zip(lines, stage.orders, strict=True):
        _check_line(stage, record, order)
    if lines and not is_ended_early:
        assert progress[-1] == 1.0, progress
        assert "eval/greedy/num_rows" in lines[-1].metrics, "the last version is not evaluated"
    for record in stage.records:
        if "eval/greedy/num_rows" in record.metrics:
            assert record.metrics["eval/greedy/num_rows"] == NUM_HELD_OUT - record.metrics["eval/greedy/num_lost"]
            assert record.metrics["eval/greedy/num_lost"] >= len(stage.plan.unreadable)


def _check_line(stage: PlannedStage, record: StepRecord, order: TrainOrder) -> None:
    metrics, bounds = record.metrics, [stage.bounds[group_id] for group_id in order.group_ids]
    assert metrics["policy/is_off_policy"] == (order.mode == "off_policy")
    assert metrics["policy/max_staleness"] == order.max_staleness
    assert metrics["policy/is_corrected"] == (order.correction != "none")
    assert metrics["batch/groups"] == len(bounds)
    assert max(map(min, bounds), default=0) <= order.max_staleness <= max(map(max, bounds), default=0)
    assert order.max_staleness in set().union(*bounds) or not bounds
    is_plain = order.max_staleness == 0 and len(order.updates) <= 1
    assert order.correction == ("none" if is_plain else "decoupled")
    assert order.mode == "off_policy" or len(order.updates) <= 1
    assert all(stage.consumed[group_id] <= max(stage.bounds[group_id]) for group_id in order.group_ids)
    assert len(order.progress) == len(order.updates) + 1
    assert order.progress == sorted(order.progress)
    assert order.progress[-1] <= metrics["progress"]


def compare(alone: PlannedStage, interrupted: PlannedStage) -> None:
    """Version by version, in what does not depend on which generator was fast."""
    plan = alone.plan
    is_timed = plan.epochs is not None and not plan.keeps_order
    if not is_timed:
        assert len(interrupted.orders) == len(alone.orders)
    for ours, theirs in zip(interrupted.orders, alone.orders, strict=not is_timed):
        if not is_timed:
            assert _stand(ours) == _stand(theirs), ours.version
        if plan.keeps_order:
            assert ours.progress == theirs.progress
            assert [[interrupted.rows[g] for g in update] for update in ours.updates] == [
                [alone.rows[g] for g in update] for update in theirs.updates
            ]
        if plan.keeps_order and not plan.switches and not plan.policy.schedule:
            assert ours.correction == theirs.correction


def _stand(order: TrainOrder) -> tuple[str, int, float]:
    return order.mode, order.bound, order.progress[0]


def _memory() -> str | None:
    """Checkpoints are synced to disk; in memory that costs nothing."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def check(
    num_sequences: int, seed: int = 0, *, num_rules: int = 12, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)
) -> None:
    """Run that many sequences of up to `num_rules` rules, the same ones for a seed. Raises what the first broken promise raises,
    shrunk, with its steps."""
    run_state_machine_as_test(
        seeded(seed)(WholeRun),
        settings=settings(
            max_examples=num_sequences, stateful_step_count=num_rules, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), phases=phases, report_multiple_bugs=False,
        ),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: all promises kept; else the first broken one is raised, with the steps that lead to it."""
    about = "Interrupted runs against the same run left alone."
    parser = argparse.ArgumentParser(prog="python -m tests.run.whole_run", description=about)
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(heading(describe()))
    logging.disable(logging.CRITICAL)
    started = time.perf_counter()
    check(options.sequences, options.seed)
    print(f"{options.sequences} sequences in {time.perf_counter() - started:.0f} s, every promise kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
