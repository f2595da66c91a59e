"""AdamW with a rate per module, warm-up that starts above 0, global clipping, and no step on a non-finite gradient."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.families import Family
from vtriune.config.tree import Optimizer as Section


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one call of `Optimizer.step` saw and did."""

    norms: dict[str, float]
    """L2 norm of the gradient before clipping: `` (all), each module, `layer/<i>`; NaN or infinite when the gradient is."""
    rates: dict[str, float]
    is_skipped: bool


class Optimizer:
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
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._keys = [(family.module_of(name), family.layer_of(name)) for name, _ in self._named]
        self._rates = rates_of(section)
        members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
        for (_, parameter), (module, _layer) in zip(self._named, self._keys, strict=True):
            members[module, parameter.ndim >= 2].append(parameter)
        groups = [
            {
                "params": parameters,
                "lr": self._rates[module],
                "module": module,
                "weight_decay": section.weight_decay if is_matrix else 0.0,
            }
            for (module, is_matrix), parameters in members.items()
        ]
        self.adamw = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=True)
        # There from the start, because torch's get_optimizer_state_dict fills an empty state by a step with zero gradients: a
        # checkpoint before the first update would shift Adam's bias correction by one.
        for _, parameter in self._named:
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=_local(parameter).device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        self._move_state(to_host=True)

    def step(self, update: int, num_updates_total: int) -> StepResult:
        """Clip, step and clear the gradients of update number `update` (from 0) of the whole run.

        A non-finite norm leaves parameters and Adam's state as they are.
        """
        factor = rate_factor(update, self._section.warmup, self._section.decay, num_updates_total)
        rates: dict[str, float] = {}
        for group in self.adamw.param_groups:
            group["lr"] = rates[group["module"]] = self._rates[group["module"]] * factor
        squares = self._squares()
        norms = self._norms(squares)
        is_finite = math.isfinite(norms[""])
        if is_finite:
            scale = self._section.clip_norm / (norms[""] + 1e-6)
            if scale < 1:
                torch._foreach_mul_([_local(grad) for grad in self._grads()], scale)
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
        return [parameter.grad for _, parameter in self._named if parameter.grad is not None]

    def _squares(self) -> Tensor:
        """Sum of squares of every parameter's gradient over all ranks, float64 (number of trainable parameters,)."""
        squares = torch.zeros(len(self._named), dtype=torch.float64, device=_local(self._named[0][1]).device)
        present = [index for index, (_, parameter) in enumerate(self._named) if parameter.grad is not None]
        if present:
            norms = torch._foreach_norm([_local(grad) for grad in self._grads()])
            squares[present] = torch.stack(norms).to(torch.float64).square()
        if self._group is not None and dist.get_world_size(self._group) > 1:
            dist.all_reduce(squares, group=self._group)
        return squares

    def _norms(self, squares: Tensor) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for square, (module, layer) in zip(squares.tolist(), self._keys, strict=True):
            sums[""] += square
            sums[module] += square
            if layer is not None:
                sums[f"layer/{layer}"] += square
        return {key: math.sqrt(value) if value >= 0 else math.nan for key, value in sums.items()}


def rate_factor(
    update: int, warmup: float, decay: Literal["none", "linear", "cosine"], num_updates_total: int
) -> float:
    """Share of the full rate at `update`: linear over the first ceil(warmup · total) updates, of which update 0 already has 1/n;
    then 1, or falling. The last update still has a rate above 0; so has every later one, should there be more than planned."""
    num_warmup = math.ceil(warmup * num_updates_total)
    if update < num_warmup:
        return (update + 1) / num_warmup
    num_falling = num_updates_total - num_warmup
    left = max(1, num_updates_total - update) / max(1, num_falling)
    if decay == "linear":
        return left
    return 0.5 * (1 - math.cos(math.pi * left)) if decay == "cosine" else 1.0


def rates_of(section: Section) -> Mapping[str, float]:
    """Full learning rate per module."""
    return {
        module: section.lr if rate is None else rate
        for module, rate in (("vit", section.lr_vit), ("connector", section.lr_connector), ("llm", section.lr_llm))
    }


def _local(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this rank; an ordinary tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
