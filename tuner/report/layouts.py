"""The comparison of CTA layouts: the best kernel of each warp count, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.report.rows import geometric_mean, rows
from tuner.table.schema import Kernel, Table
from tuner.targets import Target

REGISTER_GRANULE = 256
"""Registers are given to a warp in units of this many (CUDA occupancy rules, compute capability 7 to 12)."""
SYSTEM_SHARED_BYTES = 1024
"""Shared memory that the driver takes per CTA (compute capability 8 and later)."""


@dataclass(frozen=True)
class LayoutRow:
    """The best kernels found with ``warps`` per CTA.

    ``time_us`` and ``context``/``batch`` are those of the largest bucket, ``limit_share`` and ``triton_ratio`` (times
    faster than the Triton twin, None where not timed) geometric means over all buckets. ``occupancy``: resident warps
    over the SM's maximum.
    """

    warps: int
    batch: int
    context: int
    time_us: float
    limit_share: float
    triton_ratio: float | None
    registers: int
    shared_bytes: int
    occupancy: float
    evidence: str


def layout_row(warps: int, table: Table, target: Target) -> LayoutRow:
    """The line of one warp count, from the table that its own search made."""
    buckets = rows(table)
    largest = max(buckets, key=lambda r: r.limit_us)
    kernel = table.kernel(largest.kernel)
    ratios = [ratio for r in buckets if (ratio := r.speedup(r.shipped_us)) is not None]
    return LayoutRow(
        warps=warps,
        batch=largest.batch,
        context=largest.context,
        time_us=largest.time_us,
        limit_share=geometric_mean(r.limit_share for r in buckets) or 0.0,
        triton_ratio=geometric_mean(ratios),
        registers=kernel.registers,
        shared_bytes=kernel.shared_bytes,
        occupancy=resident_warps(kernel, warps, target) / target.max_warps,
        evidence=table.evidence,
    )


def resident_warps(kernel: Kernel, warps: int, target: Target) -> int:
    """Warps per SM that registers, shared memory and the CTA limit allow (CUDA programming guide, occupancy)."""
    per_warp = -(-kernel.registers * 32 // REGISTER_GRANULE) * REGISTER_GRANULE
    ctas = min(
        target.max_ctas,
        target.max_warps // warps,
        target.registers // (per_warp * warps),
        target.shared_bytes_per_sm // (kernel.shared_bytes + SYSTEM_SHARED_BYTES),
    )
    return ctas * warps
