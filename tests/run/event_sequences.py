"""Random event sequences against the window's and the ledger's promises: `python -m tests.run.event_sequences --sequences 100000`.

Each sequence is a small run: a random batch, bound, look-ahead and oversampling; then random admissions, reports, duplicates, lost
leases, losses for good, filtered groups, cuts, publishes, mode switches and resumes from a snapshot, some with another batch and
other limits, with one group slower than all others; then the run is driven to its end. Checked after every event: capacity, and that
the window and the ledger know the same groups; at every cut: each group was scored, is consumed for the first time, and within the
bound it was admitted under, and the batch, with the groups that were filtered for it, cost no more than the oversampling allows; at
the end: nothing is stuck, and every admitted group has ended exactly once. Plain Python random numbers, so that a sequence costs a
fraction of a millisecond and is repeated by its seed; `test_window` holds the same machine for hypothesis, which shrinks.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec

from bench.machine import describe, heading, write_json
from vtriune.config.tree import Mode
from vtriune.messages import SampleRef
from vtriune.run.ledger import Ledger, LedgerState
from vtriune.run.window import Window, WindowLimits, derive_limits

SAMPLE = SampleRef("soak", 0)
MAX_EVENTS = 60


class PromiseBroken(AssertionError):
    """The message names the sequence's seed: `python -m tests.run.event_sequences --sequences 1 --seed SEED` repeats it."""


