"""Sums, maxima and samples of one training call, reduced over ranks once at its end → flat metric keys. Called by `learner.learner`."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from learner.losses import Surrogate
from learner.microbatch import MicroBatch

_SUMS = (
    "tokens", "loss", "entropy", "kl", "ratio", "clip_low", "clip_high", "weight", "weight_capped",
    "own", "outside", "rows", "rows_alone", "capacity",
)  # fmt: skip
_MAXIMA = ("ratio", "minus_ratio", "weight", "vit_s")


class Tally:
    """Every rank must construct it with the same `sources`, since keys are reduced by position."""

    def __init__(self, sources: Sequence[str]):
        self.sources = tuple(sources)
        self._names = (*_SUMS, *(f"source/{name}/{what}" for name in sources for what in ("tokens", "entropy")))
        self._sums: dict[str, float] = dict.fromkeys(self._names, 0.0)
        self._maxima: dict[str, float] = dict.fromkeys(_MAXIMA, float("-inf"))
        self._mismatch: list[np.ndarray] = []

    def add(self, name: str, value: float) -> None:
        self._sums[name] += value

    def total(self, name: str) -> float:
        """This rank's sum so far; all ranks' after `metrics`."""
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
            ("ratio", ratio), ("clip_low", surrogate.clipped_low), ("clip_high", surrogate.clipped_high), ("weight", weight),
            ("weight_capped", weight >= cap if cap else torch.zeros(1)),
        ):  # fmt: skip
            self.add(name, float(values.sum()))
        self.peak("ratio", float(ratio.max()))
        self.peak("minus_ratio", -float(ratio.min()))
        self.peak("weight", float(weight.max()))
        self.add("tokens", len(ratio))
        self.add("rows", micro.pack.num_rows)
        self.add("capacity", token_budget)
        self.add("rows_alone", micro.pack.num_rows_alone)
        self.add_entropy(entropy.cpu().numpy(), micro.source)
        own = micro.is_own
        self.add_mismatch((prox - micro.sampler)[own].abs().cpu().numpy())

    def add_entropy(self, entropy: np.ndarray, source: np.ndarray) -> None:
        """Per-token entropies (R,) and the source of each."""
        self.add("entropy", float(entropy.sum()))
        totals = np.bincount(source, entropy, len(self.sources))
        for name, total, count in zip(
            self.sources, totals, np.bincount(source, minlength=len(self.sources)), strict=True
        ):
            self.add(f"source/{name}/entropy", float(total))
            self.add(f"source/{name}/tokens", float(count))

    def add_mismatch(self, difference: np.ndarray) -> None:
        """|log π_learner − log π_b| of tokens sampled at the learner's own version."""
        self._mismatch.append(difference)
        self.add("own", len(difference))
        self.add("outside", float((np.expm1(difference) > 0.1).sum()))

    def metrics(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Reduce over `group` and name the results; a quantity without tokens is left out."""
        self._reduce(group)
        sums, tokens = self._sums, max(self._sums["tokens"], 1.0)
        result: dict[str, float] = defaultdict(float)
        for key, name in (
            ("entropy", "entropy"), ("kl/reference", "kl"), ("ratio/mean", "ratio"), ("clip/low", "clip_low"),
            ("clip/high", "clip_high"), ("weight/mean", "weight"), ("weight/capped", "weight_capped"),
        ):  # fmt: skip
            result[key] = sums[name] / tokens
        for name in self.sources:
            if sums[f"source/{name}/tokens"]:
                result[f"source/{name}/entropy"] = sums[f"source/{name}/entropy"] / sums[f"source/{name}/tokens"]
        result["tokens/trained"] = sums["tokens"]
        result["ratio/max"], result["ratio/min"] = self._maxima["ratio"], -self._maxima["minus_ratio"]
        result["weight/max"] = self._maxima["weight"]
        result["time/vit_s"] = self._maxima["vit_s"]
        result["packing/fill"] = sums["rows"] / max(sums["capacity"], 1.0)
        result["packing/rows"] = sums["rows"]
        result["packing/shared"] = 1 - sums["rows"] / max(sums["rows_alone"], 1.0)
        result.update(self._mismatch_metrics(group))
        return {key: value for key, value in result.items() if np.isfinite(value)}

    def _mismatch_metrics(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        local = np.concatenate(self._mismatch) if self._mismatch else np.zeros(0, np.float32)
        values = _gathered(torch.from_numpy(local.astype(np.float32)), group).numpy()
        # Without such a token nothing was measured; `mismatch/tokens` says so, and 0 keeps the key in every line.
        return {
            "mismatch/tokens": float(len(values)),
            "mismatch/max_abs": float(values.max(initial=0.0)),
            "mismatch/p95": float(np.percentile(values, 95)) if len(values) else 0.0,
            "mismatch/outside_0.1": self._sums["outside"] / max(self._sums["own"], 1.0),
        }

    def _reduce(self, group: dist.ProcessGroup | None) -> None:
        if _world(group) == 1:
            return
        sums = torch.tensor([self._sums[name] for name in self._names], dtype=torch.float64)
        maxima = torch.tensor([self._maxima[name] for name in _MAXIMA], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        self._sums = dict(zip(self._names, sums.tolist(), strict=True))
        self._maxima = dict(zip(_MAXIMA, maxima.tolist(), strict=True))


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
