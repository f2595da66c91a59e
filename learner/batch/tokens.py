"""What the loss sees of a micro-batch: its response tokens, flat. Made by `learner.batch.microbatch`, read by `learner.losses`."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """R response tokens of S trajectories, none split between two calls. Floats are (R,)."""

    logprobs: Tensor
    """log π_θ, the only one with a gradient"""
    prox: Tensor
    """log π_prox: the learner's policy at the start of the rollout batch"""
    behaviour: Tensor
    """log π_b; where the learner's own version sampled a token this is `prox` itself unless the correction asks for the sampler's"""
    advantages: Tensor
    trajectory: Tensor
    """int64 (R,), 0 ≤ trajectory < S"""
    num_trajectories: int
