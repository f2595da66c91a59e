"""The lean RMS norm is transformers' module, forwards and backwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from learner.model.norms import rms_norm, use_lean_norms
from tests.learner import worlds
from vtriune.torchvision_schemas import define_missing_schemas


def a_norm(width: int, epsilon: float = 1e-6) -> Any:
    """transformers' own."""
    define_missing_schemas()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    return Qwen2_5_VLRMSNorm(width, epsilon)


@pytest.mark.parametrize("shape", [(1, 7, 32), (1, 5, 3, 8), (2, 1, 4)])
def test_values_and_gradients_are_transformers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain, lean = a_norm(shape[-1], 1e-5), a_norm(shape[-1], 1e-5)
    with torch.no_grad():
        plain.weight.normal_()
        lean.weight.copy_(plain.weight)
    use_lean_norms(lean)
    hidden, slope = torch.randn(shape, requires_grad=True), torch.randn(shape)
    results = []
    for module in (plain, lean):
        hidden.grad = None
        out = module(hidden)
        out.backward(slope)
        results.append((out.detach(), hidden.grad, module.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_formula_in_float64() -> None:
    torch.manual_seed(1)
    hidden, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,)))
    assert gradcheck(lambda h, w: rms_norm(h, w, 1e-6), (hidden, weight))


def test_other_types_run_transformers_own_module() -> None:
    lean = a_norm(8).bfloat16()
    expected = lean(torch.ones(2, 8, dtype=torch.bfloat16) * 3)
    use_lean_norms(lean)
    found = lean(torch.ones(2, 8, dtype=torch.bfloat16) * 3)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3"])
def test_every_norm_of_a_decoder_on_the_cpu_is_lean(models: dict[str, Path], kind: str) -> None:
    policy = worlds.make_policy(models[kind])
    decoder: Any = policy.family.decoder(policy.model)
    norms = [module for module in decoder.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) >= 5
    assert all("forward" in vars(module) for module in norms)
