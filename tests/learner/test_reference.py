"""The KL penalty's reference policy sees what the trained policy sees, whatever is frozen and whatever a micro-batch holds."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.learner import Learner
from tests.learner import ranks_program as program
from tests.learner import runs, worlds
from vtriune.messages import SampleRef, ScoredGroup

FROZEN = {"frozen": program.TOWER, "connector_trained": ("vit",), "all_trained": ()}


def reported(learner: Learner, groups: list[ScoredGroup]) -> dict[str, float]:
    for group in groups:
        learner.deliver(group)
    return learner.train(runs.order_of(groups)).metrics


@pytest.mark.parametrize("kl", ["k1", "mse", "k3"])
@pytest.mark.parametrize(
    ("kind", "images", "frozen"),
    [*itertools.product(("qwen2_5_vl", "qwen3_vl"), ("mixed", "none"), FROZEN), ("qwen3", "none", "all_trained")],
)
def test_two_equal_models_have_a_kl_of_zero(
    models: dict[str, Path], kind: str, images: str, frozen: str, kl: str
) -> None:
    world = worlds.World()
    groups = worlds.random_groups(world, np.random.default_rng(0), 3, images=images)
    # So small that every group is a micro-batch of its own: with mixed images one of them is text only.
    learner = program.with_reference(models[kind], world, FROZEN[frozen], kl=kl, token_budget=1)
    metrics = reported(learner, groups)
    assert metrics["kl/reference"] == 0
    assert metrics["tokens/trained"] == sum(len(t.token_ids) for g in groups for t in g.group.trajectories)


def test_images_count_in_the_kl_with_a_trained_tower_as_with_a_frozen_one(models: dict[str, Path]) -> None:
    found = []
    for frozen in FROZEN.values():
        world = worlds.World()
        groups = worlds.random_groups(world, np.random.default_rng(0), 3)
        learner = program.with_reference(models["qwen2_5_vl"], world, frozen)
        with torch.no_grad():
            for parameter in learner.policy.model.lm_head.parameters():
                parameter.mul_(1.2)
        found.append(reported(learner, groups)["kl/reference"])
    assert found[0] > 1e-3
    assert found == pytest.approx([found[0]] * len(found), rel=1e-4)


def test_pixels_are_made_once_for_the_policy_and_its_reference(models: dict[str, Path]) -> None:
    world = worlds.World()
    groups = worlds.random_groups(world, np.random.default_rng(0), 3)
    learner = program.with_reference(models["qwen2_5_vl"], world, ())
    alone = program.with_reference(models["qwen2_5_vl"], world, ())
    alone.reference = None
    num_made = []
    for each in (learner, alone):
        made: list[SampleRef] = []
        each.prompts.source = lambda sample, seed, made=made: made.append(sample) or world(sample, seed)  # type: ignore[misc, func-returns-value]
        reported(each, groups)
        num_made.append(len(made))
    assert num_made[0] == num_made[1] > 0
