"""From timings to few kernels: the portfolio that keeps every bucket near its own best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.02

Times = Mapping[str, Mapping[tuple[int, int], float]]
"""Bucket key -> (kernel number, splits) -> time in us. Kernel numbers order simpler kernels first: ties go to the lower."""


@dataclass(frozen=True)
class BatchChoice:
    """One (kernel, splits) for all buckets of a batch; ratios against the best of each bucket."""

    kernel: int
    splits: int
    worst_ratio: float
    mean_ratio: float


def best_splits(times: Times) -> dict[str, dict[int, tuple[int, float]]]:
    """Bucket -> kernel -> (its best split count, that time in us)."""
    raise NotImplementedError


def cover(times: Times, tolerance: float = TOLERANCE) -> tuple[int, ...]:
    """The fewest kernels such that each bucket has one within ``tolerance`` of its best time."""
    raise NotImplementedError


def for_all_contexts(times: Times, kernels: Sequence[int] | None = None) -> BatchChoice | None:
    """The (kernel, splits), timed on every bucket of ``times``, with the least worst ratio (then geometric mean)."""
    raise NotImplementedError
