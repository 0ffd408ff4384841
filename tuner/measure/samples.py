"""What a measurement is, and the statistics that compare two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FailureKind = Literal["crash", "timeout", "wrong result", "resource", "error"]
CONFIDENCE = 0.95
LEAST_PAIRS = 6
"""Rounds without which no small difference is told: of five, all fall on one side by chance in one case of 16."""
PLAIN_RATIO = 0.95
"""Of two calls: what noise of a few percent does not do in any number of rounds. Where a clock that sinks within a
round makes intervals wider than this, the faster median is the better guess."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """Median of ``n`` timed calls with the bootstrap interval (95%) of that median.

    ``clock_mhz`` is the median SM clock while sampling, None where it cannot be read; ``throttled`` counts the
    samples that were discarded because the clock had dropped.
    """

    median_us: float
    ci_low_us: float
    ci_high_us: float
    n: int
    clock_mhz: float | None = None
    throttled: int = 0

    @staticmethod
    def of(times_us: Sequence[float], *, clock_mhz: float | None = None, throttled: int = 0) -> Sample:
        """Summary of single-call times in microseconds (at least one)."""
        times = np.asarray(times_us, dtype=np.float64)
        low, high = _interval(np.median(_resample(times), axis=1))
        return Sample(float(np.median(times)), low, high, len(times), clock_mhz, throttled)

    @property
    def relative_ci(self) -> float:
        """Width of the interval over the median."""
        return (self.ci_high_us - self.ci_low_us) / self.median_us


@dataclass(frozen=True)
class Timing:
    """One kernel (or baseline) on one bucket with one split count (0 for a baseline)."""

    bucket: str
    splits: int
    sample: Sample


@dataclass(frozen=True)
class Failure:
    """Why there is no measurement; ``message`` is one line."""

    kind: FailureKind
    message: str


Times = Sequence[float | None]
"""Times of one contestant by round, None in rounds that it sat out."""


def paired_ratio(a_us: Times, b_us: Times, *, seed: int = 0) -> tuple[float, float, float]:
    """Median of a/b over the rounds that both ran in (at least one), and the ends of its 95% bootstrap interval.

    Below 1 means that a is faster.
    """
    ratios = _ratios(a_us, b_us)
    low, high = _interval(np.median(_resample(ratios, seed), axis=1))
    return float(np.median(ratios)), low, high


def declare_winner(rounds_us: Mapping[str, Times], simplicity: Sequence[str]) -> tuple[str, bool]:
    """(winner, is a tie). ``rounds_us``: paired times per contestant; ``simplicity``: names, simplest first.

    The contestant with the least median wins if it is faster than every simpler one: if their paired ratio is plain, or
    its interval excludes 1 over at least LEAST_PAIRS rounds. Otherwise the simplest of those that it cannot be told
    from stands, and it is a tie.
    """
    fastest = min(simplicity, key=lambda name: _median(rounds_us[name]))
    for simpler in simplicity[: simplicity.index(fastest)]:
        if not _is_faster(rounds_us[fastest], rounds_us[simpler]):
            return simpler, True
    return fastest, False


def _is_faster(a_us: Times, b_us: Times) -> bool:
    pairs = len(_ratios(a_us, b_us))
    if not pairs:  # the rounds that they shared were throttled
        return _median(a_us) / _median(b_us) < PLAIN_RATIO
    ratio, _, high = paired_ratio(a_us, b_us)
    return ratio < PLAIN_RATIO or (high < 1.0 and pairs >= LEAST_PAIRS)


def _median(times_us: Times) -> float:
    return float(np.median([t for t in times_us if t is not None]))


def _ratios(a_us: Times, b_us: Times) -> NDArray[np.float64]:
    """a/b [rounds that both ran in]."""
    pairs = [(a, b) for a, b in zip(a_us, b_us, strict=True) if a is not None and b is not None]
    return np.array([a / b for a, b in pairs], dtype=np.float64)


def _resample(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Bootstrap resamples [RESAMPLES, n] of ``values`` [n]."""
    index = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    resampled: NDArray[np.float64] = values[index]
    return resampled


def _interval(estimates: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(estimates, (tail, 100 - tail))
    return float(low), float(high)
