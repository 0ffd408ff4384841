"""The orthogonal transform that spreads a vector's energy evenly, and the seed formats' per-layer constants."""

from __future__ import annotations

import torch

from tuner.formats import SlotLayout


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """``x @ H / sqrt(n)`` along the last dim (n a power of two), H the Sylvester Walsh-Hadamard matrix.

    The matrix is symmetric and orthogonal, so this is its own inverse. Shape and dtype are kept.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"cannot transform {n} elements: expected a power of two")
    shape = x.shape
    half = 1
    while half < n:
        pairs = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2)
        half *= 2
    return x.reshape(shape) * n**-0.5


def rotation_signs(layout: SlotLayout, seed: int = 0) -> torch.Tensor:
    """The +-1 diagonal of one layer, float64 [layout.normal]. ``seed`` identifies the layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (layout.normal,), generator=generator, dtype=torch.float64) * 2 - 1


def outlier_channels(layout: SlotLayout, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(normal, outlier) channel ids of one layer, int32, each ascending, together a partition of the head dim."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(layout.head_dim, generator=generator)[: layout.outliers]
    is_outlier = torch.zeros(layout.head_dim, dtype=torch.bool)
    is_outlier[chosen] = True
    ids = torch.arange(layout.head_dim, dtype=torch.int32)
    return ids[~is_outlier], ids[is_outlier]