class Sequence:
    """One random run, repeated exactly by its seed."""

    def __init__(self, seed: int, counts: Counter[str]) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.counts = counts
        self.rollout_batch = self.random.randint(1, 6)
        oversample = self.random.choice([1.0, 1.5, 2.0, 3.0])
        self.limits = self._draw_limits()
        self.window = Window(self.limits, self.rollout_batch, max_oversample=oversample)
        self.ledger = Ledger(self.random.randint(1, 3), self.random.randint(1, 3))
        self.has_filter = self.random.random() < 0.5
        self.bounds: dict[int, tuple[int, int]] = {}
        """group → (version it was admitted at, or came back at, bound)"""
        self.open: dict[int, None] = {}
        """Not ended, in the order of admission."""
        self.running: list[int] = []
        """Admitted, not yet reported."""
        self.scored: set[int] = set()
        self.ended: dict[int, str] = {}
        self.batch: list[int] | None = None
        self.slowest: int | None = None
        self.num_charged = 0
        """Filtered groups that earlier batches paid for."""

    def run(self) -> None:
        """Random events, then to the end. Raises PromiseBroken."""
        events = (
            self.admit, self.report, self.report, self.report, self.cut, self.cut, self.publish, self.publish,
            self.lose, self.duplicate, self.switch, self.resume,
        )  # fmt: skip
        for _ in range(self.random.randint(5, MAX_EVENTS)):
            self.random.choice(events)()
            self.check()
        self.finish()

    # Events. One that is not possible now does nothing.

    def admit(self) -> None:
        for _ in range(self.random.randint(1, self.window.capacity)):
            if not self.window.can_admit():
                break
            bound = self.window.limits.max_staleness
            if self.window.without_slot:
                group = self.ledger.get(self.window.without_slot[0])
                group.max_staleness = bound
                self.counts["admitted again"] += 1
            else:
                group = self.ledger.admit(SAMPLE, "soak", bound)
                self.counts["admitted"] += 1
            self.window.admit(group.group_id)
            self.bounds[group.group_id] = (self.window.version, bound)
            self.ledger.lease(group.group_id, 1.0)
            self.running.append(group.group_id)
            self.open[group.group_id] = None
            if self.slowest is None:
                self.slowest = group.group_id

    def report(self) -> None:
        """Some group is scored, or filtered; the slowest only when no other runs."""
        candidates = [group_id for group_id in self.running if group_id != self.slowest] or self.running
        if candidates:
            self._report(self.random.choice(candidates))

    def cut(self) -> None:
        if self.batch is not None:
            return
        num_filtered = next(iter(self.window.filtered), 0)
        self.batch = self.window.cut()
        if self.batch is not None:
            cost, allowed = len(self.batch) + num_filtered, round(self.window.max_oversample * self.rollout_batch, 6)
            self._expect(cost <= allowed, f"{cost} groups were generated for a batch that may cost {allowed}")
            self.num_charged += num_filtered
        for group_id in self.batch or ():
            admitted_at, bound = self.bounds[group_id]
            staleness = self.window.version - admitted_at
            self._expect(
                staleness <= bound, f"group {group_id} is consumed at staleness {staleness}, its bound is {bound}"
            )
            self._expect(group_id in self.scored, f"group {group_id} is consumed without a verdict")
            self._expect(group_id in self.open, f"group {group_id} is consumed after it was {self.ended.get(group_id)}")
            self._end(group_id, "consumed")
            self.counts[f"staleness {staleness}"] += 1
            if group_id == self.slowest:
                self.slowest = None
                self.counts["slowest group consumed"] += 1
        if self.batch is not None:
            self.ledger.consume(self.batch)
            self.counts["batches"] += 1
            self.counts["short batches"] += len(self.batch) < self.rollout_batch

    def publish(self) -> None:
        if self.batch is not None:
            self._expect(self.window.publish() == self.batch, "another batch was published than trained on")
            self.batch = None
            self.counts["publishes"] += 1

    def lose(self) -> None:
        """A lease is lost: issued again, or the group lost for good when its attempts are used up."""
        if not self.running:
            return
        group_id = self.random.choice(self.running)
        group = self.ledger.get(group_id)
        self._expect(not self.ledger.lose_lease(group_id, group.attempt - 1, "late"), "an outdated loss counted")
        is_death = self.random.random() < 0.5
        if not self.ledger.lose_lease(group_id, group.attempt, "died", is_death=is_death):
            first = self.ledger.first_to_lease()
            self._expect(
                first is not None and first.group_id == group_id, "the lost lease is not the next to be issued"
            )
            self.ledger.lease(group_id, 2.0)
            self.counts["leases lost"] += 1
            return
        self._drop(group_id, is_filtered=False)
        self.counts["groups lost"] += 1

    def duplicate(self) -> None:
        """A report of a group that has been reported already."""
        known = [group_id for group_id in self.scored if group_id not in self.ended] or list(self.ended)
        if known:
            self._expect(not self.ledger.report(self.random.choice(known), 0), "a duplicate was taken for news")
            self.counts["duplicates"] += 1

    def switch(self) -> None:
        if self.batch is None:
            self.limits = self._draw_limits()
            self.window.switch(self.limits)
            self.counts["switches"] += 1

    def resume(self) -> None:
        """From a snapshot between two versions: open groups come back unscored, in their slots as far as a smaller batch has them."""
        if self.batch is not None or self.random.random() < 0.7:
            return
        state = msgspec.json.decode(msgspec.json.encode(self.ledger.state()), type=LedgerState)
        self.ledger = Ledger(self.ledger.max_failures, self.ledger.max_deaths)
        self.ledger.restore(state)
        is_changed = self.random.random() < 0.3
        if is_changed:
            self.rollout_batch = self.random.randint(1, 6)
            self.limits = self._draw_limits()
        before = self.window
        self.window = Window(self.limits, self.rollout_batch, max_oversample=before.max_oversample)
        self.window.restore(before.version, self.ledger.bounds(), before.filtered)
        self._expect(
            is_changed or before.without_slot or self.window.num_active == before.num_active,
            "a resume changed the number of active groups",
        )
        num_excused = sum(before.filtered) - sum(self.window.filtered)
        self._expect(is_changed or not num_excused, "a resume forgot filtered groups")
        self.num_charged += num_excused
        self.running = list(self.ledger.bounds())[: self.window.num_waiting]
        self.scored.clear()
        for group_id in self.window.without_slot:
            self.ledger.get(group_id).max_staleness = 0
        for group_id in self.running:
            self.ledger.lease(group_id, 3.0)
            self.bounds[group_id] = (self.window.version, self.ledger.get(group_id).max_staleness)
        self.counts["resumes with another batch"] += is_changed
        self.counts["resumes"] += 1

    # Checks.

    def check(self) -> None:
        """Between events."""
        num_waiting = len(self.open) - len(self.window.without_slot)
        self._expect(self.window.num_waiting == num_waiting, "the window and the record differ on what waits")
        self._expect(self.window.num_active == num_waiting + len(self.batch or ()), "slots are not what is active")
        self._expect(list(self.ledger.bounds()) == list(self.open), "the ledger and the record differ on what is open")
        num_filtered = sum(end == "filtered" for end in self.ended.values())
        self._expect(
            self.num_charged + sum(self.window.filtered) == num_filtered,
            "a filtered group counts for no batch, or for two",
        )

    def finish(self) -> None:
        """Drive on: as long as anything is possible it happens, and in the end nothing is open."""
        self.slowest = None
        target = self.window.version + 4
        is_closed_early = self.random.random() < 0.3
        if is_closed_early:
            self.window.close()
        while self.window.version < target and not self.window.is_exhausted:
            self.publish()
            self.admit()
            self.cut()
            if self.batch is None and not self.window.can_admit():
                self._expect(
                    bool(self.running), "deadlock: nothing is running, nothing can be admitted, no batch can be cut"
                )
            if self.running and self.batch is None:
                self._report(self.running[0])
            self.check()
        self.publish()
        self.window.close()
        while not self.window.is_exhausted:
            self.admit()
            while self.running:
                self._report(self.running[0])
            if not self.window.is_exhausted:
                self.cut()
                self._expect(
                    self.batch is not None or self.window.can_admit(),
                    "deadlock: everything is scored, and no batch can be cut",
                )
                self.publish()
        self.ledger.audit()
        counts = self.ledger.counts()
        self._expect(counts["admitted"] + counts["leased"] + counts["scored"] == 0, f"groups are left open: {counts}")
        ends = Counter(self.ended.values())
        self._expect(
            all(counts[end] == ends[end] for end in ("consumed", "filtered", "lost")), f"{counts} are not {ends}"
        )
        self._expect(len(self.ended) == len(self.bounds), "an admitted group has no end")

    # Parts.

    def _draw_limits(self) -> WindowLimits:
        mode: Mode = self.random.choice(["on_policy", "off_policy", "off_policy", "off_policy"])
        bound = self.random.randint(0, 5)
        look_ahead = self.random.choice([None, self.random.randint(1, bound * self.rollout_batch + 1)])
        return derive_limits(mode, bound, look_ahead, self.rollout_batch)

    def _report(self, group_id: int) -> None:
        self.running.remove(group_id)
        attempt = self.random.randint(0, self.ledger.get(group_id).attempt)
        is_news = self.ledger.report(group_id, attempt)
        self._expect(is_news, "a first report was taken for a duplicate")
        self._expect(
            self.ledger.attempts([group_id]) == {group_id: attempt}, "another attempt counts than was reported"
        )
        if self.has_filter and self.random.random() < 0.4:
            self.ledger.filter(group_id)
            self.window.drop(group_id)
            self._end(group_id, "filtered")
            self.counts["filtered"] += 1
            if group_id == self.slowest:
                self.slowest = None
        else:
            self.window.mark_scored(group_id)
            self.scored.add(group_id)
            self.counts["scored"] += 1

    def _end(self, group_id: int, end: str) -> None:
        self.ended[group_id] = end
        del self.open[group_id]

    def _drop(self, group_id: int, *, is_filtered: bool) -> None:
        active = self.window.num_active
        self.running.remove(group_id)
        self.window.drop(group_id, is_filtered=is_filtered)
        self._expect(self.window.num_active == active - 1, "a dropped group's slot was not repaid")
        self._end(group_id, "lost")
        if group_id == self.slowest:
            self.slowest = None

    def _expect(self, is_kept: bool, what: str) -> None:
        if not is_kept:
            raise PromiseBroken(
                f"sequence {self.seed}: {what}; P {self.rollout_batch}, {self.limits}, version {self.window.version}, "
                f"{self.window.num_active} of {self.window.capacity} active, {len(self.running)} running"
            )


def soak(num_sequences: int, seed: int = 0) -> Counter[str]:
    """Run the sequences `seed`, `seed + 1`, …; counts of what happened in them. Raises PromiseBroken at the first that fails."""
    counts: Counter[str] = Counter()
    for number in range(seed, seed + num_sequences):
        Sequence(number, counts).run()
        counts["sequences"] += 1
    return counts


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: all promises kept; 1: the first broken one is printed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.run.event_sequences", description="Random event sequences against the window."
    )
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts there")
    options = parser.parse_args(arguments)
    head, started = describe(), time.perf_counter()
    print(heading(head))
    try:
        counts = soak(options.sequences, options.seed)
    except PromiseBroken as broken:
        print(f"BROKEN: {broken}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    print(f"{options.sequences} sequences in {seconds:.0f} s, every promise kept:")
    for name, count in sorted(counts.items()):
        print(f"  {name:<24}{count:>12,}")
    write_json(options.json, head, {"seconds": seconds, "counts": dict(counts)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
