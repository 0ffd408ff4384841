"""Lloyd-Max levels of a normal distribution: the codebook that rotated, unit-length vectors are coded with."""

from __future__ import annotations

from functools import lru_cache

import torch

_RANGE_SIGMAS = 3.5  # the first guess spreads the levels evenly over this range
_EDGE_SIGMAS = 10.5  # the outer cells end here
_INTERVALS = 200  # trapezoids per cell
_ROUNDS = 200
_TOLERANCE = 1e-10


@lru_cache(maxsize=64)
def codebook(bits: int, dim: int) -> torch.Tensor:
    """The 2^bits Lloyd-Max levels of N(0, 1/dim), ascending, float64 [2^bits]; shared, so do not write to it.

    Each round moves every level to the centroid of its cell. The quadrature and the stopping rule are part of the
    format: vLLM solves with them, 200 rounds do not always converge, and its levels must be met to 1e-6.
    """
    sigma = dim**-0.5
    count = 2**bits
    levels = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1) * _RANGE_SIGMAS * sigma
    edge = torch.tensor([_EDGE_SIGMAS * sigma], dtype=torch.float64)
    fractions = torch.linspace(0, 1, _INTERVALS + 1, dtype=torch.float64)
    weights = torch.ones(_INTERVALS + 1, dtype=torch.float64)
    weights[0] = weights[-1] = 0.5
    for _ in range(_ROUNDS):
        edges = torch.cat([-edge, midpoints(levels), edge])
        x = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * fractions
        density = torch.exp(-x * x * (dim / 2)) * weights
        # The cell's width and the density's constant factor cancel in the quotient.
        moved = (x * density).sum(1) / density.sum(1)
        if (moved - levels).abs().max() < _TOLERANCE:
            break
        levels = moved
    return levels


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Decision thresholds between neighbouring ``levels``: [n] -> [n - 1], in the levels' dtype."""
    return (levels[:-1] + levels[1:]) / 2
