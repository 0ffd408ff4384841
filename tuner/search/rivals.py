"""The same Triton kernel with its constants open to the search: few trials, climbing from constants that are known."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from tuner.baselines import SHIPPED, TUNABLE, Constants, DequantConstants, TritonConstants
from tuner.search.evaluate import batches
from tuner.space.core import Problem
from tuner.workload import Bucket

VERSION = 1
"""Of this search: what a study keeps of another version is not used."""
BASELINE = {"decode": "triton", "dequant": "triton_dequant"}
"""Op -> the baseline whose constants are open."""
CHOSEN = {"decode": 3, "dequant": 1}
"""Constants that race at most. The outputs of a dequantisation are as large as an uncompressed cache: one at a time."""
_WORTH = 0.99
"""Another choice of constants must bring the geometric mean of times below this share."""
_TILE_PER_THREAD = 64
"""Elements of a tile of keys per thread, beyond which Triton spills and compiles for many seconds."""
_LANDMARKS: dict[str, tuple[Constants, ...]] = {
    "decode": (
        SHIPPED["decode"],
        TritonConstants(block_kv=16, num_warps=4, num_stages=2, splits=32, block_h=16),
        TritonConstants(block_kv=32, num_warps=8, num_stages=2, splits=32, block_h=16),
        TritonConstants(block_kv=8, num_warps=2, num_stages=1, splits=32, block_h=1),
    ),
    "dequant": (SHIPPED["dequant"], DequantConstants(4, 4, 1), DequantConstants(8, 4, 1)),
}

BucketTimes = Mapping[str, float]
"""Bucket key -> us."""


def probes(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """A small and a large batch, each with a short and a long context; not the largest, which only cost time."""
    groups = list(batches(buckets).values())
    found: dict[Bucket, None] = {}
    for group in (groups[0], groups[3 * len(groups) // 4]):
        even = [b for b in group if not b.ragged] or list(group)
        found |= {even[0]: None, even[3 * len(even) // 4]: None}
    return tuple(found)


def sweep(
    problem: Problem,
    measure: Callable[[Constants], BucketTimes],
    *,
    seed: int,
    limit: int,
    budget_s: float,
    tell: Callable[[str], None],
) -> tuple[Constants, ...]:
    """The constants that together are fastest: best on average first, then those that help most where it is slow.

    ``measure`` times constants on the probes, {} where they do not run. At most ``limit`` constants are tried, none is
    begun after ``budget_s``.
    """
    deadline = time.monotonic() + budget_s
    tried: dict[Constants, BucketTimes] = {}
    generator = random.Random(seed)
    while len(tried) < limit and time.monotonic() < deadline:
        constants = next(_untried(problem, tried, generator), None)
        if constants is None:
            break
        tried[constants] = measure(constants)
        tell(f"tuning the Triton baseline: {len(tried)}/{limit} constants")
    return select(tried, CHOSEN[problem.op])


def select(tried: Mapping[Constants, BucketTimes], most: int) -> tuple[Constants, ...]:
    """Greedy choice of up to ``most`` constants by the geometric mean over buckets of the best time among them."""
    ran = _complete(tried)
    chosen: list[Constants] = []
    best: BucketTimes = {}
    while len(chosen) < most:
        rest = {c: _best(best, times) for c, times in ran.items() if c not in chosen}
        if not rest:
            break
        winner = min(rest, key=lambda c: _mean(rest[c]))
        if chosen and _mean(rest[winner]) > _WORTH * _mean(best):
            break
        chosen.append(winner)
        best = rest[winner]
    return tuple(chosen)


def _untried(
    problem: Problem, tried: Mapping[Constants, BucketTimes], generator: random.Random
) -> Iterator[Constants]:
    """The landmarks, then neighbours of the best in random order, then of the second best and so on."""
    yield from (c for c in _LANDMARKS[problem.op] if c not in tried and _sensible(problem, c))
    ran = _complete(tried)
    for best in sorted(ran, key=lambda c: _mean(ran[c])):
        neighbours = [c for c in _neighbours(problem.op, best) if c not in tried and _sensible(problem, c)]
        generator.shuffle(neighbours)
        yield from neighbours


def _neighbours(op: str, constants: Constants) -> Iterator[Constants]:
    """One step along one axis."""
    for name, values in TUNABLE[op].items():
        at = values.index(getattr(constants, name))
        for index in (at - 1, at + 1):
            if 0 <= index < len(values):
                yield type(constants)(**asdict(constants) | {name: values[index]})


def _sensible(problem: Problem, constants: Constants) -> bool:
    rows = constants.block_kv if isinstance(constants, TritonConstants) else constants.rows
    per_thread = rows * problem.head_dim / (32 * constants.num_warps)
    return constants.refusal(problem) is None and per_thread <= _TILE_PER_THREAD


def _complete(tried: Mapping[Constants, BucketTimes]) -> dict[Constants, BucketTimes]:
    """Those that ran on every probe that any ran on: means over different buckets say nothing."""
    buckets = {key for times in tried.values() for key in times}
    return {c: times for c, times in tried.items() if times and times.keys() == buckets}


def _best(a: BucketTimes, b: BucketTimes) -> BucketTimes:
    return {key: min(us, a.get(key, us)) for key, us in b.items()}


def _mean(times: BucketTimes) -> float:
    return math.exp(math.fsum(map(math.log, times.values())) / len(times))
