"""The grid for a GPU that is not attached: what its tables predict, and whether their kernels fit it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.grid.kernels import problem_of
from benchmarks.grid.points import BF16_LIMIT, FORMAT, Point
from benchmarks.grid.verdict import Verdict, at_least
from tuner.baselines import split_name
from tuner.errors import UsageError
from tuner.report.rows import geometric_mean
from tuner.table import Table, find, read, table_file_name
from tuner.table.schema import Timing
from tuner.targets import Target
from tuner.workload import Bucket, Shape, bf16_bytes

LEAST_SHARE = 0.85
LONG_CONTEXT = 16384


@dataclass(frozen=True)
class Prediction:
    """One bucket of a table: the shares of the memory limit that its own choice and its batch's one kernel reach."""

    shape: Shape
    bucket: Bucket
    share: float
    graph_share: float | None
    triton: float | None
    tuned: float | None
    """Times faster than Triton as shipped, and tuned by the same search."""


def tables_of(points: Iterable[Point], folder: Path | None, target: Target) -> dict[Shape, Table | None]:
    """The table of each shape. Raises TableError for one that cannot be trusted, UsageError for a measured one."""
    found: dict[Shape, Table | None] = {}
    for point in points:
        if point.section != "grid" or point.cache_format != FORMAT or point.shape in found:
            continue
        problem = problem_of(point)
        path = find(problem, target.device_name)
        if folder is not None:
            path = folder / table_file_name(problem, target.device_name)
        table = read(path, arch=target.arch) if path is not None and path.is_file() else None
        if table is not None and table.evidence != "predicted":
            name = table_file_name(problem, target.device_name)
            raise UsageError(f"{name} was measured: expected a GPU whose tables are predictions")
        # A prediction is for the heads it was made with.
        found[point.shape] = table if table is not None and table.kv_heads == point.shape.kv_heads else None
    return found


def predictions(tables: dict[Shape, Table | None]) -> list[Prediction]:
    """Every bucket of the tables whose uncompressed cache would be one of the grid's."""
    found = []
    for shape, table in tables.items():
        if table is None:
            continue
        shared = {(e.batch, t.context, t.ragged): t for e in table.by_batch for t in e.timings}
        for entry in table.by_batch_and_context:
            t = entry.timing
            bucket = Bucket(entry.batch, t.context, t.ragged)
            if bf16_bytes(shape, bucket) > BF16_LIMIT:
                continue
            graph = shared.get((entry.batch, t.context, t.ragged))
            share = graph.limit_share if graph else None
            shipped, tuned = _against_triton(t)
            found.append(Prediction(shape, bucket, t.limit_share, share, shipped, tuned))
    return found


def verdicts(tables: dict[Shape, Table | None], found: Sequence[Prediction], target: Target) -> list[Verdict]:
    """Spills, shared memory and share of the limit; those of shapes without a table count as missed."""
    kernels = [(shape, k) for shape, table in tables.items() if table for k in table.kernels]
    missing = [_named(shape) for shape, table in tables.items() if table is None]
    long = [p for p in found if p.bucket.context >= LONG_CONTEXT]
    spills = [(float(k.spill_bytes == 0), f"{_named(s)}, {k.id}") for s, k in kernels]
    room = [(target.shared_bytes_per_cta / k.shared_bytes, f"{_named(s)}, {k.id}") for s, k in kernels]
    shares = [(p.share, _where(p)) for p in long]
    graphs = [(p.graph_share, _where(p)) for p in long if p.graph_share is not None]
    what = f"predicted share of {target.bandwidth_gbps:g} GB/s, contexts >= 16k"
    return [
        at_least("kernels without spills (1: yes)", 1.0, spills, missing),
        at_least(f"fits {target.shared_kb_per_cta} KB of shared memory (times over)", 1.0, room, missing),
        at_least(what, LEAST_SHARE, shares, missing),
        at_least(f"{what}, one kernel per batch", LEAST_SHARE, graphs, missing),
    ]


def summary(shape: Shape, found: Sequence[Prediction]) -> str:
    """One line about a shape: mean and worst share, and the same against Triton."""
    own = [p for p in found if p.shape == shape]
    shares = [p.share for p in own]
    parts = [f"{geometric_mean(shares) or 0:.0%} of the limit (worst {min(shares):.0%})"]
    for name, ratios in (("as shipped", [p.triton for p in own]), ("tuned", [p.tuned for p in own])):
        known = [r for r in ratios if r is not None]
        if known:
            parts.append(f"{geometric_mean(known):.2f} x Triton {name} (worst {min(known):.2f})")
    return f"{_named(shape)}: {', '.join(parts)}, {len(own)} buckets"


def _against_triton(t: Timing) -> tuple[float | None, float | None]:
    """Times faster than Triton as shipped, and than the best of its tuned constants."""
    times = {n: us for n, us in t.baselines_us.items() if us is not None and split_name(n)[0] == "triton"}
    tuned = min((us for n, us in times.items() if split_name(n)[1] is not None), default=None)
    shipped = times.get("triton")
    return shipped and shipped / t.time_us, tuned and tuned / t.time_us


def _named(shape: Shape) -> str:
    return f"D={shape.head_dim} {shape.q_heads}/{shape.kv_heads}"


def _where(p: Prediction) -> str:
    return f"{_named(p.shape)}, {p.bucket.batch} x {p.bucket.context}{' ragged' if p.bucket.ragged else ''}"
