"""Warm-up, clipping, skipping, norms and rates per module."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.model.build import ModelError
from learner.model.families import UnknownModel, family_of
from learner.optimizer import PolicyOptimizer, rate_factor
from tests.learner import worlds
from vtriune.config.tree import Optimizer as Section
from vtriune.run.schedule import Progress, WorkDone


@st.composite
def updates_of_a_run(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Progress before and after each update of a run that makes another number of updates a batch whenever it likes."""
    counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=40))
    progress = Progress("versions", len(counts))
    return [
        pair
        for version, count in enumerate(counts)
        for pair in pairwise(progress.through(1, count, WorkDone(version, 0)))
    ]


@given(updates_of_a_run(), st.floats(0, 1))
@settings(deadline=None)
def test_warm_up_starts_above_zero_rises_and_stays_at_one_whatever_the_updates_a_batch(
    run: list[tuple[float, float]], share: float
) -> None:
    factors = [rate_factor(begin, end, share, "none") for begin, end in run]
    assert factors[0] > 0
    assert factors == sorted(factors)
    assert all(factor == 1 for (_, end), factor in zip(run, factors, strict=True) if end >= share)
    assert factors[-1] == 1


@given(updates_of_a_run(), st.floats(0, 0.9), st.sampled_from(["linear", "cosine"]))
@settings(deadline=None)
def test_after_the_warm_up_a_decaying_rate_follows_progress_from_the_full_one_to_the_last_update(
    run: list[tuple[float, float]], share: float, decay: Any
) -> None:
    for begin, end in run:
        factor = rate_factor(begin, end, share, decay)
        left = (1 - begin) / (1 - share)
        falling = left if decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        assert 0 < factor <= 1
        assert factor == (pytest.approx(min(1, falling) if begin > share else 1) if end >= share else end / share)


@pytest.mark.parametrize(("updates", "versions"), [(1, 40), (4, 10)])
def test_a_run_of_one_mode_warms_up_over_the_first_twentieth_of_its_updates(updates: int, versions: int) -> None:
    progress = Progress("versions", versions)
    ends = [p for version in range(versions) for p in progress.through(8, updates, WorkDone(version, 0))[1:]]
    factors = [rate_factor(end - 1 / 40, end, 0.05, "none") for end in ends]
    assert factors == pytest.approx([0.5] + [1.0] * 39)


def a_model(folder: Path) -> torch.nn.Module:
    return worlds.make_policy(folder).model


def set_gradients(model: torch.nn.Module, scale: float = 1.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def test_a_step_is_torchs_adamw_after_torchs_clipping(models: dict[str, Path]) -> None:
    ours, theirs = a_model(models["qwen2_5_vl"]), a_model(models["qwen2_5_vl"])
    section = Section(lr=1e-2, warmup=0.0, weight_decay=0.1, clip_norm=0.5)
    optimizer = PolicyOptimizer(ours, family_of("qwen2_5_vl"), section)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    rest = [p for p in theirs.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.999)
    )
    for step in range(3):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        result = optimizer.step(step / 10, (step + 1) / 10)
        assert result.norms[""] == pytest.approx(float(norm), rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing_and_is_reported(models: dict[str, Path], poison: float) -> None:
    model = a_model(models["qwen2_5_vl"])
    optimizer = PolicyOptimizer(model, family_of("qwen2_5_vl"), Section(lr=1e-2))
    set_gradients(model)
    optimizer.step(0.0, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model)
    next(model.parameters()).grad.view(-1)[0] = poison
    assert optimizer.step(0.1, 0.2).is_skipped
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_norms_per_module_and_layer_make_up_the_whole(models: dict[str, Path]) -> None:
    model = a_model(models["qwen2_5_vl"])
    optimizer = PolicyOptimizer(model, family_of("qwen2_5_vl"), Section(lr=1e-3))
    set_gradients(model)
    expected = dict.fromkeys(("vit", "connector", "llm"), 0.0)
    for name, parameter in model.named_parameters():
        expected[family_of("qwen2_5_vl").module_of(name)] += float(parameter.grad.square().sum())
    norms = optimizer.step(0.0, 0.1).norms
    for module in ("vit", "connector", "llm"):
        assert norms[module] == pytest.approx(math.sqrt(expected[module]), rel=1e-5)
    assert norms[""] ** 2 == pytest.approx(sum(norms[module] ** 2 for module in ("vit", "connector", "llm")))
    assert {"layer/0", "layer/1"} < norms.keys()
    assert norms["layer/0"] ** 2 + norms["layer/1"] ** 2 < norms["llm"] ** 2


def test_each_module_has_its_own_rate_and_frozen_ones_have_none(models: dict[str, Path]) -> None:
    policy = worlds.make_policy(models["qwen2_5_vl"], freeze=("vit",))
    optimizer = PolicyOptimizer(policy.model, policy.family, Section(lr=1e-3, lr_connector=1e-4, warmup=0.0))
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    result = optimizer.step(0.0, 0.1)
    assert result.rates == {"connector": 1e-4, "llm": 1e-3}
    assert result.norms.keys() >= {"connector", "llm"}
    assert "vit" not in result.norms


@pytest.mark.parametrize(
    ("kind", "name", "module"),
    [
        ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv.weight", "vit"),
        ("qwen2_5_vl", "model.visual.patch_embed.proj.weight", "vit"),
        ("qwen2_5_vl", "model.visual.merger.mlp.0.weight", "connector"),
        ("qwen2_5_vl", "model.language_model.embed_tokens.weight", "llm"),
        ("qwen2_5_vl", "lm_head.weight", "llm"),
        ("qwen3_vl", "model.visual.deepstack_merger_list.0.norm.weight", "connector"),
        ("qwen3", "model.layers.1.mlp.up_proj.weight", "llm"),
    ],
)
def test_parameter_names_belong_to_modules_as_the_paper_splits_them(kind: str, name: str, module: str) -> None:
    assert family_of(kind).module_of(name) == module


def test_unknown_models_and_nothing_left_to_train_are_errors_that_say_what_is_known(
    models: dict[str, Path],
) -> None:
    with pytest.raises(UnknownModel, match="qwen2_5_vl"):
        family_of("llama")
    with pytest.raises(ModelError, match="nothing to train"):
        worlds.make_policy(models["qwen3"], freeze=("llm",))
