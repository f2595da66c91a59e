"""A run as discrete events on a virtual clock: the product's own `Groups`, engines as `Decoder`s, no processes.

What it shares with a real run is what decides throughput: admission, look-ahead, leases to the engine with the most room, oldest
group first, a publish that pauses everyone. What it leaves out is the control plane's own time. Used by `vtriune.plan` and
the tests.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from vtriune.messages import SampleRef
from vtriune.plan.schedule import Schedule, ScheduleResult
from vtriune.plan.simulated_device import Decoder, Finished, SimulatedCompletion
from vtriune.run.groups import Groups

SOURCE = "modelled"


class Stuck(RuntimeError):
    """No event is left, and the run is not over: the rules would deadlock."""


@dataclass(slots=True)
class LeasedGroup:
    """A leased group."""

    engine: int
    num_left: int
    oldest_version: int = 1 << 30


@dataclass
class Simulation:
    """One run of `schedule`. `run` may be called once."""

    schedule: Schedule
    groups: Groups = field(init=False)
    now_s: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter)
    """Number of groups by staleness of their oldest token at consumption."""

    def __post_init__(self) -> None:
        schedule = self.schedule
        self.groups = Groups(schedule.limits, schedule.rollout_batch)
        self._engines = [Decoder(schedule.costs, schedule.max_sequences) for _ in range(schedule.num_engines)]
        self._num_leased = [0] * schedule.num_engines
        self._by_load = [(0, rank) for rank in range(schedule.num_engines)]
        self._groups: dict[int, LeasedGroup] = {}
        self._oldest: dict[int, int] = {}
        self._num_scored = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._wakes = [float("inf")] * schedule.num_engines
        self._published_at: list[float] = [0.0]
        self._generated_at: list[float] = []
        self._last_scored_s = 0.0
        self._figures: list[tuple[float, float, float, int]] = []

    def run(self) -> ScheduleResult:
        """Until `num_versions` are published. Raises Stuck."""
        self._lease()
        while self.groups.version < self.schedule.num_versions:
            if not self._events:
                raise Stuck(f"version {self.groups.version}: {self.groups.slots()['active']} groups wait for nothing")
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        self.groups.audit()
        return self._outcome()

    # Events.

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), act))

    def _wake(self, rank: int) -> None:
        """Have the engine looked at when its next sequence ends. An earlier wake-up that is no longer due does nothing."""
        due_s = self._engines[rank].next_end_s()
        self._wakes[rank] = due_s
        if due_s < float("inf"):
            self._at(due_s, lambda: self._look_at(rank, due_s))

    def _look_at(self, rank: int, due_s: float) -> None:
        if self._wakes[rank] == due_s:
            self._collect(self._engines[rank].advance(self.now_s))
            self._wake(rank)

    def _collect(self, finished: list[Finished]) -> None:
        for item in finished:
            group_id = item.completion.group_id
            group = self._groups[group_id]
            group.num_left -= 1
            group.oldest_version = min(group.oldest_version, item.spans[0][0])
            if not group.num_left:
                self._at(self.now_s + self.schedule.costs.verify_s, lambda g=group_id: self._report(g))  # type: ignore[misc]

    def _report(self, group_id: int) -> None:
        group = self._groups.pop(group_id)
        self._load(group.engine, -self.schedule.group_size)
        self.groups.report(group_id, 0, is_filtered=False)
        self._oldest[group_id] = group.oldest_version
        self._num_scored += 1
        self._last_scored_s = self.now_s
        self._lease()
        self._try_to_train()

    def _try_to_train(self) -> None:
        is_over = self.groups.version == self.schedule.num_versions
        if is_over or self._num_scored < self.schedule.rollout_batch or self.groups.is_training:
            return
        batch = self.groups.cut()
        if batch is None:
            return
        self._num_scored -= len(batch)
        self._generated_at.append(self._last_scored_s)
        for group_id in batch:
            staleness = self.groups.version - self._oldest.pop(group_id)
            if staleness > self.groups.bound([group_id]):
                raise AssertionError(f"group {group_id}: staleness {staleness} at version {self.groups.version}")
            self.staleness[staleness] += 1
        self._at(self.now_s + self.schedule.training_s, self._publish)

    def _publish(self) -> None:
        for engine in self._engines:
            self._collect(engine.pause(self.now_s))
        self._at(self.now_s + self.schedule.costs.publish_s, self._resume)

    def _resume(self) -> None:
        self.groups.publish()
        for engine in self._engines:
            engine.resume(self.groups.version, self.now_s)
        self._published_at.append(self.now_s)
        self._note()
        self._lease()
        for rank in range(len(self._engines)):
            self._wake(rank)
        self._try_to_train()

    # Leases: the rule of `vtriune.run.leasing` and `Fleet.pick`, with a heap in place of a scan.

    def _lease(self) -> None:
        size, changed = self.schedule.group_size, set()
        while self.groups.can_admit():
            rank = self._least_loaded()
            if self._num_leased[rank] + size > self.schedule.leased_completions:
                break
            group = self.groups.admit(SampleRef(SOURCE, 0), SOURCE)
            self.groups.lease(group.group_id, float("inf"))
            self._groups[group.group_id] = LeasedGroup(rank, size)
            self._load(rank, size)
            lengths = self.schedule.lengths.draw(self.schedule.seed, group.group_id, size)
            completions = [
                SimulatedCompletion(group.group_id, index, int(length), index == 0)
                for index, length in enumerate(lengths)
            ]
            self._collect(self._engines[rank].submit(completions, self.now_s))
            changed.add(rank)
        for rank in changed:
            self._wake(rank)

    def _load(self, rank: int, change: int) -> None:
        self._num_leased[rank] += change
        heapq.heappush(self._by_load, (self._num_leased[rank], rank))

    def _least_loaded(self) -> int:
        while self._by_load[0][0] != self._num_leased[self._by_load[0][1]]:
            heapq.heappop(self._by_load)
        return self._by_load[0][1]

    # Figures.

    def _note(self) -> None:
        step_s = self.schedule.costs.step_s(self.schedule.max_sequences)
        full_s = sum(engine.steps for engine in self._engines) * step_s
        self._figures.append(
            (
                self.now_s,
                sum(engine.busy_s for engine in self._engines),
                full_s,
                sum(e.num_tokens for e in self._engines),
            )
        )

    def _outcome(self) -> ScheduleResult:
        schedule = self.schedule
        skipped = min(schedule.num_unmeasured, schedule.num_versions - 1)
        first = self._figures[skipped - 1] if skipped else (0.0, 0.0, 0.0, 0)
        last = self._figures[-1]
        elapsed_s = last[0] - first[0]
        num_measured = schedule.num_versions - skipped
        num_groups = sum(self.staleness.values())
        num_tokens = last[3] - first[3]
        slot_s = num_tokens * schedule.costs.step_s(schedule.max_sequences)
        engine_s = elapsed_s * schedule.num_engines
        waits = [
            max(0.0, done - published) for done, published in zip(self._generated_at, self._published_at, strict=False)
        ]
        return ScheduleResult(
            step_s=elapsed_s / num_measured,
            generation_s=sum(waits[skipped:]) / len(waits[skipped:]),
            engines_busy=(last[1] - first[1]) / engine_s,
            engines_full=slot_s / schedule.max_sequences / engine_s,
            learner_busy=num_measured * (schedule.training_s + schedule.costs.publish_s) / elapsed_s,
            mean_staleness=sum(value * count for value, count in self.staleness.items()) / num_groups,
            max_staleness=max(self.staleness),
            num_groups=num_groups,
            num_tokens=num_tokens,
        )


def simulate(schedule: Schedule) -> ScheduleResult:
    """Model one run of `schedule`."""
    return Simulation(schedule).run()
