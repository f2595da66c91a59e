"""What one training call does: exactly-once consumption, masks, staleness, corrections, metrics."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from learner import learner as module
from learner.batch.examples import DeliveryError, StaleTrajectory, example
from learner.batch.microbatch import micro_batch
from learner.batch.plan import plan
from learner.batch.prompts import PromptMismatch
from learner.learner import Learner
from learner.optimizer import StepResult
from tests.learner import runs, worlds
from vtriune.messages import SampleRef, ScoredGroup, TrainOrder, VersionSpan

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def folder(models: dict[str, Path]) -> Path:
    return models["qwen2_5_vl"]


def a_world(num: int = 6, seed: int = 0) -> tuple[worlds.World, list[ScoredGroup]]:
    world = worlds.World()
    return world, worlds.random_groups(world, np.random.default_rng(seed), num)


def a_learner(folder: Path, world: worlds.World, **sections: dict[str, Any]) -> Learner:
    sections = {"optimizer": {"lr": 1e-3, "warmup": 0.0}, **sections}
    return Learner(worlds.config_with(**sections), worlds.make_policy(folder, freeze=("vit", "connector")), world)


def trained(learner: Learner, groups: Sequence[ScoredGroup], **changes: Any) -> dict[str, float]:
    for group in groups:
        learner.deliver(group)
    return learner.train(runs.order_of(groups, **changes)).metrics


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def with_statuses(group: ScoredGroup, statuses: list[str]) -> ScoredGroup:
    verdicts = [replace(v, status=s) for v, s in zip(group.verdicts, statuses, strict=True)]
    return replace(group, verdicts=verdicts)


def sampled_by(group: ScoredGroup, spans: list[VersionSpan] | int) -> ScoredGroup:
    changed = [
        replace(t, spans=[VersionSpan(spans, len(t.token_ids))] if isinstance(spans, int) else spans)
        for t in group.group.trajectories
    ]
    return replace(group, group=replace(group.group, trajectories=changed))


def test_on_policy_the_ratio_is_exactly_one_and_the_samplers_log_probs_do_not_matter(folder: Path) -> None:
    world, groups = a_world()
    first, second = a_learner(folder, world), a_learner(folder, world)
    metrics = trained(first, groups)
    noisy = [
        replace(
            g, group=replace(g.group, trajectories=[replace(t, logprobs=t.logprobs - 1) for t in g.group.trajectories])
        )
        for g in groups
    ]
    trained(second, noisy)
    assert (metrics["ratio/min"], metrics["ratio/max"], metrics["clip/low"], metrics["clip/high"]) == (1, 1, 0, 0)
    assert equal(weights(first), weights(second))


def test_off_policy_with_nothing_stale_is_on_policy_bit_for_bit(folder: Path) -> None:
    world, groups = a_world()
    on, off = a_learner(folder, world), a_learner(folder, world)
    before = weights(on)
    trained(on, groups, correction="none")
    trained(off, groups[::-1], correction="decoupled")
    assert not equal(before, weights(on))
    assert equal(weights(on), weights(off))


@pytest.mark.parametrize("correction", ["none", "decoupled", "tis", "icepop"])
def test_stale_tokens_are_corrected_by_the_recomputed_policy(folder: Path, correction: str) -> None:
    world, groups = a_world()
    stale = [sampled_by(group, 0) for group in groups]
    learner = a_learner(folder, world)
    metrics = trained(learner, stale, version=2, max_staleness=2, correction=correction)
    assert (metrics["staleness/max"], metrics["staleness/mean"], metrics["mismatch/tokens"]) == (2, 2, 0)
    assert not metrics.keys() & {"mismatch/max_abs", "mismatch/p95", "mismatch/outside_0.1"}, "nothing was measured"
    assert "kl/reference" not in metrics
    if correction == "none":
        assert metrics["ratio/max"] > 1.01
    else:
        assert metrics["ratio/max"] == metrics["ratio/min"] == 1
        assert metrics["weight/max"] <= {"decoupled": 2, "tis": 5, "icepop": 5}[correction]


def test_every_update_of_a_batch_is_measured_against_the_policy_at_its_start(folder: Path) -> None:
    world, groups = a_world()
    halves = [[0, 1, 2], [3, 4, 5]]
    learner = a_learner(folder, world, optimizer={"lr": 3e-2, "warmup": 0.0})
    with torch.no_grad():
        _, update, _, _ = runs.prepared(learner.policy, world, groups[3:])
        start = runs.scores_of(learner, update)
    second = [sampled_by(g, 0) for g in groups]
    spied: list[torch.Tensor] = []
    original = learner._loss
    learner._loss = lambda micro, logprobs, entropy, prox, *rest: (
        spied.append(prox) or original(micro, logprobs, entropy, prox, *rest)
    )  # type: ignore[method-assign]
    metrics = trained(learner, second, updates=halves, version=1, max_staleness=1, correction="decoupled")
    expected = torch.cat([start[g, c][0] for g in (3, 4, 5) for c in range(4)])
    torch.testing.assert_close(spied[-1].sort().values, expected.sort().values, rtol=1e-5, atol=1e-5)
    assert metrics["ratio/max"] > 1.001
    assert metrics["updates/done"] == 2


def test_each_micro_batch_of_each_pass_is_a_step_that_is_told_before_it_begins(
    folder: Path, told: list[tuple[str, str]]
) -> None:
    world, groups = a_world()
    learner = a_learner(folder, world, optimizer={"token_budget": 40})
    num_told: list[int] = []
    learner.policy.register_forward_hook(lambda *_: num_told.append(sum(work == "training" for work, _ in told)))
    trained(learner, groups, updates=[[0, 1, 2], [3, 4, 5]])
    assert len(num_told) > 8
    assert num_told == sorted(set(num_told)), "something was told before each forward pass"
    steps = [step for work, step in told if work == "training"]
    assert steps[0].startswith("log-probs before any update, micro-batch 1 of ")
    assert steps[-2:] == ["micro-batch {0} of {0}".format(steps[-2].split()[-1]), "the optimizer's step"]
    assert [step for work, step in told if work == "update"] == ["1 of 2 from version 0", "2 of 2 from version 0"]
    assert {"group 0, row 0", "group 5, row 5"} <= {step for work, step in told if work == "prompts"}
    assert sum(work == "image features" for work, _ in told) == 4, "each sample with an image, once"


@pytest.mark.parametrize("frozen", [("vit", "connector"), ()], ids=["frozen_tower", "trained_tower"])
def test_every_update_is_planned_and_packed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, frozen: tuple[str, ...]
) -> None:
    world, groups = a_world()
    flat = [replace(groups[5], verdicts=[replace(v, reward=0.5) for v in groups[5].verdicts])]
    calls: list[Any] = []
    for function in (plan, micro_batch):

        def counted(*arguments: Any, function: Any = function, **rest: Any) -> Any:
            calls.append(function)
            return function(*arguments, **rest)

        monkeypatch.setattr(module, function.__name__, counted)
    policy = worlds.make_policy(folder, freeze=frozen)
    learner = Learner(worlds.config_with(model={"freeze": list(frozen)}), policy, world)
    metrics = trained(learner, groups[:5] + flat, updates=[[0, 1], [2, 3], [4, 5]])
    assert metrics["updates/done"] == 3
    # One for what has a gradient in each update, and one for the group that is only observed.
    assert (calls.count(plan), calls.count(micro_batch)) == (4, 4)


def test_image_features_are_held_by_one_update_at_a_time(folder: Path) -> None:
    world, groups = a_world()
    learner = a_learner(folder, world)
    learner.prompts._cache_bytes = 0
    encoded: list[weakref.ref[torch.Tensor]] = []
    original, step = learner.prompts.encode, learner.optimizer.step

    def encode(*arguments: Any) -> dict[SampleRef, torch.Tensor]:
        found = original(*arguments)
        encoded.extend(weakref.ref(tensor) for tensor in found.values())
        return found

    def counted_step(*arguments: Any) -> StepResult:
        num_alive.append(sum(reference() is not None for reference in encoded))
        return step(*arguments)

    num_alive: list[int] = []
    learner.prompts.encode, learner.optimizer.step = encode, counted_step  # type: ignore[method-assign]
    trained(learner, groups, updates=[[0, 1], [2, 3], [4, 5]])
    has_images = [bool(len(features.image_grid_thw)) for features in world.features]
    assert num_alive == [sum(has_images[i : i + 2]) for i in (0, 2, 4)]


def test_a_faulty_verdict_is_masked_out_of_mean_gradient_and_denominator(folder: Path) -> None:
    world, groups = a_world(1)
    faulty = with_statuses(groups[0], ["ok", "fault", "ok", "bad_answer"])
    keep = [0, 2, 3]
    without = replace(
        groups[0],
        group=replace(groups[0].group, trajectories=[groups[0].group.trajectories[i] for i in keep]),
        verdicts=[groups[0].verdicts[i] for i in keep],
    )
    first, second = a_learner(folder, world), a_learner(folder, world)
    a, b = trained(first, [faulty]), trained(second, [without])
    assert a["tokens/trained"] == b["tokens/trained"]
    assert a["loss"] == b["loss"]
    assert equal(weights(first), weights(second))


def test_a_group_with_fewer_than_two_verdicts_counts_nowhere(folder: Path) -> None:
    world, groups = a_world(3)
    broken = with_statuses(groups[0], ["ok", "fault", "fault", "fault"])
    first, second = a_learner(folder, world), a_learner(folder, world)
    metrics = trained(first, [broken, *groups[1:]])
    other = trained(second, groups[1:])
    assert metrics["groups/unusable"] == 1
    assert metrics["tokens/trained"] == other["tokens/trained"]
    assert equal(weights(first), weights(second))


def test_an_update_in_which_nothing_counts_changes_nothing(folder: Path) -> None:
    world, groups = a_world(2)
    learner = a_learner(folder, world)
    before = weights(learner)
    metrics = trained(learner, [with_statuses(g, ["fault"] * 4) for g in groups])
    assert metrics["updates/empty"] == 1
    assert equal(before, weights(learner))
    counts = ("updates/", "groups/", "time/", "tokens/", "packing/rows", "mismatch/tokens")
    assert [key for key in metrics if not key.startswith(counts)] == [], "a mean or maximum over nothing"


def test_a_batch_of_which_a_filter_left_nothing_changes_nothing(folder: Path) -> None:
    world, _ = a_world(2)
    learner = a_learner(folder, world)
    before = weights(learner)
    report = learner.train(TrainOrder(0, [], "on_policy", 0, 0, "none", [1.0]))
    assert report.metrics["updates/empty"] == 0
    assert equal(before, weights(learner))


def test_tokens_of_groups_without_variance_count_in_the_denominator_and_are_only_observed(folder: Path) -> None:
    world, groups = a_world(2)
    flat = replace(groups[1], verdicts=[replace(v, reward=0.5) for v in groups[1].verdicts])
    learner = a_learner(folder, world)
    alone = a_learner(folder, world)
    both, one = trained(learner, [groups[0], flat]), trained(alone, [groups[0]])
    share = one["tokens/trained"] / both["tokens/trained"]
    assert 0 < share < 1
    assert both["loss"] == pytest.approx(one["loss"] * share, rel=1e-5)
    assert both["grad_norm"] == pytest.approx(one["grad_norm"] * share, rel=1e-4)
    assert both["mismatch/tokens"] == both["tokens/trained"]


def test_a_kl_penalty_needs_a_reference_and_trains_every_group(folder: Path) -> None:
    world, groups = a_world(2)
    flat = [replace(g, verdicts=[replace(v, reward=0.5) for v in g.verdicts]) for g in groups]
    sections = {"loss": {"kl": "k3", "kl_weight": 0.1}, "optimizer": {"lr": 1e-2, "warmup": 0.0}}
    learner = a_learner(folder, world, **sections)
    learner.reference = worlds.make_policy(folder, freeze=("vit", "connector")).requires_grad_(False)
    with torch.no_grad():
        for parameter in learner.policy.model.lm_head.parameters():
            parameter.mul_(1.2)
    first = trained(learner, flat)
    assert first["kl/reference"] > 1e-3
    assert first["loss"] == pytest.approx(0.1 * first["kl/reference"], rel=1e-4)
    assert first["grad_norm"] > 0


def test_an_entropy_bonus_raises_entropy(folder: Path) -> None:
    world, groups = a_world(3)
    entropies = []
    for weight in (0.0, 0.5):
        learner = a_learner(folder, world, loss={"entropy_weight": weight}, optimizer={"lr": 3e-3, "warmup": 0.0})
        for _ in range(4):
            learner.inbox.restore({"consumed": [], "open_from": 0})
            metrics = trained(learner, groups)
        entropies.append(metrics["entropy"])
    assert entropies[1] > entropies[0] + 0.01


@pytest.mark.parametrize(
    ("version", "spans", "bound"),
    [(3, 0, 2), (0, 1, 5), (4, None, 2)],
    ids=["too_old", "from_the_future", "one_old_token"],
)
def test_a_trajectory_beyond_the_bound_on_its_oldest_token_is_refused_by_name(
    folder: Path, version: int, spans: int | None, bound: int
) -> None:
    world, groups = a_world(2)
    if spans is None:
        lengths = [len(t.token_ids) for t in groups[1].group.trajectories]
        target = next(i for i, n in enumerate(lengths) if n > 1)
        mixed = [VersionSpan(1, 1), VersionSpan(4, lengths[target] - 1)]
        changed = [sampled_by(groups[1], 4).group.trajectories[i] for i in range(4)]
        changed[target] = replace(changed[target], spans=mixed)
        groups = [sampled_by(groups[0], 4), replace(groups[1], group=replace(groups[1].group, trajectories=changed))]
    else:
        groups = [sampled_by(g, spans) for g in groups]
    learner = a_learner(folder, world)
    before = weights(learner)
    with pytest.raises(StaleTrajectory, match=r"group \d, completion \d"):
        trained(learner, groups, version=version, max_staleness=bound, correction="decoupled")
    assert equal(before, weights(learner))


def test_duplicates_are_dropped_and_counted_before_and_after_training(folder: Path) -> None:
    world, groups = a_world(2)
    learner = a_learner(folder, world)
    learner.deliver(groups[0])
    assert trained(learner, groups)["groups/duplicates"] == 1
    learner.deliver(groups[1])
    assert learner.inbox.num_duplicates == 2
    with pytest.raises(DeliveryError, match=r"\[0, 1\].*never delivered"):
        learner.train(runs.order_of(groups))


@pytest.mark.parametrize("fault", ["spans", "logprobs", "infinite", "image_pad", "verdicts", "prompt", "completion"])
def test_a_malformed_group_is_refused_by_name(fault: str) -> None:
    _, groups = a_world(1)
    group = groups[0]
    first, *rest = group.group.trajectories
    broken = {
        "spans": replace(first, spans=[VersionSpan(0, 99)]),
        "logprobs": replace(first, logprobs=first.logprobs[:-1]),
        "infinite": replace(first, logprobs=np.full_like(first.logprobs, -np.inf)),
        "image_pad": replace(first, token_ids=np.full_like(first.token_ids, worlds.IMAGE)),
        "completion": replace(first, token_ids=first.token_ids[:0], logprobs=first.logprobs[:0], spans=[]),
    }.get(fault, first)
    verdicts = group.verdicts[1:] if fault == "verdicts" else group.verdicts
    prompt = group.group.prompt_ids[:0] if fault == "prompt" else group.group.prompt_ids
    with pytest.raises(DeliveryError, match="group 0 of source_0"):
        example(
            replace(
                group,
                group=replace(group.group, prompt_ids=prompt, trajectories=[broken, *rest]),
                verdicts=verdicts,
            ),
            scale_by_std=True,
            blocked_ids=[worlds.IMAGE, worlds.VIDEO],
        )


def test_a_prompt_that_the_engine_expanded_otherwise_is_an_error(folder: Path) -> None:
    world, groups = a_world(1)
    other = replace(groups[0], group=replace(groups[0].group, prompt_ids=groups[0].group.prompt_ids[:-1]))
    with pytest.raises(PromptMismatch, match="group 0"):
        trained(a_learner(folder, world), [other])


def test_images_of_a_frozen_tower_are_encoded_once_and_the_cache_is_bounded(folder: Path) -> None:
    world, groups = a_world(6)
    learner = a_learner(folder, world)
    calls: list[int] = []
    original = learner.policy.encode
    learner.policy.encode = lambda pixels, grids: calls.append(len(grids)) or original(pixels, grids)  # type: ignore[method-assign]
    for _ in range(2):
        learner.inbox.restore({"consumed": [], "open_from": 0})
        trained(learner, groups)
    assert sum(calls) == sum(len(f.image_grid_thw) for f in world.features)
    assert learner.prompts._num_bytes == sum(t.nbytes for t in learner.prompts._features.values()) > 0
    learner.prompts._cache_bytes = 600
    learner.prompts.keep({SampleRef("world", 99): torch.zeros(1)})
    assert learner.prompts._num_bytes <= 600


def test_agreement_with_the_sampler_is_measured_on_own_version_tokens(folder: Path) -> None:
    world, groups = a_world(2)
    learner, update, _, _ = runs.prepared(worlds.make_policy(folder), world, groups, model={"freeze": []})
    exact = runs.scores_of(learner, update)
    shifted = []
    for group in groups:
        key = group.group.lease.group_id
        changed = [replace(t, logprobs=exact[key, i][0].numpy()) for i, t in enumerate(group.group.trajectories)]
        shifted.append(replace(group, group=replace(group.group, trajectories=changed)))
    agreeing = trained(a_learner(folder, world), shifted)
    assert agreeing["mismatch/max_abs"] < 1e-5
    trajectory = shifted[0].group.trajectories[0]
    trajectory.logprobs[0] += 0.5
    disagreeing = trained(a_learner(folder, world), shifted)
    assert disagreeing["mismatch/max_abs"] == pytest.approx(0.5, abs=1e-4)
    assert disagreeing["mismatch/outside_0.1"] == pytest.approx(1 / disagreeing["mismatch/tokens"])


def test_a_report_has_the_metrics_of_the_run_file(folder: Path) -> None:
    world, groups = a_world()
    metrics = trained(a_learner(folder, world), groups)
    expected = {
        "loss", "grad_norm", "grad_norm/llm", "grad_norm/layer/0", "grad_norm/layer/1", "lr/llm", "entropy", "source/source_0/entropy",
        "source/source_1/staleness/mean", "mismatch/max_abs", "mismatch/p95", "mismatch/outside_0.1", "ratio/mean", "clip/low",
        "clip/high",
        "staleness/max", "staleness/mean", "tokens/trained", "updates/skipped", "time/learn_s", "time/vit_s", "packing/fill",
        "packing/shared",
    }  # fmt: skip
    assert expected <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    tokens = sum(len(t.token_ids) for g in groups for t in g.group.trajectories)
    assert metrics["tokens/trained"] == tokens
