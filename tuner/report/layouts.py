"""The comparison of CTA layouts: the best kernel of each warp count, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.report.rows import fastest, geometric_mean
from tuner.targets import Target

if TYPE_CHECKING:
    from tuner.search.compare import Comparison


@dataclass(frozen=True)
class LayoutRow:
    """The best kernel found with ``warps`` per CTA, of ``tried``.

    ``times_us``: bucket key -> us. ``limit_share``, ``behind`` (time over the fastest of all warp counts) and
    ``triton_ratio`` (times faster than Triton as shipped, None where not timed) are geometric means over the buckets.
    ``occupancy``: resident warps over the SM's maximum.
    """

    warps: int
    tried: int
    times_us: dict[str, float]
    limit_share: float
    behind: float
    triton_ratio: float | None
    registers: int
    shared_bytes: int
    occupancy: float
    params: str
    evidence: str


def layout_rows(comparison: Comparison) -> list[LayoutRow]:
    """A line per warp count."""
    target, names = comparison.request.target, comparison.request.baselines or ()
    times = {c.value: {b: t.median_us for b, t in c.times.items()} for c in comparison.contenders}
    best = {b: min(row[b] for row in times.values() if b in row) for row in times.values() for b in row}
    found = []
    for c in comparison.contenders:
        own, warps = times[c.value], c.candidate.config["warps"]
        shipped = {b: fastest(comparison.baselines_us.get(b, {}), names) for b in own}
        found.append(
            LayoutRow(
                warps=warps,
                tried=c.tried,
                times_us=own,
                limit_share=geometric_mean(comparison.limits_us[b] / us for b, us in own.items()) or 0.0,
                behind=geometric_mean(us / best[b] for b, us in own.items()) or 1.0,
                triton_ratio=geometric_mean(s / own[b] for b, s in shipped.items() if s is not None),
                registers=c.candidate.registers,
                shared_bytes=c.candidate.shared_bytes,
                occupancy=resident_warps(c.candidate.registers, c.candidate.shared_bytes, warps, target)
                / target.max_warps,
                params=" ".join(f"{n}={v}" for n, v in c.candidate.config.params if n != "warps"),
                evidence=comparison.request.evidence,
            )
        )
    return found


def resident_warps(registers: int, shared_bytes: int, warps: int, target: Target) -> int:
    """Warps per SM that registers, shared memory and the CTA limit allow (CUDA programming guide, occupancy)."""
    return warps * target.resident_ctas(warps, registers, shared_bytes)
