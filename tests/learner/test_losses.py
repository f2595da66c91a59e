"""Losses against independent statements in float64, and token-level ones against TRL on the same tensors.

`trl_losses.json` holds the values of TRL's `GRPOTrainer._compute_loss`; `python -m tests.learner.record_trl_losses` records it again.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.batch.advantages import advantages
from learner.batch.tokens import Tokens
from learner.losses import LOSSES, Clip, correction_weight, denominator, kl_penalty, old_logprobs
from tests.learner.loss_cases import HIGH, LOW, MAX_TOKENS, tokens

CAP = 2.0


def value_and_gradient(loss: Tensor, inputs: Tokens) -> tuple[float, Tensor]:
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    return float(loss.detach()), gradient


def ours(
    kind: str, inputs: Tokens, *, correction: str = "decoupled", cap: float = 2.0, clip: Clip | None = None
) -> tuple[float, Tensor]:
    surrogate = LOSSES[kind](inputs, old_logprobs(correction, inputs), clip or Clip(LOW, HIGH))
    size = denominator(kind, len(inputs.prox), inputs.num_trajectories, MAX_TOKENS)
    total = (correction_weight(correction, inputs, CAP) * surrogate.loss).sum() / size
    return value_and_gradient(total, inputs)


def stated(
    kind: str, inputs: Tokens, *, correction: str = "decoupled", cap: float = 2.0, dual: float | None = None
) -> tuple[float, Tensor]:
    """The formulas again, token by token over Python lists of scalars."""
    total = torch.zeros((), dtype=torch.float64)
    num_tokens, num_trajectories = len(inputs.prox), inputs.num_trajectories
    for index in range(num_trajectories):
        rows = [t for t in range(num_tokens) if int(inputs.trajectory[t]) == index]
        new = [inputs.logprobs[t] for t in rows]
        prox, behind = [inputs.prox[t] for t in rows], [inputs.behaviour[t] for t in rows]
        old = behind if correction == "none" else prox
        advantage = inputs.advantages[rows[0]]
        ratios = [torch.exp(a - b) for a, b in zip(new, old, strict=True)]
        gaps = [math.exp(float(a - b)) for a, b in zip(prox, behind, strict=True)]
        if correction == "none":
            weights = [1.0] * len(rows)
        elif correction == "decoupled":
            weights = [min(gap, CAP) for gap in gaps]
        elif correction == "tis":
            weights = [min(math.prod(gaps), CAP)] * len(rows)
        else:
            weights = [gap if 0.5 <= gap <= CAP else 0.0 for gap in gaps]
        sequence_ratio = torch.exp(sum(a - b for a, b in zip(new, old, strict=True)) / len(rows))
        for position, weight in enumerate(weights):
            ratio = sequence_ratio if kind == "gspo" else ratios[position]
            if kind == "cispo":
                bounded = min(max(float(ratio), 1 - LOW), 1 + HIGH)
                objective = bounded * advantage * new[position]
            else:
                objective = torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - LOW, 1 + HIGH) * advantage)
                if dual is not None and float(advantage) < 0:
                    objective = torch.maximum(objective, dual * advantage)
            share = {"gspo": num_trajectories * len(rows), "dr_grpo": num_trajectories * MAX_TOKENS}.get(
                kind, num_tokens
            )
            total = total - weight * objective / share
    return value_and_gradient(total, inputs)


@pytest.mark.parametrize("correction", ["none", "decoupled", "tis", "icepop"])
@pytest.mark.parametrize("kind", sorted(LOSSES))
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_every_loss_under_every_correction_is_its_formula(kind: str, correction: str, seed: int) -> None:
    inputs = tokens(seed)
    value, gradient = ours(kind, inputs, correction=correction)
    expected, expected_gradient = stated(kind, inputs, correction=correction)
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-12)
    # GSPO's per-token weights differ within a trajectory under token-level corrections: GSPO-token gives each token its own.
    if kind != "gspo" or correction in ("none", "tis"):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_plain_grpo_is_the_formula_of_the_paper_in_one_line() -> None:
    inputs = tokens(1)
    ratio = torch.exp(inputs.logprobs - inputs.prox)
    objective = torch.min(ratio * inputs.advantages, torch.clamp(ratio, 1 - LOW, 1 + HIGH) * inputs.advantages)
    expected, expected_gradient = value_and_gradient(-objective.sum() / len(ratio), inputs)
    unweighted = Tokens(
        inputs.logprobs, inputs.prox, inputs.prox, inputs.advantages, inputs.trajectory, inputs.num_trajectories
    )
    value, gradient = ours("grpo", unweighted)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_dual_clip_bounds_the_loss_of_bad_trajectories_only(seed: int) -> None:
    inputs = tokens(seed, spread=2.0)
    value, gradient = ours("grpo", inputs, clip=Clip(LOW, HIGH, dual=3.0))
    expected, expected_gradient = stated("grpo", inputs, dual=3.0)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("seed", range(4))
def test_token_level_losses_have_trls_value_and_gradient_on_the_same_tensors(kind: str, seed: int) -> None:
    recorded = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
    expected = recorded["losses"][kind][seed]
    inputs = tokens(seed)
    plain = Tokens(
        inputs.logprobs, inputs.prox, inputs.prox, inputs.advantages, inputs.trajectory, inputs.num_trajectories
    )
    value, gradient = ours(kind, plain)
    assert value == pytest.approx(expected["value"], rel=1e-9)
    assert gradient.tolist() == pytest.approx(expected["gradient"], rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_on_policy_the_gradient_is_the_policy_gradient(kind: str) -> None:
    inputs = tokens(3)
    logprobs = inputs.prox.clone().requires_grad_()
    same = Tokens(logprobs, inputs.prox, inputs.prox, inputs.advantages, inputs.trajectory, inputs.num_trajectories)
    _, gradient = ours(kind, same)
    lengths = torch.bincount(inputs.trajectory)[inputs.trajectory]
    share = {"gspo": inputs.num_trajectories * lengths, "dr_grpo": torch.tensor(inputs.num_trajectories * MAX_TOKENS)}
    torch.testing.assert_close(gradient, -inputs.advantages / share.get(kind, torch.tensor(len(logprobs))))


def test_log_ratios_are_clamped_so_that_no_weight_overflows() -> None:
    far = torch.tensor([-200.0, -1.0])
    inputs = Tokens(
        torch.tensor([-1.0, -200.0]), torch.tensor([-1.0, -200.0]), far, torch.ones(2), torch.tensor([0, 1]), 2
    )
    for correction in ("decoupled", "tis", "icepop"):
        weight = correction_weight(correction, inputs, 1e30)
        assert torch.isfinite(weight).all()
        assert float(weight.max()) <= math.exp(20) * 1.001


@given(st.lists(st.floats(-3, 0), min_size=2, max_size=6), st.lists(st.floats(-3, 0), min_size=2, max_size=6))
@settings(deadline=None)
def test_kl_penalties_are_their_estimators(new: list[float], reference: list[float]) -> None:
    size = min(len(new), len(reference))
    p, q = torch.tensor(new[:size], dtype=torch.float64), torch.tensor(reference[:size], dtype=torch.float64)
    torch.testing.assert_close(kl_penalty("k1", p, q), p - q)
    torch.testing.assert_close(kl_penalty("mse", p, q), (p - q) ** 2 / 2)
    torch.testing.assert_close(kl_penalty("k3", p, q), torch.exp(q - p) - (q - p) - 1, atol=1e-12, rtol=1e-9)


def test_k3_is_unbiased_for_the_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_penalty(kind, p.log(), q.log())).sum(), exact)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
@settings(deadline=None)
def test_advantages_are_torchs_standardised_rewards_and_sum_to_zero(rewards: list[float]) -> None:
    values = advantages(rewards)
    tensor = torch.tensor(rewards, dtype=torch.float64)
    expected = (tensor - tensor.mean()) / (tensor.std() + 1e-6)
    assert np.allclose(values, expected, atol=1e-6)
    assert abs(values.sum()) < 1e-6
    assert np.allclose(advantages(rewards, scale_by_std=False), tensor - tensor.mean(), atol=1e-12)


@pytest.mark.parametrize("rewards", [[], [0.7], [0.1] * 8, [1 / 3] * 7])
def test_groups_without_contrast_have_advantages_of_exactly_zero(rewards: list[float]) -> None:
    assert advantages(rewards).tolist() == [0.0] * len(rewards)
