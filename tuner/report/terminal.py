"""Tables for a terminal. Each function returns something that a rich console prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table as Grid
from rich.text import Text

from tuner.report.fitted import Column, Fitted
from tuner.report.layouts import LayoutRow
from tuner.report.rows import fastest, rows, summary
from tuner.space import Problem, Space
from tuner.space.census import Census
from tuner.table.schema import Table

if TYPE_CHECKING:
    from tuner.bench import StepRow
    from tuner.findings import Finding
    from tuner.search import TuneRequest
    from tuner.search.compare import Comparison

__all__ = [
    "assumed_steps",
    "axes",
    "constraints",
    "findings",
    "heading",
    "kernel_names",
    "kernels",
    "layout_times",
    "layouts",
    "problem_title",
    "steps",
    "summary",
    "times",
    "tokens",
    "us",
    "winners",
]


def us(time_us: float | None) -> str:
    """A time with about three digits: ``9.81``, ``144``; ``-`` where it is not known."""
    if time_us is None:
        return "-"
    return f"{time_us:.2f}" if time_us < 10 else f"{time_us:.1f}" if time_us < 100 else f"{time_us:.0f}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x" if ratio < 10 else f"{ratio:.1f} x"


def tokens(count: int) -> str:
    """``131072`` as ``128k``."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def problem_title(problem: Problem, device_name: str, arch: str) -> str:
    group = f", {problem.gqa} query heads per KV head" if problem.op == "decode" else ""
    return f"{problem.op}, head dim {problem.head_dim}{group}, {problem.cache_format}, {device_name} ({arch})"


def heading(request: TuneRequest) -> str:
    """What is about to be searched, and what its times will be worth."""
    how = "times are measured" if request.evidence == "measured" else "no such GPU attached: times are predicted"
    title = problem_title(request.problem, request.target.device_name, request.target.arch)
    return f"{title}; {how}"


def winners(table: Table) -> Fitted:
    """One line per bucket: the winner, its share of the memory limit, and how many times faster than each baseline."""
    if table.problem.op == "store":
        return _stores(table)
    columns = (
        *(Column("batch"), Column("context"), Column("time us"), Column("of limit", 2)),
        *(Column("Triton shipped"), Column("Triton tuned", 3), Column("bf16"), Column("splits", 4)),
        *(Column("kernel", 1, "left"), Column("evidence", 0, "left")),
    )
    short = kernel_names(table)
    lines: list[tuple[str, ...] | None] = []
    for _, group in groupby(rows(table), key=lambda row: row.batch):
        for row in group:
            context = tokens(row.context) + (" ragged" if row.ragged else "")
            ratios = (times(row.speedup(b)) for b in (row.shipped_us, row.tuned_us, row.bf16_us))
            share, choice = f"{row.limit_share:.0%}", (str(row.splits), short[row.kernel])
            lines.append((str(row.batch), context, us(row.time_us), share, *ratios, *choice, row.evidence))
        lines.append(None)
    return Fitted(
        problem_title(table.problem, table.device.name, table.device.arch),
        "x: times faster than the baseline in the column. limit: compressed bytes / achievable bandwidth.",
        columns,
        lines,
    )


def _stores(table: Table) -> Fitted:
    """Likewise for op store, whose buckets are tokens in one call."""
    columns = (
        *(Column("tokens"), Column("time us"), Column("of limit", 2), Column("vLLM")),
        *(Column("kernel", 1, "left"), Column("evidence", 0, "left")),
    )
    short = kernel_names(table)
    return Fitted(
        problem_title(table.problem, table.device.name, table.device.arch),
        "x: times faster than vLLM's launches. limit: bytes of rows and slots / achievable bandwidth.",
        columns,
        [
            (
                *(tokens(row.batch), us(row.time_us), f"{row.limit_share:.0%}"),
                *(times(row.speedup(row.shipped_us)), short[row.kernel], row.evidence),
            )
            for row in rows(table)
        ],
    )


def kernel_names(table: Table) -> dict[str, str]:
    """Kernel id -> a letter, by which the rows of one report refer to it."""
    return {kernel.id: _letters(index) for index, kernel in enumerate(table.kernels)}


