"""Scored groups with chosen verdicts, for the tests of metrics, archive and recorder."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from verifiers import ImageSize, RewardOptions, RewardSpec, Verdict
from vtriune.messages import (
    Group,
    Lease,
    SampleHeader,
    SampleRef,
    Sampling,
    ScoredGroup,
    Trajectory,
    VersionSpan,
)
from vtriune.record.source_metrics import GroupStats, summarise

DETECTION = RewardSpec(
    ground_truth="[{'bbox_2d': [0, 0, 9, 9], 'label': 'a'}]",
    verifier="detection",
    verifier_parm={"det_reward_ratio": {"map": 1.0}},
)


def verdict(reward: float | None, accuracy: float | None = None, form: float = 1.0, **components: float) -> Verdict:
    """An `ok` verdict; None makes a fault."""
    if reward is None:
        return Verdict("fault", math.nan, math.nan, math.nan, {}, "timeout")
    return Verdict("ok", reward, reward if accuracy is None else accuracy, form, components, "")


def trajectory(
    num_tokens: int = 4, text: str = "", *, version: int = 0, finish: Literal["stop", "length"] = "stop", seed: int = 0
) -> Trajectory:
    """Random ids and log-probs, sampled by one version."""
    rng = np.random.default_rng(seed)
    return Trajectory(
        token_ids=rng.integers(0, 1000, num_tokens).astype(np.int32),
        logprobs=-rng.random(num_tokens).astype(np.float32),
        spans=[VersionSpan(version, num_tokens)],
        finish_reason=finish,
        text=text,
    )


def scored(
    verdicts: Sequence[Verdict],
    trajectories: Sequence[Trajectory] | None = None,
    *,
    source: str = "digits",
    group_id: int = 1,
    attempt: int = 0,
    purpose: Literal["train", "evaluate"] = "train",
    temperature: float = 1.0,
    version: int = 0,
    spec: RewardSpec = DETECTION,
) -> ScoredGroup:
    """A group of those verdicts, with an image."""
    if trajectories is None:
        trajectories = [trajectory(version=version, seed=index) for index in range(len(verdicts))]
    lease = Lease(
        group_id,
        attempt,
        SampleRef("f00d", 3),
        SampleHeader(source, spec, f"sample-{group_id}", "train_a.parquet", 3),
        len(verdicts),
        Sampling(temperature, 64, top_p=0.5 + group_id % 2 / 2, top_k=group_id % 3 - 1),
        purpose=purpose,
        progress=None if purpose == "evaluate" else 0.125,
        prompt_seed=group_id % 7,
    )
    prompt_ids, sizes = np.arange(group_id % 5 + 2, dtype=np.int32), [ImageSize((640, 480), (616, 476))]
    return ScoredGroup(Group(lease, prompt_ids, list(trajectories), 0, 0.25, sizes), list(verdicts), 0.125)


def stats(groups: Sequence[ScoredGroup], options: RewardOptions | None = None) -> list[GroupStats]:
    """What the recorder keeps of the groups."""
    return [summarise(group, options or RewardOptions()) for group in groups]
