"""The tensors that our losses and TRL's are compared on; read by the tests and by `tests.learner.record_trl_losses`."""

import numpy as np
import torch

from learner.batch.tokens import Tokens

LOW, HIGH, MAX_TOKENS = 0.2, 0.28, 32


def tokens(seed: int, *, num: int = 6, spread: float = 0.4, dtype: torch.dtype = torch.float64) -> Tokens:
    """Random trajectories of 1 to 7 tokens; ratios on both sides of the clip."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, num)
    trajectory = torch.from_numpy(np.repeat(np.arange(num), lengths))
    size = len(trajectory)
    prox = torch.from_numpy(rng.normal(-2, 0.5, size)).to(dtype)
    behaviour = prox + torch.from_numpy(rng.normal(0, spread, size)).to(dtype)
    logprobs = (prox + torch.from_numpy(rng.normal(0, spread, size)).to(dtype)).requires_grad_()
    values = torch.from_numpy(rng.normal(0, 1, num)).to(dtype)[trajectory]
    return Tokens(logprobs, prox, behaviour, values, trajectory, num)
