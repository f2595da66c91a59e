"""Every message that carries work between V-Triune's processes, one small struct each.

A group's way, with the struct that travels on each arrow:

    controller ──Lease──▶ generator ──Group──▶ verifier pool ──ScoredGroup──▶ learner (every rank) and recorder
        ▲                                           │
        └──────────────── GroupReport ◀─────────────┘   (the reply, through the generator)

No message holds pixels: a `SampleRef` names a row of the memory-mapped store, which each process opens for itself.

Worked example, group size 2, model at version 3, a publish of version 4 in the middle of the second completion:

    Lease(group_id=7, attempt=0, sample=SampleRef("9f3c…", 12), header=SampleHeader("geometry", …), num_completions=2, …)
    Trajectory(token_ids=[5, 9, 1],    logprobs=[-.1, -.7, -.0],       spans=[VersionSpan(3, 3)], finish_reason="stop")
    Trajectory(token_ids=[5, 8, 8, 1], logprobs=[-.1, -.9, -.2, -.1],  spans=[VersionSpan(3, 2), VersionSpan(4, 2)], …)
"""

from typing import Literal

import msgspec
import numpy as np

from verifiers import ImageSize, RewardSpec, Verdict

Purpose = Literal["train", "evaluate"]


class SampleRef(msgspec.Struct, frozen=True):
    """A row of the data, named without its content."""

    fingerprint: str
    """Hash of the store's content; a process that opened another store refuses the reference."""
    row: int
    probability: float = 1.0
    """That a pass over the data draws the row, when it was drawn: below 1 for what `data.draw: solve_rate` seldom draws."""


class SampleHeader(msgspec.Struct, frozen=True):
    """A sample without its prompt and images: what scoring, metrics and archives need of it, read once, when it is leased."""

    source: str
    reward: RewardSpec
    sample_id: str
    file: str
    """The Parquet file it comes from,"""
    file_row: int
    """and its row there."""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Which policy sampled the next `num_tokens` tokens of a trajectory."""

    version: int
    num_tokens: int


class Sampling(msgspec.Struct, frozen=True):
    """How completions are drawn. Recorded log-probs are those of the distribution sampled from:
    temperature applied, image and video pad ids and whatever `top_k` and `top_p` cut at −inf. `temperature=0` is greedy."""

    temperature: float = 1.0
    max_tokens: int = 2048
    seed: int | None = None
    """Set: the engine seeds each completion with `seed + index`, so that a run can be repeated."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability; 1: all."""
    top_k: int = -1
    """Sample from this many likeliest tokens; -1 and 0: all."""


SCORED_AGAIN = 1 << 16
"""More than a group is ever leased."""


class Lease(msgspec.Struct, frozen=True):
    """A group handed to a generator."""

    group_id: int
    attempt: int
    """With `group_id` the name of what is delivered. Counts re-issues of the same group after a lost lease, from 0 or, after a
    resume, from above what is archived; each time that a generator has a group scored again adds SCORED_AGAIN."""
    sample: SampleRef
    header: SampleHeader
    num_completions: int
    sampling: Sampling
    purpose: Purpose = "train"
    progress: float | None = 0.0
    """Share of the run done, in [0, 1]: what the IoU schedule reads. None for an evaluation, whose threshold does not move."""
    first_completion: int = 0
    """Index of the first of its completions in the group; above 0 for a share of a group that several generators sample."""
    prompt_seed: int | None = None
    """Seeds the choice from the prompt pool; None leaves the prompt as it is in the data."""


class Trajectory(msgspec.Struct, frozen=True, eq=False):
    """One completion, T tokens, end token included when there is one."""

    token_ids: np.ndarray
    """int32 (T,)"""
    logprobs: np.ndarray
    """float32 (T,), the sampler's log π_b of each token"""
    spans: list[VersionSpan]
    """Oldest first; their `num_tokens` sum to T."""
    finish_reason: Literal["stop", "length"]
    text: str

    @property
    def oldest_version(self) -> int:
        """The version that staleness is counted from."""
        return min(span.version for span in self.spans)


class Group(msgspec.Struct, frozen=True, eq=False):
    """One sample × G completions: the unit of leasing, scoring, admission and delivery."""

    lease: Lease
    prompt_ids: np.ndarray
    """int32 (P,), as the engine expanded it: one pad id per merged image token"""
    trajectories: list[Trajectory]
    generator: int
    """Rank of the generator that sampled it."""
    generation_s: float = 0.0
    image_sizes: list[ImageSize] = []
    """Of the prompt's images, in order."""


