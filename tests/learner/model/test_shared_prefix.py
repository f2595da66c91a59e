"""Packed = shared-prefix = padded = one by one, forwards and gradients, and equal to transformers' own forward."""

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.model import attention
from learner.model.policy import Policy
from tests.learner import runs, worlds

TOLERANCE = 1e-5


def a_batch(seed: int = 0, images: str = "mixed") -> tuple[worlds.World, list]:
    world, rng = worlds.World(), np.random.default_rng(seed)
    return world, worlds.random_groups(world, rng, 6, images=images)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "untied", "qwen3_vl", "qwen3"])
def test_a_pack_scores_every_token_as_transformers_scores_its_trajectory_alone_and_so_do_gradients(
    models: dict[str, Path], kind: str
) -> None:
    world, groups = a_batch(images="none" if kind == "qwen3" else "mixed")
    scores, gradients = runs.our_update(worlds.make_policy(models[kind]), world, groups, model={"freeze": []})
    expected, expected_gradients = runs.oracle_update(models[kind], world, groups)
    assert runs.worst_score_error(scores, expected) < TOLERANCE
    assert runs.relative_gradient_error(gradients, expected_gradients) < TOLERANCE


def test_prompts_with_no_one_and_two_images_of_different_aspect_are_in_that_batch() -> None:
    world, groups = a_batch()
    num_images = {len(world.features[group.group.lease.sample.row].image_grid_thw) for group in groups}
    assert num_images == {0, 1, 2}


@pytest.mark.parametrize("budget", [1, 40, 130, 10_000])
@pytest.mark.parametrize("attention_choice", ["auto", "padded"])
def test_scores_and_gradients_do_not_depend_on_micro_batch_size_or_on_sharing_prompts(
    models: dict[str, Path], budget: int, attention_choice: str
) -> None:
    world, groups = a_batch(seed=1)
    sections = {"model": {"freeze": [], "attention": attention_choice}, "optimizer": {"token_budget": budget}}
    scores, gradients = runs.our_update(worlds.make_policy(models["qwen2_5_vl"]), world, groups, **sections)
    expected, expected_gradients = runs.oracle_update(models["qwen2_5_vl"], world, groups)
    assert runs.worst_score_error(scores, expected) < TOLERANCE
    assert runs.relative_gradient_error(gradients, expected_gradients) < TOLERANCE


def test_the_order_in_which_groups_arrive_changes_no_bit(models: dict[str, Path]) -> None:
    world, groups = a_batch(seed=2)
    policy = worlds.make_policy(models["qwen2_5_vl"])
    _, forwards = runs.our_update(policy, world, groups, model={"freeze": []})
    _, backwards = runs.our_update(policy, world, groups[::-1], model={"freeze": []})
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_a_frozen_tower_gives_the_language_model_the_same_gradients_as_a_trained_one(models: dict[str, Path]) -> None:
    world, groups = a_batch(seed=3)
    folder = models["qwen2_5_vl"]
    _, trained = runs.our_update(worlds.make_policy(folder), world, groups, model={"freeze": []})
    frozen_policy = worlds.make_policy(folder, freeze=("vit", "connector"))
    _, frozen = runs.our_update(frozen_policy, world, groups, model={"freeze": ["vit", "connector"]})
    assert frozen.keys() == {name for name in trained if not name.startswith("model.visual.")}
    assert runs.relative_gradient_error(frozen, {name: trained[name] for name in frozen}) < TOLERANCE


def test_temperature_is_applied_as_the_sampler_applied_it(models: dict[str, Path]) -> None:
    world, groups = a_batch(seed=4)
    policy = worlds.make_policy(models["qwen2_5_vl"], temperature=0.7)
    scores, gradients = runs.our_update(policy, world, groups, model={"freeze": []})
    expected, expected_gradients = runs.oracle_update(models["qwen2_5_vl"], world, groups, temperature=0.7)
    assert runs.worst_score_error(scores, expected) < 2 * TOLERANCE
    assert runs.relative_gradient_error(gradients, expected_gradients) < TOLERANCE


def test_flex_attention_sees_the_same_blocks_as_the_cpu_kernel(models: dict[str, Path]) -> None:
    world, groups = a_batch(seed=5)
    learner, update, _, _ = runs.prepared(worlds.make_policy(models["qwen2_5_vl"]), world, groups, model={"freeze": []})
    cpu = runs.scores_of(learner, update)
    policy: Policy = worlds.make_policy(models["qwen2_5_vl"], attention="flex")
    assert policy.family.decoder(policy.model).config._attn_implementation == attention.FLEX
    learner, update, _, _ = runs.prepared(policy, world, groups, model={"freeze": []})
    flex = runs.scores_of(learner, update)
    assert runs.worst_score_error(flex, cpu) < TOLERANCE


def test_activation_checkpointing_changes_no_gradient(models: dict[str, Path]) -> None:
    world, groups = a_batch(seed=6)
    _, plain = runs.our_update(worlds.make_policy(models["qwen2_5_vl"]), world, groups, model={"freeze": []})
    policy = worlds.make_policy(models["qwen2_5_vl"], activation_checkpointing=True)
    _, changed = runs.our_update(policy, world, groups, model={"freeze": []})
    assert runs.relative_gradient_error(changed, plain) < TOLERANCE
