"""Features of a frozen tower on disk: the same bits, one computation for all runs, nothing stale, nothing damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from learner.batch.feature_cache import FeatureCache, identity_of
from learner.learner import Learner
from tests.learner import runs, worlds
from vtriune.config.check import check
from vtriune.config.load import ConfigError
from vtriune.messages import SampleRef, ScoredGroup

TOWER = ("vit", "connector")


def a_world() -> tuple[worlds.World, list[ScoredGroup]]:
    world = worlds.World()
    return world, worlds.random_groups(world, np.random.default_rng(5), 6)


def a_learner(model: Path, cache: Path | str, world: worlds.World) -> tuple[Learner, list[int]]:
    """A fresh learner as a new run has it, and how many images each of its tower calls encodes."""
    sections: dict[str, Any] = {"path": str(model), "freeze": list(TOWER), "feature_cache": str(cache)}
    config = worlds.config_with(model=sections, optimizer={"lr": 1e-2, "token_budget": 60})
    learner = Learner(config, worlds.make_policy(model, freeze=TOWER), world)
    calls: list[int] = []
    encode = learner.policy.encode
    learner.policy.encode = lambda pixels, grids: calls.append(len(grids)) or encode(pixels, grids)  # type: ignore[method-assign]
    return learner, calls


def train(learner: Learner, groups: list[ScoredGroup]) -> dict[str, torch.Tensor]:
    for group in groups:
        learner.deliver(group)
    learner.train(runs.order_of(groups))
    return {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_second_run_has_the_same_bits_and_never_calls_the_tower(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    world, groups = a_world()
    plain, _ = a_learner(models[kind], "", world)
    expected = train(plain, groups)
    first, first_calls = a_learner(models[kind], tmp_path, world)
    second, second_calls = a_learner(models[kind], tmp_path, world)
    found = [train(first, groups), train(second, groups)]
    assert sum(first_calls) == sum(len(features.image_grid_thw) for features in world.features)
    assert second_calls == []
    for values in found:
        assert all(torch.equal(expected[name], value) for name, value in values.items())


def test_a_cache_that_cannot_be_written_costs_the_tower_again_and_no_run(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, groups = a_world()
    (tmp_path / "file").touch()
    plain, _ = a_learner(models["qwen2_5_vl"], "", world)
    cached, calls = a_learner(models["qwen2_5_vl"], tmp_path / "file" / "cache", world)
    expected, found = train(plain, groups), train(cached, groups)
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    assert calls
    assert caplog.text.count("features cannot be kept in model.feature_cache") == 1


def test_samples_are_looked_up_one_by_one(models: dict[str, Path], tmp_path: Path) -> None:
    world, groups = a_world()
    first, _ = a_learner(models["qwen2_5_vl"], tmp_path, world)
    train(first, groups[:3])
    second, calls = a_learner(models["qwen2_5_vl"], tmp_path, world)
    train(second, groups)
    assert sum(calls) == sum(len(features.image_grid_thw) for features in world.features[3:])


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_file_is_computed_again(
    models: dict[str, Path], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    world, groups = a_world()
    first, _ = a_learner(models["qwen2_5_vl"], tmp_path, world)
    train(first, groups)
    victim = sorted(tmp_path.rglob("*.safetensors"))[0]
    content = victim.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    victim.write_bytes({"truncate": content[:-5], "flip": flipped, "empty": b""}[damage])
    second, calls = a_learner(models["qwen2_5_vl"], tmp_path, world)
    train(second, groups)
    assert calls == [1]
    assert str(victim) in caplog.text
    # Encoded alone, not beside others: matrices of another height may be multiplied by another kernel, which rounds otherwise.
    torch.testing.assert_close(load(victim.read_bytes()), load(content))


def test_whatever_changes_features_changes_the_folder(models: dict[str, Path]) -> None:
    model = models["qwen2_5_vl"]
    policy = worlds.make_policy(model, freeze=TOWER)

    def identity(**data: int) -> str:
        return identity_of(worlds.config_with(model={"path": str(model)}, data=data), policy)

    same = identity()
    assert identity() == same
    assert identity(max_pixels=1 << 20) != same
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1)
        assert identity() == same
        next(policy.model.model.visual.parameters()).view(-1)[0] += 1e-3
    assert identity() != same


def test_weights_that_are_loaded_anew_are_not_served_the_old_ones_features(
    models: dict[str, Path], tmp_path: Path
) -> None:
    world, groups = a_world()
    learner, calls = a_learner(models["qwen2_5_vl"], tmp_path, world)
    train(learner, groups)
    with torch.no_grad():
        for parameter in learner.policy.model.model.visual.parameters():
            parameter.mul_(1.1)
    learner.prompts.forget_features()
    learner.inbox.restore({"consumed": [], "open_from": 0})
    num_calls = len(calls)
    train(learner, groups)
    assert len(calls) > num_calls


def test_writers_of_the_same_sample_leave_one_whole_file(tmp_path: Path) -> None:
    sample, features = SampleRef("store", 12_345), torch.randn(7, 5, dtype=torch.bfloat16)
    for _ in range(2):
        FeatureCache(tmp_path, "id").put(sample, features)
    cache = FeatureCache(tmp_path, "id")
    found = cache.get(sample)
    assert found is not None
    assert torch.equal(found, features)
    assert FeatureCache(tmp_path, "other").get(sample) is None
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "id/store/12/12345.safetensors"
    ]


def test_a_cache_of_features_that_training_changes_is_refused(models: dict[str, Path]) -> None:
    config = worlds.config_with(model={"path": str(models["qwen2_5_vl"]), "freeze": ["vit"], "feature_cache": "cache"})
    with pytest.raises(ConfigError, match=r"model\.feature_cache: 'cache', but features change"):
        check(config)
