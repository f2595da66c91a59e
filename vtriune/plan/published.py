"""Published figures of other systems beside what the event model gives for their inputs, where these are public.

- verl, docs/advance/fully_async.md of verl-project/verl: GPUs, batch, cap and seconds of each phase are public, the lengths are not.
- AReaL, arXiv 2505.24298 and blog/AReaL_v0_3.md of inclusionAI/AReaL: hours of whole runs, neither phases nor lengths.
- PipelineRL, arXiv 2509.19128: curves in figures, neither phases nor lengths as numbers.

verl, 128 H20, Qwen2.5-Math-7B, 512 prompts × 16 completions of at most 28k tokens per version. Synchronous and colocated it takes
356.3 s a version: generation 177.85 s, log-probs 53.92 s, update 113.81 s on 128 GPUs; on 64 GPUs generation takes 150.72 s. Split
64 : 64 and asynchronous, by its bound on staleness in shares of a batch: 0 → 231.34 s, 0.1 → 171.30 s, 0.3 → 146.11 s,
0.5 → 150.63 s, with updates of 98.77 s, 109.12 s, 103.22 s, 113.16 s.

The model takes from the table: 64 engines, the batch, the cap, the 150.72 s that the 64 GPUs need for a drained batch (it scales
the step time of an engine), and each row's update time. Its rules are modelled as they are described there: at most
(1 + s)·512 prompts are admitted between two parameter syncs, what is left from before included; the trainer takes 128 prompts as
soon as they have ended, in any order, four times per sync; generation goes on over a sync. What is left free is the spread σ
of the lengths: the range over several is shown.
"""

from typing import Any

import msgspec

from vtriune.plan.model import Simulation
from vtriune.plan.schedule import Schedule
from vtriune.plan.simulated_device import Costs, Lengths
from vtriune.run.groups import Groups
from vtriune.run.window import Window, WindowLimits

VERL_DRAINED_S = 150.72
VERL_SYNC_S = 356.30
VERL_ROWS = ((0.0, 231.34, 98.77), (0.1, 171.30, 109.12), (0.3, 146.11, 103.22), (0.5, 150.63, 113.16))
"""(share of a batch that may be stale, seconds a version, seconds of its update)"""
SPREADS = (0.5, 0.8, 1.1)
UPDATES_PER_SYNC = 4

NOT_REPRODUCED = (
    {
        "system": "AReaL",
        "source": "arXiv 2505.24298; blog/AReaL_v0_3.md of inclusionAI/AReaL",
        "published": "1000 steps, synchronous → asynchronous: 1.5B, 16 nodes: 41.0 → 14.8 h (× 2.77); 7B, 24 nodes: "
        "57.7 → 25.4 h (× 2.27)",
        "missing": "seconds per phase and the lengths; only hours of whole runs and a cap of 27k tokens are given",
    },
    {
        "system": "PipelineRL",
        "source": "arXiv 2509.19128",
        "published": "about × 2 faster learning than conventional RL on 128 H100",
        "missing": "seconds per phase, lengths and the utilisation curve as numbers: they are curves, of reward over time",
    },
)


class SyncWindow(Window):
    """verl's rule: a slot is released when the parameters are synchronised, every fourth update, whatever trained on its group."""

    share = 0.0
    _num_consumed = 0
    """Since the last sync."""

    @property
    def capacity(self) -> int:
        return round((1 + self.share) * UPDATES_PER_SYNC * self.rollout_batch)

    @property
    def num_active(self) -> int:
        return self.num_waiting + self._num_consumed

    def cut(self) -> list[int] | None:
        batch = super().cut()
        self._num_consumed += len(batch or ())
        return batch

    def publish(self) -> list[int]:
        released = super().publish()
        if self.version % UPDATES_PER_SYNC == 0:
            self._num_consumed = 0
        return released


class SyncGroups(Groups):
    """Groups under that rule, in any order and without a bound of ours: staleness is what the slots make it."""

    def __init__(self, rollout_batch: int, share: float) -> None:
        limits = WindowLimits(1 << 30, 1 << 20)
        super().__init__(limits, rollout_batch)
        window = SyncWindow(limits, rollout_batch)
        window.share = share
        self._hold(window, self._ledger)


def verl_rows() -> list[dict[str, Any]]:
    """Per bound: the published seconds per sync, and the model's for each spread in `by_spread`."""
    bases = {sigma: _verl_schedule(sigma) for sigma in SPREADS}
    return [
        {
            "share": share,
            "published_s": published_s,
            "published_speedup": VERL_SYNC_S / published_s,
            "by_spread": {sigma: _step_s(base, share, update_s) for sigma, base in bases.items()},
        }
        for share, published_s, update_s in VERL_ROWS
    ]


def _verl_schedule(sigma: float) -> Schedule:
    """Engines scaled so that a drained batch takes what the table says."""
    schedule = Schedule(
        mode="on_policy", max_staleness=0, num_engines=64, max_sequences=128, rollout_batch=512, group_size=16, training_s=0.0,
        num_versions=3, num_unmeasured=1, lengths=Lengths(median=6000.0, sigma=sigma, cap=28672),
        costs=Costs(publish_s=0.0, verify_s=0.0, prefill_s=0.0),
    )  # fmt: skip
    factor = VERL_DRAINED_S / Simulation(schedule).run().generation_s
    costs = msgspec.structs.replace(
        schedule.costs,
        decode_base_s=schedule.costs.decode_base_s * factor,
        decode_per_sequence_s=schedule.costs.decode_per_sequence_s * factor,
    )
    return msgspec.structs.replace(schedule, costs=costs)


def _step_s(base: Schedule, share: float, update_s: float) -> float:
    """Seconds per sync, after two syncs of start-up."""
    schedule = msgspec.structs.replace(
        base,
        mode="off_policy",
        max_staleness=1,
        rollout_batch=base.rollout_batch // UPDATES_PER_SYNC,
        training_s=update_s / UPDATES_PER_SYNC,
        num_versions=5 * UPDATES_PER_SYNC,
        num_unmeasured=2 * UPDATES_PER_SYNC,
        room=1 << 30,
    )
    model = Simulation(schedule)
    model.groups = SyncGroups(schedule.rollout_batch, share)
    return model.run().step_s * UPDATES_PER_SYNC