def kernels(table: Table) -> Grid:
    """The kernels that the rows of ``winners`` name by letter."""
    grid = Grid(title="kernels", title_justify="left")
    for name in ("", "registers", "spills", "shared KB"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("configuration")
    for kernel in table.kernels:
        grid.add_row(
            kernel_names(table)[kernel.id],
            str(kernel.registers),
            str(kernel.spill_bytes),
            f"{kernel.shared_bytes / 1024:.1f}",
            " ".join(f"{name}={value}" for name, value in kernel.params),
        )
    return grid


def layouts(lines: Sequence[LayoutRow], comparison: Comparison) -> Fitted:
    """The best kernel of each warp count."""
    request = comparison.request
    names = ("warps", "tried", "of limit", "behind", "vs Triton", "registers", "shared KB", "occupancy")
    rows_of = [
        (
            str(line.warps),
            str(line.tried),
            f"{line.limit_share:.0%}",
            f"{line.behind:.3f}",
            times(line.triton_ratio),
            str(line.registers),
            f"{line.shared_bytes / 1024:.1f}",
            f"{line.occupancy:.0%}",
            line.evidence,
        )
        for line in lines
    ]
    title = problem_title(request.problem, request.target.device_name, request.target.arch)
    return Fitted(
        f"warps per CTA compared: {title}",
        f"Geometric means over {len(comparison.limits_us)} buckets, {len(comparison.raced)} of them raced. "
        "behind: time over that of the fastest warp count.",
        (*(Column(name) for name in names), Column("evidence", 0, "left")),
        rows_of,
    )


def layout_times(lines: Sequence[LayoutRow], comparison: Comparison) -> Fitted:
    """Time and share of the limit of each warp count, bucket by bucket."""
    rows_of = []
    for bucket in comparison.request.buckets:
        limit = comparison.limits_us[bucket.key]
        known = [line.times_us.get(bucket.key) for line in lines]
        cells = ["-" if t is None else f"{us(t)} ({limit / t:.0%})" for t in known]
        triton = fastest(comparison.baselines_us.get(bucket.key, {}), comparison.request.baselines or ())
        context = tokens(bucket.context) + (" ragged" if bucket.ragged else "")
        rows_of.append((str(bucket.batch), context, *cells, us(triton)))
    names = ("batch", "context", *(f"{line.warps} warps" for line in lines), "Triton")
    title = f"time in us (share of the limit), {comparison.request.evidence}"
    return Fitted(title, "Triton: as shipped.", tuple(Column(name) for name in names), rows_of)


def steps(model: str, device: str, lines: Sequence[StepRow]) -> Fitted:
    """Attention time of a decode step over all layers, by context and concurrency."""
    columns = [Column("context"), Column("concurrency")]
    columns += [Column(f"{name} us") for name in ("bf16", "seed's path", "Triton", "WPH")]
    columns += [Column("vs bf16"), Column("vs seed's path", 1), Column("vs Triton", 2), Column("of limit", 3)]
    caption = (
        "us: measured. vs: WPH is so many times faster. Seed's path: the whole cache dequantised, then bf16 attention. "
        "The rest of a step is not run."
    )
    columns.append(Column("kernels from", 4, "left"))
    rows_of: list[tuple[str, ...] | None] = []
    for _, group in groupby(lines, key=lambda line: line.context):
        for line in group:
            bf16, seed, triton, ours = (line.role_us(role) for role in ("bf16", "seed", "triton", "wph"))
            cells = [tokens(line.context), str(line.batch), *(us(t) for t in (bf16, seed, triton, ours))]
            cells += [times(t / ours if t and ours else None) for t in (bf16, seed, triton)]
            cells.append(f"{line.limit_us / ours:.0%}" if ours else "-")
            rows_of.append((*cells, line.source))
        rows_of.append(None)
    layers = f"{lines[0].layers} layers with full attention"
    return Fitted(f"{model} on {device}: attention per decode step, {layers}", caption, columns, rows_of)


def assumed_steps(lines: Sequence[StepRow], shares: Sequence[float]) -> Fitted:
    """Time of a whole step as a multiple of one with bf16, for each assumed share of attention in the latter."""
    columns = [Column("context"), Column("concurrency"), Column("assumed share")]
    columns += [Column(name) for name in ("seed's path", "Triton", "WPH")]
    rows_of: list[tuple[str, ...] | None] = []
    for line in lines:
        for share in shares:
            ratios = [line.step_ratio(role, share) for role in ("seed", "triton", "wph")]
            cells = ["-" if ratio is None else f"{ratio:.2f} x" for ratio in ratios]
            rows_of.append((tokens(line.context), str(line.batch), f"{100 * share:.3g}%", *cells))
        rows_of.append(None)
    return Fitted(
        "time of a whole step over one with bf16, by the share of the latter that attention is ASSUMED to take",
        "Assumed, not measured: the share, which depends on model, GPU and context (--attention-share gives others), "
        "and that the rest of a step costs the same with each.",
        columns,
        rows_of,
    )


def axes(space: Space) -> Grid:
    """Every parameter of the search with its values; the first is the plainest."""
    grid = Grid(title="axes", title_justify="left")
    grid.add_column("axis", no_wrap=True)
    grid.add_column("count", justify="right")
    grid.add_column("values")
    grid.add_column("meaning")
    for axis in space.axes:
        grid.add_row(axis.name, str(len(axis.values)), ", ".join(map(str, axis.values)), axis.meaning)
    return grid


def constraints(space: Space, census: Census) -> Grid:
    """Every constraint with its reason and what it removes; the last line is what is left to search."""
    grid = Grid(title="constraints", title_justify="left", show_footer=True)
    grid.add_column("constraint", "left to search", no_wrap=True)
    grid.add_column("removes", f"{census.alive:,} of {census.total:,}", justify="right", no_wrap=True)
    grid.add_column("only it", justify="right", no_wrap=True)
    grid.add_column("reason", "one configuration may be removed by several constraints")
    for constraint in space.constraints:
        name = constraint.name
        grid.add_row(name, f"{census.refused[name]:,}", f"{census.alone[name]:,}", constraint.reason)
    return grid


def findings(found: Sequence[Finding]) -> Grid:
    """What a machine has and lacks, with the way out."""
    grid = Grid(show_header=False, box=None, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for finding in found:
        mark = Text("ok", style="green") if finding.ok else Text("no", style="yellow")
        text = Text(finding.detail)
        if finding.advice:
            text.append(f"\n-> {finding.advice}")
        grid.add_row(mark, finding.name, text)
    return grid


def _letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    name = ""
    while index >= 0:
        name = chr(ord("A") + index % 26) + name
        index = index // 26 - 1
    return name
