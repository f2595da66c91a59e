"""The first difference between two runs is the one that is there: equal archives have none, a changed value is named by its place."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.archived_run import ArchivedBatch
from learner.locate import Difference, compare, differing_keys, differing_tensors
from tests.learner import runs, worlds
from vtriune.messages import ScoredGroup, TrainOrder, VersionSpan

NUM_VERSIONS, NUM_GROUPS, SIZE = 3, 4, 2
replaced = msgspec.structs.replace


def a_run() -> list[ArchivedBatch]:
    """Versions of two updates each; the archive holds their groups youngest first, as they need not be in the order of training."""
    world, rng = worlds.World(), np.random.default_rng(0)
    batches = []
    for version in range(NUM_VERSIONS):
        made = worlds.random_groups(world, rng, NUM_GROUPS, SIZE, lengths=(3, 9), images="none")
        groups = [in_lease(group, group_id=NUM_GROUPS * version + index) for index, group in enumerate(made)]
        ids = [group.group.lease.group_id for group in groups]
        order = runs.order_of(groups, version=version, updates=[ids[:1], ids[1:]], mode="off_policy", bound=2)
        batches.append(ArchivedBatch(groups[::-1], order))
    return batches


def in_lease(scored: ScoredGroup, **changes: Any) -> ScoredGroup:
    return in_group(scored, lease=replaced(scored.group.lease, **changes))


def in_group(scored: ScoredGroup, **changes: Any) -> ScoredGroup:
    return replaced(scored, group=replaced(scored.group, **changes))


def in_trajectory(scored: ScoredGroup, index: int, **changes: Any) -> ScoredGroup:
    trajectories = list(scored.group.trajectories)
    trajectories[index] = replaced(trajectories[index], **changes)
    return in_group(scored, trajectories=trajectories)


def in_verdict(scored: ScoredGroup, index: int, **changes: Any) -> ScoredGroup:
    verdicts = list(scored.verdicts)
    verdicts[index] = replaced(verdicts[index], **changes)
    return replaced(scored, verdicts=verdicts)


def with_group(
    run: list[ArchivedBatch], version: int, place: int, change: Callable[[ScoredGroup], ScoredGroup]
) -> None:
    """Change the group at `place` of the training order of a version, from 0."""
    batch = run[version]
    group_id = batch.order.group_ids[place]
    groups = [change(item) if item.group.lease.group_id == group_id else item for item in batch.groups]
    run[version] = ArchivedBatch(groups, batch.order)


def changed_at(values: np.ndarray, place: int, delta: float) -> np.ndarray:
    copy = values.copy()
    copy[place] = copy[place] + delta
    return copy


def next_float(values: np.ndarray, place: int) -> np.ndarray:
    """The float32 one bit away."""
    copy = values.copy()
    copy.view(np.int32)[place] += 1
    return copy


OF_TOKENS = ("token", "log-prob", "sampled by version")
OF_COMPLETIONS = ("finish reason", "reward", "status", "components")
OF_GROUPS = ("prompt token", "sample", "prompt_seed", "number of completions")


@given(st.data())
def test_a_changed_value_is_named_by_version_update_group_completion_and_token_whatever_differs_after_it(
    data: st.DataObject,
) -> None:
    ours, theirs = a_run(), a_run()
    version, place = data.draw(st.integers(0, NUM_VERSIONS - 1)), data.draw(st.integers(0, NUM_GROUPS - 1))
    index = data.draw(st.integers(0, SIZE - 1))
    what = data.draw(st.sampled_from(OF_TOKENS + OF_COMPLETIONS + OF_GROUPS))
    group_id = ours[version].order.group_ids[place]
    (group,) = [item for item in ours[version].groups if item.group.lease.group_id == group_id]
    trajectory = group.group.trajectories[index]
    num = len(trajectory.token_ids)
    token = data.draw(st.integers(0, (len(group.group.prompt_ids) if what == "prompt token" else num) - 1))
    spans = [VersionSpan(0, token), VersionSpan(1, num - token)] if token else [VersionSpan(1, num)]
    changes: dict[str, Callable[[ScoredGroup], ScoredGroup]] = {
        "token": lambda g: in_trajectory(g, index, token_ids=changed_at(trajectory.token_ids, token, 1)),
        "log-prob": lambda g: in_trajectory(g, index, logprobs=next_float(trajectory.logprobs, token)),
        "sampled by version": lambda g: in_trajectory(g, index, spans=spans),
        "finish reason": lambda g: in_trajectory(g, index, finish_reason="length"),
        "reward": lambda g: in_verdict(g, index, reward=math.nextafter(g.verdicts[index].reward, 9)),
        "status": lambda g: in_verdict(g, index, status="bad_answer"),
        "components": lambda g: in_verdict(g, index, components={"iou": 0.5}),
        "prompt token": lambda g: in_group(g, prompt_ids=changed_at(g.group.prompt_ids, token, 1)),
        "sample": lambda g: in_lease(g, sample=replaced(g.group.lease.sample, row=1000)),
        "prompt_seed": lambda g: in_lease(g, prompt_seed=5),
        "number of completions": lambda g: in_group(g, trajectories=g.group.trajectories[:1]),
    }
    with_group(theirs, version, place, changes[what])
    # What comes later in training differs as well, and must not be taken for the first.
    for later in range(place + 1, NUM_GROUPS):
        with_group(theirs, version, later, lambda g: in_lease(g, prompt_seed=9))
    num_equal, found = compare(ours, theirs)
    assert found is not None
    assert (num_equal, found.what, found.version, found.group_id) == (version, what, version + 1, group_id)
    assert found.update == (0 if place == 0 else 1)
    assert found.completion == (None if what in OF_GROUPS else index)
    assert found.token == (token if what in (*OF_TOKENS, "prompt token") else None)
    assert repr(found.ours) != repr(found.theirs)


def test_equal_archives_have_no_difference_whoever_sampled_the_groups_when_and_at_which_attempt() -> None:
    ours, theirs = a_run(), a_run()
    nan = {"reward": math.nan, "status": "fault"}
    for run in (ours, theirs):
        with_group(run, 1, 2, lambda g: in_verdict(g, 0, **nan))
    with_group(theirs, 0, 1, lambda g: in_group(in_lease(g, attempt=3, progress=0.5), generator=2, generation_s=9.0))
    order = replaced(theirs[0].order, attempts={1: 3}, open_from=1)
    theirs[0] = ArchivedBatch(theirs[0].groups[::-1], order)
    assert compare(ours, theirs) == (NUM_VERSIONS, None)
    assert compare(ours, theirs[:2]) == (2, None)


def test_a_completion_that_goes_on_in_one_run_only_differs_at_its_end() -> None:
    ours, theirs = a_run(), a_run()
    end = len(ours[0].groups[-1].group.trajectories[0].token_ids) - 1

    def cut(scored: ScoredGroup) -> ScoredGroup:
        whole = scored.group.trajectories[0]
        spans = [VersionSpan(0, end)]
        return in_trajectory(scored, 0, token_ids=whole.token_ids[:end], logprobs=whole.logprobs[:end], spans=spans)

    with_group(theirs, 0, 0, cut)
    found = compare(ours, theirs).difference
    assert found is not None
    assert (found.token, found.theirs) == (end, None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"updates": [[0], [1, 3, 2]]}, Difference("group trained on next", 2, 3, 1, 1)),
        ({"updates": [[0, 1], [2, 3]]}, Difference("group trained on next", None, 1, 1, 0)),
        ({"mode": "on_policy"}, Difference("mode", "off_policy", "on_policy", 1)),
        ({"correction": "icepop"}, Difference("correction", "none", "icepop", 1)),
        ({"progress": [0.0, 0.1, 0.3]}, Difference("progress", [0.0, 0.1, 0.2], [0.0, 0.1, 0.3], 1)),
    ],
)
def test_another_order_is_named_by_what_was_ordered(change: dict[str, Any], expected: Difference) -> None:
    ours, theirs = a_run(), a_run()
    order: TrainOrder = replaced(theirs[0].order, **change)
    theirs[0] = ArchivedBatch(theirs[0].groups, order)
    assert compare(ours, theirs) == (0, expected)


def test_a_difference_reads_as_its_place_and_both_values() -> None:
    found = Difference("log-prob", -0.5, -0.25, 7, 1, 31, "count, sample q7: row 5 of a.parquet", 0, 12)
    assert str(found) == (
        "version 7, update 1, group 31 (count, sample q7: row 5 of a.parquet), completion 0, token 12: "
        "log-prob -0.5 here, -0.25 there"
    )


@given(st.lists(st.sampled_from(["float32", "bfloat16", "int64"]), min_size=1), st.data())
def test_tensors_that_differ_in_a_bit_are_named_and_equal_ones_are_not(dtypes: list[str], data: st.DataObject) -> None:
    ours = {f"model.{i}": torch.arange(6).to(getattr(torch, kind)).reshape(2, 3) for i, kind in enumerate(dtypes)}
    ours["step"] = torch.tensor(3.0)
    changed = data.draw(st.sets(st.sampled_from(sorted(ours))))
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    for name in changed:
        theirs[name].view(-1)[-1] += 1
    found = list(differing_tensors(ours, theirs))
    assert {item.name for item in found} == changed
    assert all((item.num_differing, item.largest) == (1, 1.0) for item in found)


def test_zeros_of_another_sign_differ_and_a_tensor_that_one_run_lacks_differs_whole() -> None:
    ours, theirs = {"a": torch.zeros(3), "b": torch.ones(2)}, {"a": torch.tensor([0.0, -0.0, 0.0]), "c": torch.ones(4)}
    found = {item.name: item.num_differing for item in differing_tensors(ours, theirs)}
    assert found == {"a": 1, "b": 2, "c": 4}


def test_configurations_differ_key_by_key() -> None:
    ours = {"optimizer": {"lr": 0.1, "decay": "none"}, "run": {"seed": 0}}
    theirs = {"optimizer": {"lr": 0.2, "decay": "none"}, "run": {"seed": 0, "steps": 3}}
    assert list(differing_keys(ours, theirs)) == [
        "optimizer.lr: 0.1 here, 0.2 there", "run.steps: None here, 3 there",
    ]  # fmt: skip
