"""How configurations become times: on the GPU, by the static model, or replayed from a recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tuner.search.request import Failure
from tuner.space.core import Config


@dataclass(frozen=True)
class Time:
    """Median and 95% interval in us; ``bottleneck`` where the static model names one."""

    median_us: float
    ci_low_us: float
    ci_high_us: float
    bottleneck: str | None = None


Timings = dict[str, dict[int, Time]]
"""Bucket key -> splits -> time."""


@dataclass(frozen=True)
class Candidate:
    """A compiled configuration."""

    config: Config
    source_digest: str
    cubin_sha256: str
    cubin: str
    registers: int
    shared_bytes: int
    spill_bytes: int


class Evaluator(Protocol):
    """Builds and times configurations. ``build`` runs on a thread of its own while ``score`` runs on the caller's."""

    def build(self, configs: Sequence[Config]) -> list[Candidate | Failure]:
        """One result per configuration, in order."""

    def score(self, candidate: Candidate, best: Timings | None) -> Timings | Failure:
        """Times on every bucket and split count; may stop early where far slower than ``best``."""
