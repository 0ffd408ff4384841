"""Results of the decode grid as they would be measured, and their verdicts by name."""

from __future__ import annotations

from typing import Any

from benchmarks.grid.points import FORMAT, SHAPES, Point
from benchmarks.grid.verdict import Verdict, verdicts
from tuner.bench import OURS
from tuner.workload import Bucket, Shape


def result(point: Point, ours_us: float, **others: float) -> dict[str, Any]:
    limit = point.compressed_bytes / 4.3e6
    return point.facts() | {
        "limit_us": limit, "times_us": {OURS: ours_us, **others}, "source": "table", "failures": {}, "identity": ["x"],
    }  # fmt: skip


def grid(batch: int, context: int, shape: Shape = SHAPES[0], section: str = "grid") -> Point:
    return Point(section, shape, FORMAT, Bucket(batch, context))


def by_name(results: list[dict[str, Any]]) -> dict[tuple[str, str], Verdict]:
    return {(v.name, v.statistic): v for v in verdicts(results)}
