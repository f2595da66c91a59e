"""Which split of a number of GPUs between generation and training gives most, at which staleness and batch. Used by `vtriune.plan`.

One engine per generating GPU; training time is tokens · FLOPs per token over the training GPUs' sustained FLOP/s. On-policy is
modelled colocated, as synchronous systems run: every GPU generates, then every GPU trains, with a switch between.
"""

import msgspec

from vtriune.plan.model import simulate
from vtriune.plan.schedule import Schedule, ScheduleResult
from vtriune.plan.simulated_device import Lengths


class Hardware(msgspec.Struct, frozen=True):
    """Declared, not measured: a 7B model in bfloat16 on H100s."""

    flops_per_token: float = 8 * 7.6e9
    """2N for recomputing log-probs, 6N for forward and backward."""
    sustained_flops: float = 0.4 * 989e12
    """Per GPU: 40 % of the dense bfloat16 peak."""
    prompt_tokens: int = 1000
    """Per group: the prompt passes the learner once."""
    update_s: float = 1.0
    """Per batch, whatever its size: optimiser, gather, start-up."""
    switch_s: float = 10.0
    """Colocated: weights and caches in and out, per version. What verl's table leaves over at 64 and 128 GPUs after its
    phases (docs/advance/fully_async.md of verl-project/verl: 356.3 − 177.9 − 53.9 − 113.8 = 10.7 s)."""
    max_sequences: int = 256

    def training_s(self, num_gpus: int, rollout_batch: int, group_size: int, lengths: Lengths) -> float:
        """Of one rollout batch on `num_gpus`."""
        tokens = rollout_batch * (group_size * lengths.mean + self.prompt_tokens)
        return tokens * self.flops_per_token / (num_gpus * self.sustained_flops) + self.update_s


class Candidate(msgspec.Struct, frozen=True):
    """One modelled setting."""

    num_gpus: int
    num_generating: int
    """Equal to `num_gpus` when colocated."""
    rollout_batch: int
    max_staleness: int
    """0 when colocated: the same GPUs do both in turn."""
    schedule: Schedule
    outcome: ScheduleResult

    @property
    def samples_per_s(self) -> float:
        """Completions consumed per second."""
        return self.outcome.samples_per_s(self.schedule)


def candidates(
    num_gpus: int,
    rollout_batch: int,
    staleness: list[int],
    hardware: Hardware,
    *,
    num_versions: int = 8,
) -> list[Candidate]:
    """Colocated on-policy, then off-policy: three splits around the balance of full engines and learner at the middle bound,
    and the best of them at the other bounds."""
    base = Schedule(
        rollout_batch=rollout_batch,
        max_sequences=hardware.max_sequences,
        room=2 * hardware.max_sequences,
        num_versions=num_versions,
        num_unmeasured=2,
    )
    tried = [_colocated(num_gpus, base, hardware)]
    bounds = [bound for bound in staleness if bound > 0]
    if bounds:
        middle = bounds[len(bounds) // 2]
        splits = [_split(num_gpus, count, middle, base, hardware) for count in _counts(num_gpus, base, hardware)]
        best = max(splits, key=lambda candidate: candidate.samples_per_s)
        tried += splits
        tried += [_split(num_gpus, best.num_generating, bound, base, hardware) for bound in bounds if bound != middle]
    return tried


def _colocated(num_gpus: int, base: Schedule, hardware: Hardware) -> Candidate:
    busy_s = hardware.training_s(num_gpus, base.rollout_batch, base.group_size, base.lengths) + hardware.switch_s
    schedule = msgspec.structs.replace(
        base,
        mode="on_policy",
        max_staleness=0,
        num_engines=num_gpus,
        training_s=busy_s,
        num_versions=4,
        num_unmeasured=1,
    )
    return Candidate(num_gpus, num_gpus, base.rollout_batch, 0, schedule, simulate(schedule))


def _split(num_gpus: int, num_generating: int, bound: int, base: Schedule, hardware: Hardware) -> Candidate:
    training_s = hardware.training_s(num_gpus - num_generating, base.rollout_batch, base.group_size, base.lengths)
    schedule = msgspec.structs.replace(base, max_staleness=bound, num_engines=num_generating, training_s=training_s)
    return Candidate(num_gpus, num_generating, base.rollout_batch, bound, schedule, simulate(schedule))


def _counts(num_gpus: int, base: Schedule, hardware: Hardware) -> list[int]:
    """Generating GPUs to try: where full engines and the learner take equally long, and a quarter of the rest to either side."""
    one_engine_s = msgspec.structs.replace(base, num_engines=1).generation_s
    one_learner_s = hardware.training_s(1, base.rollout_batch, base.group_size, base.lengths) - hardware.update_s
    balance = num_gpus * one_engine_s / (one_engine_s + one_learner_s)
    counts = {round(balance - balance / 4), round(balance), round(balance + (num_gpus - balance) / 3)}
    return sorted({min(max(count, 1), num_gpus - 1) for count in counts})


def is_sensible(num_gpus: int, rollout_batch: int, group_size: int = 8) -> bool:
    """Whether each GPU has something to do, and a version ends in minutes: 8 to 256 completions a GPU."""
    return 8 <= rollout_batch * group_size / num_gpus <= 256
