"""Winners against baselines, one row per bucket: what both kinds of report show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tuner.table.schema import BatchEntry, BucketEntry, Table, Timing

# Role -> names of baselines that may play it; the fastest one that was timed does. A tuned Triton kernel is called by
# the constants that were found for it, as in triton[block_kv=16,...].
SHIPPED = ("vllm_triton", "triton", "triton_dequant", "vllm_store")
BF16 = ("fa3_bf16", "flashinfer_bf16", "sdpa_bf16")


@dataclass(frozen=True)
class Row:
    """One bucket. Times in us; a baseline that was not timed is None. ``limit_share`` 1.0 is the memory limit."""

    batch: int
    context: int
    ragged: bool
    kernel: str
    splits: int
    time_us: float
    ci_low_us: float
    ci_high_us: float
    limit_us: float
    limit_share: float
    shipped_us: float | None
    tuned_us: float | None
    bf16_us: float | None
    bottleneck: str | None
    evidence: str

    def speedup(self, baseline_us: float | None) -> float | None:
        """How many times faster than a baseline; None where that was not timed."""
        return None if baseline_us is None else baseline_us / self.time_us


def rows(table: Table) -> list[Row]:
    """The best choice of every bucket, by batch, uniform batches before ragged ones, then context."""
    found = [_row(table, entry, entry.timing) for entry in table.by_batch_and_context]
    return sorted(found, key=_order)


def fastest(baselines_us: Mapping[str, float | None], names: Iterable[str]) -> float | None:
    """The least time among the baselines called ``names``; None where none of them was timed."""
    times = [t for name in names if (t := baselines_us.get(name)) is not None]
    return min(times, default=None)


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summary(table: Table) -> list[str]:
    """Lines that sum the table up: speed-ups as geometric mean and worst, and the share of the memory limit."""
    buckets = rows(table)
    lines = []
    roles = [
        ("Triton as shipped", [r.speedup(r.shipped_us) for r in buckets]),
        ("the same Triton kernel, tuned", [r.speedup(r.tuned_us) for r in buckets]),
        ("bf16 attention", [r.speedup(r.bf16_us) for r in buckets]),
    ]
    if table.problem.op == "store":
        roles = [("vLLM's launches", roles[0][1])]
    for name, times in roles:
        known = [t for t in times if t is not None]
        mean = geometric_mean(known)
        if mean is None:
            lines.append(f"against {name}: no {table.evidence} times")
        else:
            lines.append(
                f"against {name}: {mean:.2f} x faster (geometric mean of {len(known)} buckets, {table.evidence}), "
                f"worst {min(known):.2f} x"
            )
    share = geometric_mean(r.limit_share for r in buckets)
    if share is not None:
        lines.append(f"memory limit: {share:.0%} of it reached (geometric mean, {table.evidence})")
    return lines


def _row(table: Table, entry: BatchEntry | BucketEntry, timing: Timing) -> Row:
    return Row(
        batch=entry.batch,
        context=timing.context,
        ragged=timing.ragged,
        kernel=entry.kernel,
        splits=entry.splits,
        time_us=timing.time_us,
        ci_low_us=timing.ci_low_us,
        ci_high_us=timing.ci_high_us,
        limit_us=timing.limit_us,
        limit_share=timing.limit_share,
        shipped_us=fastest(timing.baselines_us, SHIPPED),
        tuned_us=fastest(timing.baselines_us, (name for name in timing.baselines_us if "[" in name)),
        bf16_us=fastest(timing.baselines_us, BF16),
        bottleneck=timing.bottleneck,
        evidence=table.evidence,
    )


def _order(row: Row) -> tuple[int, bool, int]:
    return row.batch, row.ragged, row.context
