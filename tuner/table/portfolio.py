"""From timings to few kernels: the portfolio that keeps every bucket near its own best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.02
WORST_WITHIN = 0.15
"""How far above the least worst ratio the one choice for all contexts may lie, for a better mean."""
_EXACT_SUBSETS = 200_000
"""Subsets that the exact search may try; beyond, the greedy cover stands."""

Times = Mapping[str, Mapping[tuple[int, int], float]]
"""Bucket key -> (kernel number, splits) -> time in us. Numbers order simpler kernels first: ties go to the lower."""


@dataclass(frozen=True)
class BatchChoice:
    """One (kernel, splits) for all buckets of a batch; ratios against the best of each bucket."""

    kernel: int
    splits: int
    worst_ratio: float
    mean_ratio: float

    def nearly_as_good_as(self, other: BatchChoice) -> bool:
        """Whether neither ratio is above the other's by more than the tolerance."""
        bar = 1 + TOLERANCE
        return self.worst_ratio <= other.worst_ratio * bar and self.mean_ratio <= other.mean_ratio * bar


def best_splits(times: Times) -> dict[str, dict[int, tuple[int, float]]]:
    """Bucket -> kernel -> (its best split count, that time in us)."""
    result: dict[str, dict[int, tuple[int, float]]] = {}
    for bucket, points in times.items():
        row = result.setdefault(bucket, {})
        for (kernel, splits), time_us in sorted(points.items()):
            if kernel not in row or time_us < row[kernel][1]:
                row[kernel] = (splits, time_us)
    return result


def cover(times: Times, tolerance: float = TOLERANCE) -> tuple[int, ...]:
    """The fewest kernels such that each bucket has one within ``tolerance`` of its best time.

    Minimum set cover: exact where trying all smaller subsets is cheap, greedy otherwise. Of covers of equal size the
    one with the least geometric mean time, then the lowest numbers. Buckets without times are ignored.
    """
    rows = {b: {k: t for k, (_, t) in row.items()} for b, row in best_splits(times).items() if row}
    good = {b: {k for k, t in row.items() if t <= min(row.values()) * (1 + tolerance)} for b, row in rows.items()}
    if not good:
        return ()
    greedy = _greedy(rows, good)
    kernels = _undominated(good)
    for size in range(1, len(greedy) + 1):
        if math.comb(len(kernels), size) > _EXACT_SUBSETS:
            break
        covers = [s for s in itertools.combinations(kernels, size) if all(g.intersection(s) for g in good.values())]
        if covers:
            return min(covers, key=lambda s: (_log_time(rows, s), s))
    return greedy


def for_all_contexts(
    times: Times, kernels: Collection[int] | None = None, *, worst_within: float = WORST_WITHIN
) -> BatchChoice | None:
    """The one (kernel, splits) for all buckets of ``times``: least geometric mean of those whose worst ratio is within
    ``worst_within`` of the least.

    Candidates are the points timed on every bucket, of ``kernels`` only where given; ratios are against the best time
    of each bucket by any kernel. By the worst alone, a few percent of one bucket could cost a third of all others.
    None where no point was timed on every bucket.
    """
    rows = [row for row in times.values() if row]
    if not rows:
        return None
    best = [min(row.values()) for row in rows]
    points = set.intersection(*(set(row) for row in rows))
    choices = []
    for kernel, splits in sorted(points):
        if kernels is not None and kernel not in kernels:
            continue
        choices.append(BatchChoice(kernel, splits, *worst_and_mean([row[kernel, splits] for row in rows], best)))
    if not choices:
        return None
    bar = min(c.worst_ratio for c in choices) * (1 + worst_within)
    return min((c for c in choices if c.worst_ratio <= bar), key=lambda c: (c.mean_ratio, c.kernel, c.splits))


def worst_and_mean(times: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """The greatest and the geometric mean of ``times`` / ``best``, none less than 1: they may be of different races."""
    ratios = [max(1.0, t / b) for t, b in zip(times, best, strict=True)]
    return max(ratios), math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def _greedy(rows: Mapping[str, Mapping[int, float]], good: Mapping[str, set[int]]) -> tuple[int, ...]:
    """Takes the kernel that serves most of the buckets still unserved, until none is."""
    open_buckets = set(good)
    chosen: list[int] = []
    while open_buckets:
        counts = {k: sum(k in good[b] for b in open_buckets) for k in set().union(*(good[b] for b in open_buckets))}
        pick = min(counts, key=lambda k: (-counts[k], _log_time(rows, (*chosen, k)), k))
        chosen.append(pick)
        open_buckets -= {b for b in open_buckets if pick in good[b]}
    return tuple(sorted(chosen))


def _undominated(good: Mapping[str, set[int]]) -> list[int]:
    """Kernels, less those that serve a proper subset of what another serves: a smallest cover without them exists."""
    serves = {k: frozenset(b for b, g in good.items() if k in g) for k in set().union(*good.values())}
    return sorted(k for k, s in serves.items() if not any(s < other for other in serves.values()))


def _log_time(rows: Mapping[str, Mapping[int, float]], kernels: Collection[int]) -> float:
    """Sum over buckets of log(best time by ``kernels`` / best time); buckets that none of them ran count as x 1000."""
    total = 0.0
    for row in rows.values():
        mine = [row[k] for k in kernels if k in row]
        total += math.log(min(mine) / min(row.values())) if mine else math.log(1000)
    return round(total, 9)
