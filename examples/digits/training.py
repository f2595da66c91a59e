"""One phase of the warm start on several ranks: AdamW, warm-up then cosine, gradients averaged, a checkpoint every minute.

Ranks draw different batches and hold the same weights. Matrix products are in bfloat16, which processors with AVX-512 BF16 or AMX
compute six times as fast as float32; parameters, sums and losses stay float32. Called by the warm start.
"""

import logging
import math
import pathlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from vtriune import whole_files

log = logging.getLogger(__name__)
LOG_EVERY = 100
SAVE_EVERY_S = 60.0
Step = Callable[[], tuple[torch.Tensor, dict[str, float]]]
"""One batch: the loss to descend and figures for the log."""


class Phase:
    """Trains modules in place, from the phase's checkpoint if there is one."""

    def __init__(
        self, modules: Sequence[torch.nn.Module], checkpoint: pathlib.Path, num_steps: int, peak_rate: float
    ) -> None:
        self.modules = torch.nn.ModuleList(modules)
        self.checkpoint, self.num_steps, self.peak_rate = checkpoint, num_steps, peak_rate
        self.parameters = list(self.modules.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.02)
        self.step = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def run(self, batch: Step) -> None:
        """Train from the current step to the last."""
        sums: dict[str, list[float]] = defaultdict(list)
        started, first, last_saved = time.monotonic(), self.step, time.monotonic()
        while self.step < self.num_steps:
            self._set_rate()
            with torch.autocast("cpu", torch.bfloat16):
                loss, figures = batch()
            self._descend(loss)
            for name, value in figures.items():
                sums[name].append(value)
            is_last = self.step == self.num_steps
            if self.step % LOG_EVERY == 0 or is_last:
                told = " ".join(f"{name}={sum(values) / len(values):.3f}" for name, values in sorted(sums.items()))
                pace = (time.monotonic() - started) / (self.step - first)
                log.info("%s %d/%d %.3f s/step %s", self.checkpoint.stem, self.step, self.num_steps, pace, told)
                sums.clear()
            if time.monotonic() - last_saved > SAVE_EVERY_S or is_last:
                self._write()
                last_saved = time.monotonic()

    def _set_rate(self) -> None:
        """100 steps of warm-up, cosine to a fiftieth of the peak."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.step / self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * cosine)

    def _descend(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if dist.get_world_size() > 1:
            # A batch may leave a head without a gradient on one rank.
            grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters]
            flat = torch.cat([grad.reshape(-1) for grad in grads]) / dist.get_world_size()
            dist.all_reduce(flat)
            for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1

    def _write(self) -> None:
        """Replace the checkpoint in one rename; rank 0 only."""
        if dist.get_rank():
            return
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with whole_files.replacing(self.checkpoint) as partial:
            torch.save(state, partial)
