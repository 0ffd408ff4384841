"""The static model: time of a kernel from its machine code, its occupancy and its bytes, without running it."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.build import Built
from tuner.formats import SlotLayout
from tuner.sass import SassFacts
from tuner.space import Config
from tuner.targets import Target
from tuner.workload import Bucket, Shape


@dataclass(frozen=True)
class Prediction:
    """Time of one call and the terms it is made of, in microseconds; the largest term names the ``bottleneck``."""

    time_us: float
    memory_us: float
    issue_us: float
    shared_us: float
    matrix_us: float
    reduction_us: float
    overhead_us: float
    bottleneck: str
    occupancy: float
    """Resident warps over the SM's maximum."""
    ctas_per_sm: int
    waves: float
    evidence: str = "predicted"


def memory_limit_us(shape: Shape, layout: SlotLayout, bucket: Bucket, target: Target) -> float:
    """Compressed bytes of all requests over the read bandwidth: no kernel is faster."""
    raise NotImplementedError


def predict(
    config: Config, built: Built, sass: SassFacts, target: Target, shape: Shape, bucket: Bucket, splits: int
) -> Prediction:
    """Predicted time of one launch of a decode kernel. Raises UsageError where cubin and target do not match."""
    raise NotImplementedError
