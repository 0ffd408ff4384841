"""What the search needs of whoever turns configurations into times, and the arithmetic on those times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tuner.geometry import split_candidates
from tuner.search.request import Failure
from tuner.space.core import Config, Problem
from tuner.targets import Target
from tuner.workload import Bucket, Shape, bf16_bytes, cache_bytes

MAX_SPLITS = 4
"""Split counts timed per batch size."""


@dataclass(frozen=True)
class Time:
    """Median and 95% interval in us; ``bottleneck`` where the static model names one; ``samples`` and SM clock where
    it was measured."""

    median_us: float
    ci_low_us: float
    ci_high_us: float
    bottleneck: str | None = None
    samples: int | None = None
    clock_mhz: float | None = None


Timings = dict[str, dict[int, Time]]
"""Bucket key -> splits -> time."""


@dataclass(frozen=True)
class Candidate:
    """A compiled configuration. ``cubin`` is a path; ``shared_bytes`` per CTA, dynamic ones included."""

    config: Config
    source_digest: str
    cubin_sha256: str
    cubin: str
    registers: int
    shared_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Scored:
    """``partial``: timed on a sample of the buckets only, because far slower than the best there."""

    timings: Timings
    partial: bool = False


@dataclass(frozen=True)
class Final:
    """The last word on one bucket. ``times`` per contestant, None for one that failed; ``winner`` is an index.

    ``tie``: the winner could not be told from the fastest and stands because it is simpler.
    """

    times: tuple[Time | None, ...]
    winner: int
    tie: bool
    baselines_us: dict[str, float | None]


class Evaluator(Protocol):
    """Builds and times configurations. ``build`` runs on a thread of its own while ``score`` runs on the caller's.

    ``fingerprint`` stands for all outside the request that timings depend on: templates, compiler, model.
    """

    fingerprint: str

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        """One result per configuration, in order. Raises TunerError where nothing at all can be built."""

    def score(self, candidate: Candidate, best: Timings | None) -> Scored | Failure:
        """Times on every bucket and split count; may stop early where far slower than ``best``."""

    def confirm(self, candidate: Candidate) -> Failure | None:
        """The full correctness gate, once more before anything is published; None: passed."""

    def rivals(self, tell: Callable[[str], None], budget_s: float) -> tuple[str, ...]:
        """Searches the constants of the Triton baseline; names of the tuned ones, none where it does not run."""

    def final(
        self,
        contestants: Sequence[tuple[Candidate, int]],
        bucket: Bucket,
        rivals: Sequence[str] | None,
        budget_s: float,
    ) -> Final | Failure:
        """Compares (candidate, splits) with each other, simplest first, with the baselines and the tuned ``rivals``;
        None: with nothing else.

        Within about ``budget_s``: baselines that it does not suffice for have no time.
        """

    def close(self) -> None:
        """Releases what was held and ends a ``build`` that runs; harmless when called twice."""


def limit_us(problem: Problem, shape: Shape, bucket: Bucket, target: Target) -> float:
    """Memory-limit time: compressed bytes (dequantisation: and the bf16 rows written) over the read bandwidth.

    A store reads bf16 rows and writes the bytes that carry data.
    """
    if problem.op == "store":
        row = 4 * problem.head_dim + problem.layout.content_bytes
        return bucket.tokens * shape.kv_heads * row / (target.bandwidth_gbps * 1e3)
    size = cache_bytes(shape, problem.layout, bucket)
    if problem.op == "dequant":
        size += bf16_bytes(shape, bucket)
    return size / (target.bandwidth_gbps * 1e3)


def best_time(row: dict[int, Time]) -> Time:
    """The best of a bucket's split counts."""
    return min(row.values(), key=lambda t: t.median_us)


def score_of(timings: Timings, limits_us: dict[str, float]) -> float:
    """Geometric mean over buckets of best time / memory-limit time."""
    logs = [math.log(best_time(row).median_us / limits_us[bucket]) for bucket, row in timings.items() if row]
    return math.exp(math.fsum(logs) / len(logs))


def batches(buckets: Iterable[Bucket]) -> dict[int, tuple[Bucket, ...]]:
    """Buckets by batch size, ascending."""
    groups: dict[int, list[Bucket]] = {}
    for bucket in sorted(buckets, key=lambda b: (b.batch, b.ragged, b.context)):
        groups.setdefault(bucket.batch, []).append(bucket)
    return {batch: tuple(group) for batch, group in groups.items()}


def splits_for_batch(
    config: Config, registers: int, shape: Shape, group: Sequence[Bucket], target: Target
) -> tuple[int, ...]:
    """Split counts to time on every bucket of one batch size, at most MAX_SPLITS.

    A choice for all contexts must have been timed on all of them, so the buckets share one list: the two most
    promising counts of the longest context (one may be the rule's that balances reading and merging, the other fills
    the GPU), then the counts of each context in turns.
    """
    if config.problem.op != "decode":
        return (1,)
    contexts = sorted({b.context for b in group}, reverse=True)
    per_context = [
        split_candidates(
            config, registers=registers, batch=group[0].batch, kv_heads=shape.kv_heads, max_context=c, target=target
        )
        for c in contexts
    ]
    turns = [c[i] for i in range(max(map(len, per_context))) for c in per_context if i < len(c)]
    return tuple(dict.fromkeys((*per_context[0][:2], *turns)))[:MAX_SPLITS]
