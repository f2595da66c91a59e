"""Coordinates in thousandths of the picture as the micro model knows them: whole numbers 0 to 1000 that lie on a line.

A thousand separate classes would each have to be learned. Scores of all of them are waves instead, from the whole picture's length
down to a few thousandths: what is learned for one coordinate holds for its neighbours. Called by the warm start.
"""

import math

import torch

NUM_COORDINATES = 1001
NUM_WAVES = 28
LONGEST, SHORTEST = 2400.0, 9.0
"""Wavelengths, thousandths."""
BASIS_WIDTH = 2 * NUM_WAVES + 1


def basis() -> torch.Tensor:
    """(1001, BASIS_WIDTH): one, cosines and sines of every coordinate."""
    waves = torch.logspace(math.log10(LONGEST), math.log10(SHORTEST), NUM_WAVES)
    phases = torch.arange(NUM_COORDINATES)[:, None] * (2 * math.pi / waves)
    return torch.cat([torch.ones(NUM_COORDINATES, 1), phases.cos(), phases.sin()], dim=1)


def around(centres: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """(n, 1001): normal distributions over the coordinates with these means and deviations (n,), cut off at the ends."""
    distance = (torch.arange(NUM_COORDINATES) - centres[:, None]) / widths[:, None]
    weights = torch.exp(-0.5 * distance.square())
    return weights / weights.sum(dim=1, keepdim=True)
