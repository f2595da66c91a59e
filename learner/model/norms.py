"""RMS normalisation for the CPU: half the passes over memory of transformers' eight elementwise steps. Used by `learner.model.build`.

With r = (mean x² + ε)^(−½), y = x·r and z = w·y:
    ∂x = r·(w·∂z − y·mean(w·∂z·y))        ∂w = Σ_rows ∂z·y
On accelerators, under `model.compile` and in other types than float32 transformers' own module runs.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def use_lean_norms(decoder: nn.Module) -> None:
    """Let every RMS norm of `decoder` run the function below; parameters and their names stay."""
    for module in decoder.modules():
        # By its name, for want of a mark: transformers' Cohere norms have the same attributes, and subtract the mean.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_forward, module)


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype is torch.float32 and self.weight.dtype is torch.float32:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
    result: Tensor = type(self).forward(self, hidden_states)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale: Tensor = torch.linalg.vecdot(hidden, hidden).div_(hidden.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        normal = hidden * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale, weight = ctx.saved_tensors
        product = grads[0] * normal
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            mean = torch.matmul(product, weight).div_(weight.shape[0]).unsqueeze(-1)
            grad_hidden = torch.mul(grads[0], weight, out=product).addcmul_(normal, mean, value=-1).mul_(scale)
        return grad_hidden, grad_weight, None


rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _RmsNorm.apply
"""z (…, D) of the module's formula from hidden (…, D), weight (D,), both float32, and ε; differentiable in hidden and weight."""
