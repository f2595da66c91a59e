"""Sums, maxima and samples of one training call, reduced over ranks once at its end → flat metric keys. Called by `learner.learner`."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from learner.batch.microbatch import MicroBatch
from learner.losses import Surrogate

_MEANS = ("entropy", "kl/reference", "ratio/mean", "clip/low", "clip/high", "weight/mean", "weight/capped")
"""Metrics that are a sum over tokens, divided by their number."""
_SUMS = (*_MEANS, "tokens", "loss", "rows", "rows_alone", "capacity")
_MAXIMA = ("ratio", "minus_ratio", "weight", "vit_s")


class TrainingMetrics:
    """Every rank must construct it with the same `sources`, since keys are reduced by position."""

    def __init__(self, sources: Sequence[str]):
        self.sources = tuple(sources)
        of_sources = (f"source/{name}/{what}" for name in sources for what in ("tokens", "entropy"))
        self._sums = dict.fromkeys((*_SUMS, *of_sources), 0.0)
        self._maxima = dict.fromkeys(_MAXIMA, float("-inf"))
        self._mismatch: list[np.ndarray] = []
        """|log π_learner − log π_b| of tokens sampled at the learner's own version."""

    def add(self, name: str, value: float) -> None:
        self._sums[name] += value

    def total(self, name: str) -> float:
        """This rank's sum so far; all ranks' after `reduced`."""
        return self._sums[name]

    def peak(self, name: str, value: float) -> None:
        self._maxima[name] = max(self._maxima[name], value)

    def observe(
        self,
        micro: MicroBatch,
        surrogate: Surrogate,
        weight: Tensor,
        prox: Tensor,
        entropy: Tensor,
        cap: float,
        token_budget: int,
    ) -> None:
        """Everything about one micro-batch that needs no gradient. `entropy` is detached, (R,); `cap` is the correction's C."""
        ratio = surrogate.ratio
        for name, values in (
            ("entropy", entropy), ("ratio/mean", ratio), ("clip/low", surrogate.clipped_low), ("clip/high", surrogate.clipped_high),
            ("weight/mean", weight), ("weight/capped", weight >= cap if cap else torch.zeros(1)),
        ):  # fmt: skip
            self.add(name, float(values.sum()))
        self.peak("ratio", float(ratio.max()))
        self.peak("minus_ratio", -float(ratio.min()))
        self.peak("weight", float(weight.max()))
        self.add("tokens", len(ratio))
        self.add("rows", micro.pack.num_rows)
        self.add("capacity", token_budget)
        self.add("rows_alone", micro.pack.num_rows_alone)
        totals = np.bincount(micro.source, entropy.cpu().numpy(), len(self.sources))
        counts = np.bincount(micro.source, minlength=len(self.sources))
        for name, total, count in zip(self.sources, totals, counts, strict=True):
            self.add(f"source/{name}/entropy", float(total))
            self.add(f"source/{name}/tokens", float(count))
        self._mismatch.append((prox - micro.sampler)[micro.is_own].abs().cpu().numpy())

    def reduced(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Reduce over `group` and name the results. What was not measured is left out: no mean or maximum is over nothing."""
        self._reduce(group)
        sums, maxima = self._sums, self._maxima
        result = {"tokens/trained": sums["tokens"], "packing/rows": sums["rows"], **self._mismatch_metrics(group)}
        if maxima["vit_s"] > float("-inf"):
            result["time/vit_s"] = maxima["vit_s"]
        if not sums["tokens"]:
            return result
        result |= {key: sums[key] / sums["tokens"] for key in _MEANS}
        for name in self.sources:
            if tokens := sums[f"source/{name}/tokens"]:
                result[f"source/{name}/entropy"] = sums[f"source/{name}/entropy"] / tokens
        result |= {
            "ratio/max": maxima["ratio"],
            "ratio/min": -maxima["minus_ratio"],
            "weight/max": maxima["weight"],
            "packing/fill": sums["rows"] / sums["capacity"],
            "packing/shared": 1 - sums["rows"] / sums["rows_alone"],
        }
        return result

    def _mismatch_metrics(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        local = np.concatenate(self._mismatch) if self._mismatch else np.zeros(0, np.float32)
        values = _gathered(torch.from_numpy(local.astype(np.float32)), group).numpy()
        metrics = {"mismatch/tokens": float(len(values))}
        if len(values):
            metrics |= {
                "mismatch/max_abs": float(values.max()),
                "mismatch/p95": float(np.percentile(values, 95)),
                "mismatch/outside_0.1": float(np.mean(np.expm1(values) > 0.1)),
            }
        return metrics

    def _reduce(self, group: dist.ProcessGroup | None) -> None:
        if _world(group) == 1:
            return
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        maxima = torch.tensor(list(self._maxima.values()), dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        self._sums = dict(zip(self._sums, sums.tolist(), strict=True))
        self._maxima = dict(zip(self._maxima, maxima.tolist(), strict=True))


def _world(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _gathered(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' float32 vectors, one after another; lengths may differ."""
    if _world(group) == 1:
        return values
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(_world(group))]
    dist.all_gather(lengths, torch.tensor([len(values)]), group=group)
    longest = int(max(length.item() for length in lengths))
    padded = [torch.zeros(longest) for _ in lengths]
    dist.all_gather(padded, torch.cat([values, torch.zeros(longest - len(values))]), group=group)
    return torch.cat([part[: int(length)] for part, length in zip(padded, lengths, strict=True)])
