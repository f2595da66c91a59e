"""Group-relative advantages (spec of the loss in `learner.losses`). Called by `learner.batch.examples`."""

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-6


def advantages(rewards: Sequence[float], *, scale_by_std: bool = True) -> np.ndarray:
    """A_i = (R_i − mean R)/(std R + 1e-6) over one group, float64 (n,); the std is the sample's (n − 1), as in verl and TRL.
    Without `scale_by_std` (Dr. GRPO) A_i = R_i − mean R. Equal rewards give exact zeros, although their mean may be off by a rounding.

    `rewards` holds only trajectories with a verdict that counts; fewer than two have no baseline and give zeros.
    """
    values = np.asarray(rewards, np.float64)
    if len(values) < 2 or np.all(values == values[0]):
        return np.zeros(len(values))
    centred: np.ndarray = values - values.mean()
    if scale_by_std:
        centred /= values.std(ddof=1) + EPSILON
    return centred
