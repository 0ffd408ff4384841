"""What a measurement is, and the statistics that compare two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal["crash", "timeout", "wrong result", "resource", "error"]


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
        raise NotImplementedError

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


def paired_ratio(a_us: Sequence[float], b_us: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Median of a/b over rounds, and the ends of its 95% bootstrap interval; below 1 means that a is faster."""
    raise NotImplementedError


def declare_winner(rounds_us: dict[str, Sequence[float]], simplicity: Sequence[str]) -> tuple[str, bool]:
    """(winner, is a tie). ``rounds_us``: paired times per contestant; ``simplicity``: names, simplest first.

    The fastest wins only where the interval of its paired ratio to a simpler contestant excludes 1; otherwise the
    simplest of those that it cannot be told from stands, and it is a tie.
    """
    raise NotImplementedError
