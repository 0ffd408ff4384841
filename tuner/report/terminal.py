"""Tables for a terminal. Each function returns something that a rich console prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table as Grid
from rich.text import Text

from tuner.report.layouts import LayoutRow
from tuner.report.rows import BF16, SHIPPED, fastest, rows, summary
from tuner.space import Problem, Space
from tuner.space.census import Census
from tuner.table.schema import Table

if TYPE_CHECKING:
    from tuner.bench import StepRow
    from tuner.doctor import Finding
    from tuner.search import TuneRequest

__all__ = ["axes", "constraints", "findings", "heading", "layouts", "problem_title", "summary", "winners"]


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


def winners(table: Table) -> Grid:
    """One line per bucket: the winner, its share of the memory limit, and how many times faster than each baseline."""
    grid = Grid(
        title=problem_title(table.problem, table.device.name, table.device.arch),
        title_justify="left",
        caption="x: times faster than the baseline in the column. limit: compressed bytes / achievable bandwidth.",
        caption_justify="left",
    )
    for name in ("batch", "context", "time us", "of limit", "Triton shipped", "Triton tuned", "bf16", "splits"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("kernel", no_wrap=True)
    grid.add_column("evidence", no_wrap=True)
    short = kernel_names(table)
    for _, group in groupby(rows(table), key=lambda row: row.batch):
        for row in group:
            grid.add_row(
                str(row.batch),
                tokens(row.context) + (" ragged" if row.ragged else ""),
                us(row.time_us),
                f"{row.limit_share:.0%}",
                *(times(row.speedup(b)) for b in (row.shipped_us, row.tuned_us, row.bf16_us)),
                str(row.splits),
                short[row.kernel],
                row.evidence,
            )
        grid.add_section()
    return grid


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


def layouts(lines: Sequence[LayoutRow]) -> Grid:
    """The best kernel of each warp count."""
    largest = lines[0]
    where = f"batch {largest.batch}, context {tokens(largest.context)}"
    grid = Grid(
        title="warps per CTA compared",
        title_justify="left",
        caption=f"time, registers and occupancy: {where}. Others: geometric mean over all buckets.",
        caption_justify="left",
    )
    for name in ("warps", "time us", "of limit", "vs Triton twin", "registers", "shared KB", "occupancy"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("evidence", no_wrap=True)
    for line in lines:
        grid.add_row(
            str(line.warps),
            us(line.time_us),
            f"{line.limit_share:.0%}",
            times(line.triton_ratio),
            str(line.registers),
            f"{line.shared_bytes / 1024:.1f}",
            f"{line.occupancy:.0%}",
            line.evidence,
        )
    return grid


def steps(model: str, device: str, lines: Sequence[StepRow]) -> Grid:
    """Attention time of a decode step over all layers, by concurrency."""
    layers = lines[0].layers
    grid = Grid(
        title=f"{model} on {device}: attention per decode step, {layers} layers, context {tokens(lines[0].context)}",
        title_justify="left",
        caption="us, measured; x: times faster than the baseline in the column. The rest of a step is not run.",
        caption_justify="left",
    )
    for name in ("concurrency", "bf16", "Triton", "WPH", "vs bf16", "vs Triton", "of limit"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("kernels from", no_wrap=True)
    for line in lines:
        ours = line.times_us["wph"]
        bf16, triton = (fastest(line.times_us, names) for names in (BF16, SHIPPED))
        grid.add_row(
            str(line.batch),
            us(bf16),
            us(triton),
            us(ours),
            *(times(None if t is None else t / ours) for t in (bf16, triton)),
            f"{line.limit_us / ours:.0%}",
            line.source,
        )
    return grid


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
