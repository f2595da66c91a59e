"""Rewards of vision-language samples: every verifier of V-Triune and more, each score explained by named components.

    from verifiers import RewardSpec, score

    spec = RewardSpec(ground_truth="42", verifier="mathverify")
    score("<think>6·7</think><answer>\\\\boxed{42}</answer>", spec).reward    # 1.0

`score` and `score_batch` run in the calling process. `verifiers.pool` puts supervised processes around them, which a
training run needs; `python -m verifiers.serve` and `python -m verifiers.rescore` serve them over HTTP and over files.
Imports nothing heavier than msgspec: numba and sympy load at the first score that needs them.
"""

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
from verifiers.types import OptionsError, RewardOptions, RewardSpec, Verdict

__all__ = [
    "Context",
    "GoldError",
    "OptionsError",
    "Outcome",
    "RewardOptions",
    "RewardSpec",
    "SpecError",
    "Verdict",
    "check_gold",
    "configure",
    "current_options",
    "is_correct",
    "known_names",
    "score",
    "score_batch",
    "spec_from_row",
    "validate_spec",
    "verifier",
]