class ScoredGroup(msgspec.Struct, frozen=True, eq=False):
    """Group + verdicts, one per trajectory in order: what the learner consumes."""

    group: Group
    verdicts: list[Verdict]
    verification_s: float = 0.0

    @property
    def source(self) -> str:
        """`data_source` of the group's sample."""
        return self.group.lease.header.source


class GroupReport(msgspec.Struct, frozen=True):
    """What the controller learns of a scored group: counts only."""

    group_id: int
    attempt: int
    num_tokens: int
    rewards: list[float]
    """Rewards of the trajectories whose verdict is not `fault`, in order."""
    num_faults: int
    verification_s: float
    solve_rate: float | None = None
    """Mean accuracy of these trajectories, in [0, 1]; None where there are none."""


class Rendezvous(msgspec.Struct, frozen=True):
    """Where the weight group of one publish meets: learner rank 0 is member 0, the generators that receive are 1, 2, …"""

    host: str
    port: int
    num_members: int
    backend: Literal["gloo", "nccl"]


class WeightEntry(msgspec.Struct, frozen=True, array_like=True):
    """One published tensor's identity; the receiver matches it against its own model."""

    name: str
    shape: list[int]
    dtype: str


class WeightManifest(msgspec.Struct, frozen=True):
    """What one publish sends, in order. Names are those of `state_dict()`; `lm_head.weight` is present even when tied."""

    version: int
    entries: list[WeightEntry]


class Canary(msgspec.Struct, frozen=True, eq=False):
    """A prompt with an image and a fixed answer, scored on both sides after a publish."""

    sample: SampleRef
    response_ids: np.ndarray
    """int32 (T,)"""


Correction = Literal["none", "decoupled", "tis", "icepop"]


class TrainOrder(msgspec.Struct, frozen=True):
    """The controller's order to train on one rollout batch, the same to every learner rank."""

    version: int
    """The learner's version while it consumes this batch; a publish then makes it `version + 1`."""
    updates: list[list[int]]
    """Group ids of each optimiser step, in order."""
    mode: Literal["on_policy", "off_policy"]
    """In force while it is trained on, with"""
    bound: int
    """the staleness that groups admitted now may reach."""
    max_staleness: int
    """The largest bound that any of its groups was admitted under. Checked once more on the oldest token of every trajectory: above it
    the learner raises."""
    correction: Correction
    progress: list[float]
    """Share of the run done, in [0, 1]: before the first update, and after each. Never falls."""
    attempts: dict[int, int] = {}
    """Group id → the attempt that counts; 0 where absent. A group leased or scored twice may be delivered twice, in another order at
    every rank: all of them must train on the same one."""
    open_from: int = 0
    """Every group of a smaller id has ended or is in `updates`: whatever else there is of it may be forgotten."""

    @property
    def group_ids(self) -> list[int]:
        """Of all updates, in order."""
        return [group_id for ids in self.updates for group_id in ids]


class TrainReport(msgspec.Struct, frozen=True):
    """What training on one rollout batch measured. Keys are flat `metrics.jsonl` keys, already reduced over ranks."""

    version: int
    metrics: dict[str, float]


class PublishOrder(msgspec.Struct, frozen=True):
    """Send (learner) or receive (generator) the weights of `version` over the group that meets at `rendezvous`."""

    version: int
    rendezvous: Rendezvous
    full: bool
    """False: trainable parameters only. True for an engine's first publish."""
    deadline_s: float
    member: int = 0
    """The receiver's place at the rendezvous; 0 is learner rank 0."""


class PublishReport(msgspec.Struct, frozen=True):
    """One member's account of a publish; checksums of sender and receivers are compared by the controller."""

    version: int
    num_tensors: int
    num_bytes: int
    checksum: str
    """Hash over names, shapes and bytes of all tensors in order."""
    transfer_s: float
    pause_s: float = 0.0
    """Generators: time without sampling."""


class Example(msgspec.Struct, frozen=True):
    """A response to show a person beside a figure."""

    header: SampleHeader
    response: str
    """Beginning and end of it."""


class StepRecord(msgspec.Struct, frozen=True):
    """The controller's note to the recorder that a version is made: one line of `metrics.jsonl`."""

    version: int
    update: int
    metrics: dict[str, float]
    """Learner's, publisher's and window's figures; the recorder adds the source-level ones."""
    order: TrainOrder | None = None
    """What the version was trained under; None for version 0, which is evaluated only."""
    evaluated: dict[int, int] = {}
    """Group id → the attempt that counts, of the held-out rows that this line speaks of."""
