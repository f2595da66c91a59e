"""Rewards of vision-language samples: every verifier of V-Triune and more, each score explained by named components.

    from verifiers import RewardSpec, score

    spec = RewardSpec(ground_truth="42", verifier="mathverify")
    score("<think>6·7</think><answer>\\\\boxed{42}</answer>", spec).reward    # 1.0

`score` and `score_batch` run in the calling process. `verifiers.pool.pool` puts supervised processes around them, which a
training run needs; `python -m verifiers.serve` and `python -m verifiers.rescore` serve them over HTTP and over files.
Imports nothing heavier than msgspec: numba and sympy load at the first score that needs them.
"""

import importlib
from typing import TYPE_CHECKING

from verifiers.registry import Context, GoldError, Outcome, SpecError, known_names, verifier
from verifiers.scoring import (
    check_gold,
    configure,
    current_options,
    is_correct,
    score,
    score_batch,
    spec_from_row,
    validate_spec,
)
from verifiers.types import ImageSize, IouStep, OptionsError, RewardOptions, RewardSpec, Verdict

if TYPE_CHECKING:
    from verifiers.kernels.average_precision import coco_average_precision
    from verifiers.kernels.iou import pairwise_iou
else:
    KERNELS = {"coco_average_precision": "verifiers.kernels.average_precision", "pairwise_iou": "verifiers.kernels.iou"}

    def __getattr__(name: str) -> object:
        """A function of the kernels, which bring numba, imported at its first use."""
        if name not in KERNELS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(KERNELS[name]), name)


__all__ = [
    "Context",
    "GoldError",
    "ImageSize",
    "IouStep",
    "OptionsError",
    "Outcome",
    "RewardOptions",
    "RewardSpec",
    "SpecError",
    "Verdict",
    "check_gold",
    "coco_average_precision",
    "configure",
    "current_options",
    "is_correct",
    "known_names",
    "pairwise_iou",
    "score",
    "score_batch",
    "spec_from_row",
    "validate_spec",
    "verifier",
]
