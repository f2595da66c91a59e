"""Where two runs part: the first difference between what they trained on, and between their parameters. Called by `learner.replay`.

Compared is what reaches the parameters, bit for bit: per version its groups in the order of training (sample, prompt, tokens with the
versions that sampled them, log-probs, verdicts), then what was ordered. Which generator sampled a group, at which attempt and how long
that took is not. Pure.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from learner.archived_run import ArchivedBatch
from verifiers import Verdict
from vtriune.messages import ScoredGroup, Trajectory


class Difference(msgspec.Struct, frozen=True):
    """A place at which two runs differ, and what stands there in each; None where one has nothing there."""

    what: str
    ours: Any
    theirs: Any
    version: int = 0
    """The one that training on this made."""
    update: int | None = None
    """Optimiser step within the version, from 0; None: of the version as a whole."""
    group_id: int | None = None
    sample: str = ""
    """Source, id and row in the data of the group's sample."""
    completion: int | None = None
    token: int | None = None
    """Place in the completion; of a prompt's id, in the prompt."""

    def __str__(self) -> str:
        group = None if self.group_id is None else f"{self.group_id} ({self.sample})"
        at = {"version": self.version, "update": self.update, "group": group}
        at |= {"completion": self.completion, "token": self.token}
        places = ", ".join(f"{name} {place}" for name, place in at.items() if place is not None)
        return f"{places}: {self.what} {self.ours!r} here, {self.theirs!r} there"


class Comparison(NamedTuple):
    """What came of comparing two archives."""

    num_equal: int
    """Versions, from the first on, that were trained on the same."""
    difference: Difference | None
    """None: up to the end of the shorter one there is none."""


class TensorDifference(NamedTuple):
    """A tensor of two checkpoints that is not the same bit for bit."""

    name: str
    num_differing: int
    num_values: int
    largest: float
    """Of the absolute differences; NaN where one of the two is, or where the shapes differ."""

    def __str__(self) -> str:
        return f"{self.name}: {self.num_differing} of {self.num_values} values, by up to {self.largest:.3g}"


def compare(ours: Iterable[ArchivedBatch], theirs: Iterable[ArchivedBatch]) -> Comparison:
    """The first difference between two runs' batches, which are read no further than that."""
    version = 0
    for version, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        found = next(_of_batches(one, other), None)
        if found is not None:
            return Comparison(version - 1, msgspec.structs.replace(found, version=version))
    return Comparison(version, None)


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Keys of two configurations, as plain values, that differ, each with both values."""
    for key in sorted({*ours, *theirs}):
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differing_keys(one, other, f"{above}{key}.")
        elif one != other:
            yield f"{above}{key}: {one!r} here, {other!r} there"


def differing_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[TensorDifference]:
    """Tensors of two checkpoints that differ, in the order of `ours`; one that only one of them has differs in all its values.

    Memory: two tensors and a byte a value.
    """
    for name in (*ours, *(name for name in theirs if name not in ours)):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            size = max(tensor.numel() for tensor in (one, other) if tensor is not None)
            yield TensorDifference(name, size, size, math.nan)
        elif num := int((_bytes(one) != _bytes(other)).any(1).sum()):
            yield TensorDifference(name, num, one.numel(), float((one.double() - other.double()).abs().max()))


def _bytes(tensor: Tensor) -> Tensor:
    """(values, bytes of one)"""
    return tensor.reshape(-1, 1).contiguous().view(torch.uint8)


def _of_batches(ours: ArchivedBatch, theirs: ArchivedBatch) -> Iterator[Difference]:
    """Groups in the order of training, then what was ordered besides them."""
    one, other = _by_id(ours), _by_id(theirs)
    nothing: list[int] = []
    pairs = itertools.zip_longest(ours.order.updates, theirs.order.updates, fillvalue=nothing)
    for update, (ids, other_ids) in enumerate(pairs):
        for group_id, other_id in itertools.zip_longest(ids, other_ids):
            if group_id != other_id:
                yield Difference("group trained on next", group_id, other_id, update=update)
                return
            for found in _of_groups(one[group_id], other[group_id]):
                yield msgspec.structs.replace(found, update=update, group_id=group_id, sample=_sample(one[group_id]))
    for name in ("mode", "bound", "max_staleness", "correction", "progress"):
        yield from _unequal(name, getattr(ours.order, name), getattr(theirs.order, name))


def _of_groups(ours: ScoredGroup, theirs: ScoredGroup) -> Iterator[Difference]:
    one, other = ours.group, theirs.group
    for name in ("sample", "prompt_seed", "sampling", "num_completions"):
        yield from _unequal(name, getattr(one.lease, name), getattr(other.lease, name))
    yield from _of_tokens({"prompt token": (one.prompt_ids, other.prompt_ids)})
    completions = zip(one.trajectories, other.trajectories, ours.verdicts, theirs.verdicts, strict=False)
    for index, (trajectory, its_twin, verdict, its_verdict) in enumerate(completions):
        for found in (*_of_trajectories(trajectory, its_twin), *_of_verdicts(verdict, its_verdict)):
            yield msgspec.structs.replace(found, completion=index)
    yield from _unequal("number of completions", len(one.trajectories), len(other.trajectories))


def _of_trajectories(ours: Trajectory, theirs: Trajectory) -> Iterator[Difference]:
    yield from _of_tokens(
        {
            "sampled by version": (_versions(ours), _versions(theirs)),
            "token": (ours.token_ids, theirs.token_ids),
            "log-prob": (ours.logprobs, theirs.logprobs),
        }
    )
    yield from _unequal("finish reason", ours.finish_reason, theirs.finish_reason)


def _of_tokens(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Iterator[Difference]:
    """The first place at which any pair of arrays differs in its bits; at one place the first of `pairs`."""
    found = [
        (int(places[0]), what, one, other)
        for what, (one, other) in pairs.items()
        if len(places := np.flatnonzero(_differ(one, other)))
    ]
    for place, what, one, other in sorted(found, key=lambda item: item[0])[:1]:
        here, there = (array[place].item() if place < len(array) else None for array in (one, other))
        yield Difference(what, here, there, token=place)


def _differ(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """bool (the longer's length,): whether the bits at a place differ; a place that only one has does."""
    num = min(len(ours), len(theirs))
    differ = np.ones(max(len(ours), len(theirs)), bool)
    differ[:num] = ours[:num].view(f"u{ours.itemsize}") != theirs[:num].view(f"u{theirs.itemsize}")
    return differ


def _of_verdicts(ours: Verdict, theirs: Verdict) -> Iterator[Difference]:
    for name in ("status", "reward", "accuracy", "format", "components"):
        yield from _unequal(name, getattr(ours, name), getattr(theirs, name))


def _unequal(what: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    # By their texts, which tell the bits of floats apart (but for NaNs, of which a fault has any): 0.0 from -0.0, not NaN from NaN.
    if repr(ours) != repr(theirs):
        yield Difference(what, ours, theirs)


def _versions(trajectory: Trajectory) -> np.ndarray:
    """int64 (T,): the version that sampled each token."""
    spans = trajectory.spans
    return np.repeat([span.version for span in spans], [span.num_tokens for span in spans])


def _by_id(batch: ArchivedBatch) -> dict[int, ScoredGroup]:
    return {group.group.lease.group_id: group for group in batch.groups}


def _sample(scored: ScoredGroup) -> str:
    header = scored.group.lease.header
    return f"{header.source}, sample {header.sample_id}: row {header.file_row} of {header.file}"
