"""Who runs in which round of a race: samples are allotted by time, so that slow contestants do not fill the race."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tuner.measure.samples import LEAST_PAIRS

LEAST_SAMPLES = 3
SLOW_US = 5_000.0
"""Calls longer than this repeat to within a fraction of a percent."""
LEAST_SLOW_SAMPLES = 2
_PATIENCE = 4.0
"""How many times the fastest contestant's time another may take and still run in every round."""
_ROUND_US = 150.0
"""What a sample costs beside the call itself: flushing the L2 cache."""
_FLOOR_US = 20_000.0
"""What each short run of one call may take beyond its least number of samples."""


def least_samples(time_us: float) -> int:
    """Samples that a call of this length needs for a median."""
    return LEAST_SLOW_SAMPLES if time_us > SLOW_US else LEAST_SAMPLES


def short_samples(time_us: float, most: int) -> int:
    """Samples of a short run, at most ``most``."""
    return max(least_samples(time_us), min(most, int(_FLOOR_US / time_us)))


class Turns:
    """Turns of contestants whose calls take about ``times_us``.

    Over any number of rounds a contestant takes at most ``_PATIENCE`` times as long as the fastest one does, its least
    number of samples excepted, which it takes in the first rounds. Periods are powers of two, so that any two
    contestants meet whenever the rarer one runs.
    """

    def __init__(self, times_us: Mapping[str, float]) -> None:
        allowed = _PATIENCE * (min(times_us.values()) + _ROUND_US)
        self._least = {name: least_samples(us) for name, us in times_us.items()}
        self._period = {name: _power_of_two((us + _ROUND_US) / allowed) for name, us in times_us.items()}

    def in_round(self, number: int) -> list[str]:
        """Names of those that run in round ``number``, counted from 0."""
        return [n for n, period in self._period.items() if number < self._least[n] or number % period == 0]

    @property
    def least_rounds(self) -> int:
        """Rounds after which everyone has the least number of samples, and the fast ones can be told apart."""
        return max(LEAST_PAIRS, *self._least.values())


def _power_of_two(least: float) -> int:
    """The smallest power of two that is no less than ``least``."""
    return 1 << max(0, math.ceil(math.log2(least)))
