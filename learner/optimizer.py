"""AdamW with a rate per module, warm-up that starts above 0, global clipping, and no step on a non-finite gradient."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.model.families import Family
from learner.model.sharding import local
from vtriune.config.tree import Optimizer as Section


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one call of `PolicyOptimizer.step` saw and did."""

    norms: dict[str, float]
    """L2 norm of the gradient before clipping: `` (all), each module, `layer/<i>`; NaN or infinite when the gradient is."""
    rates: dict[str, float]
    is_skipped: bool


class PolicyOptimizer:
    """Owns torch's AdamW over the trainable parameters of `model`.

    Weight decay applies to matrices only: norms and biases have no scale to shrink. Every rank holds its shard of every
    parameter; norms are reduced over `group`, so that all ranks scale and skip alike. `keeps_state_on_host` moves Adam's
    moments to the parameters' device for the step only.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        section: Section,
        group: dist.ProcessGroup | None = None,
        *,
        keeps_state_on_host: bool = False,
    ):
        self._section, self._group, self._keeps_state_on_host = section, group, keeps_state_on_host
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = list(named.values())
        self._keys = [(family.module_of(name), family.layer_of(name)) for name in named]
        rates = {"vit": section.lr_vit, "connector": section.lr_connector, "llm": section.lr_llm}
        self._rates = {module: section.lr if rate is None else rate for module, rate in rates.items()}
        members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
        for parameter, (module, _layer) in zip(self._parameters, self._keys, strict=True):
            members[module, parameter.ndim >= 2].append(parameter)
        groups = [
            {"params": parameters, "module": module, "weight_decay": section.weight_decay if is_matrix else 0.0}
            for (module, is_matrix), parameters in members.items()
        ]
        self.adamw = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=True)
        # There from the start, because torch's get_optimizer_state_dict fills an empty state by a step with zero gradients: a
        # checkpoint before the first update would shift Adam's bias correction by one.
        for parameter in self._parameters:
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local(parameter).device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        self._move_state(to_host=True)

    def step(self, begin: float, end: float) -> StepResult:
        """Clip, step and clear the gradients of the update that takes the run's progress from `begin` to `end`.

        A non-finite norm leaves parameters and Adam's state as they are.
        """
        factor = rate_factor(begin, end, self._section.warmup, self._section.decay)
        rates: dict[str, float] = {}
        for group in self.adamw.param_groups:
            group["lr"] = rates[group["module"]] = self._rates[group["module"]] * factor
        norms = self._norms()
        is_finite = math.isfinite(norms[""])
        if is_finite:
            scale = self._section.clip_norm / (norms[""] + 1e-6)
            if scale < 1:
                torch._foreach_mul_([local(grad) for grad in self._grads()], scale)
            self._move_state(to_host=False)
            self.adamw.step()
            self._move_state(to_host=True)
        self.adamw.zero_grad(set_to_none=True)
        return StepResult(norms, rates, not is_finite)

    def _move_state(self, *, to_host: bool) -> None:
        if not self._keeps_state_on_host:
            return
        for parameter, state in self.adamw.state.items():
            device = torch.device("cpu") if to_host else parameter.device
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(device)

    def _grads(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _squares(self) -> Tensor:
        """Sum of squares of every parameter's gradient over all ranks, float64 (number of trainable parameters,)."""
        squares = torch.zeros(len(self._parameters), dtype=torch.float64, device=local(self._parameters[0]).device)
        present = [index for index, parameter in enumerate(self._parameters) if parameter.grad is not None]
        if present:
            norms = torch._foreach_norm([local(grad) for grad in self._grads()])
            squares[present] = torch.stack(norms).to(torch.float64).square()
        if self._group is not None and dist.get_world_size(self._group) > 1:
            dist.all_reduce(squares, group=self._group)
        return squares

    def _norms(self) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for square, (module, layer) in zip(self._squares().tolist(), self._keys, strict=True):
            sums[""] += square
            sums[module] += square
            if layer is not None:
                sums[f"layer/{layer}"] += square
        return {key: math.sqrt(value) if value >= 0 else math.nan for key, value in sums.items()}


def rate_factor(begin: float, end: float, warmup: float, decay: Literal["none", "linear", "cosine"]) -> float:
    """Share of the full rate for the update that takes the run's progress from `begin` to `end`, in (0, 1].

    It rises linearly with `end` up to `warmup`: the first update has a rate. Then it is 1, or falls with `begin` towards 0 at the
    end of the run: the last update has one, too.
    """
    if end < warmup:
        return end / warmup
    left = 1.0 if begin <= warmup else (1.0 - begin) / (1.0 - warmup)
    if decay == "linear":
        return left
    return 0.5 * (1 - math.cos(math.pi * left)) if decay == "cosine" else 1.0
