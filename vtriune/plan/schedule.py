"""A schedule to measure or model, its analytical optimum, and what came of it. Shared by `bench.device_time` and `vtriune.plan`.

The optimum. P groups per version, N engines of M sequences, t(M) the step time of a full engine, E[L] the mean length, G completions a
group, p its prefill, x the publish, T the learner's time for a batch.

- An engine kept full spends e = G·E[L]·t(M)/M + p seconds on a group. In a period τ it decodes for τ − x, so the generators
  allow τ ≥ P·e/N + x.
- The learner trains for T and sends for x: it allows τ ≥ T + x.
- Running ahead (off-policy), both work at the same time: τ* = max(P·e/N, T) + x.

Nothing that keeps the window's rules can be faster than P/τ*: it would need engines fuller than full, or a learner that overlaps
with itself. On-policy has no overlap at all: τ = (time until the last completion of the batch has ended) + T + x.
"""

from typing import Any

import msgspec

from vtriune.config.tree import Mode
from vtriune.plan.simulated_device import Costs, Lengths
from vtriune.run.window import WindowLimits, derive_limits


class Schedule(msgspec.Struct, frozen=True):
    """One setting of the dial, over one fleet."""

    mode: Mode = "off_policy"
    max_staleness: int = 2
    look_ahead: int | None = None
    num_engines: int = 32
    max_sequences: int = 32
    room: int | None = None
    """Completions leased to one engine at most; None: as `vtriune.run.processes` sets it."""
    rollout_batch: int = 128
    group_size: int = 8
    training_s: float = 15.0
    num_versions: int = 10
    num_unmeasured: int = 2
    """Versions before the pipeline is full."""
    seed: int = 0
    lengths: Lengths = Lengths()
    costs: Costs = Costs()

    @property
    def limits(self) -> WindowLimits:
        """S, W and m."""
        return derive_limits(self.mode, self.max_staleness, self.look_ahead, self.rollout_batch)

    @property
    def leased_completions(self) -> int:
        """Room of an engine."""
        return self.room if self.room is not None else 2 * max(self.max_sequences, self.group_size)

    @property
    def generation_s(self) -> float:
        """P·e/N: the time full engines take for a batch."""
        costs, size = self.costs, self.max_sequences
        decode_s = self.group_size * self.lengths.mean * costs.step_s(size) / size
        return self.rollout_batch * (decode_s + costs.prefill_s) / self.num_engines

    @property
    def optimal_step_s(self) -> float:
        """τ*."""
        return max(self.generation_s, self.training_s) + self.costs.publish_s


class ScheduleResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a schedule came to, in seconds of the device."""

    step_s: float
    """Mean time per version over the measured ones."""
    generation_s: float
    """Mean time from a publish until the last group of the next batch had ended; a batch's generation time on-policy."""
    engines_busy: float
    """Share of the measured time in which an engine decodes, mean over engines."""
    engines_full: float
    """Share of the sequence slots in use over the measured time, mean over engines."""
    learner_busy: float
    mean_staleness: float
    max_staleness: int
    num_groups: int
    num_tokens: int

    def samples_per_s(self, schedule: Schedule) -> float:
        """Completions consumed per second."""
        return schedule.rollout_batch * schedule.group_size / self.step_s

    def of_optimum(self, schedule: Schedule) -> float:
        """τ*/τ."""
        return schedule.optimal_step_s / self.step_s

    def row(self, schedule: Schedule) -> dict[str, Any]:
        """Flat figures for a JSON file."""
        return msgspec.structs.asdict(self) | {
            "samples_per_s": self.samples_per_s(schedule),
            "of_optimum": self.of_optimum(schedule),
            "optimal_step_s": schedule.optimal_step_s,
        }
