"""One HTML page about dispatch tables: plots, winners, kernels, provenance. It loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tuner.report.rows import Row, rows, summary
from tuner.report.svg import Series, legend, line_plot
from tuner.report.terminal import kernel_names, problem_title, times, tokens, us
from tuner.table.schema import Table

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #8886; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: 1rem 0; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #8883; } td.text { text-align: left; }
.scroll { overflow-x: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; flex: 1 1 22rem; max-width: 36rem; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; } svg text { font-size: 10.5px; fill: currentColor; }
svg .grid { stroke: #8884; stroke-width: .6; } svg .x, svg .axis { text-anchor: middle; } svg .y { text-anchor: end; }
.legend span { margin-right: 1rem; white-space: nowrap; } .legend i { display: inline-block; width: 1.6rem;
  border-top-width: 2.5px; margin-right: .3rem; vertical-align: middle; }
.predicted { background: #e69f0033; } .measured { background: #009e7333; }
.tag { padding: 0 .4rem; border-radius: .3rem; }
"""


def page(tables: Sequence[Table]) -> str:
    """The page for ``tables``, complete in itself."""
    body = "\n".join(_section(table, f"t{i}") for i, table in enumerate(tables))
    contents = "".join(f'<li><a href="#t{i}">{escape(_title(t))}</a> {_tag(t)}</li>' for i, t in enumerate(tables))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Dispatch tables</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Decode attention over compressed KV caches: dispatch tables</h1><ul>{contents}</ul>\n"
        "<p>Limit: compressed bytes over the achievable bandwidth. <em>measured</em>: timed on the device named. "
        "<em>predicted</em>: a static model's estimate from the compiled code; no such device was attached.</p>\n"
        f"{body}\n</body></html>\n"
    )


def _section(table: Table, anchor: str) -> str:
    buckets = rows(table)
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary(table))
    return (
        f'<h2 id="{anchor}">{escape(_title(table))} {_tag(table)}</h2>\n<ul>{lines}</ul>\n'
        f'<div class="plots">{_share_plot(buckets)}{_time_plots(buckets)}</div>\n'
        f"{_winners(table, buckets)}\n{_kernels(table)}\n{_provenance(table)}"
    )


def _share_plot(buckets: Sequence[Row]) -> str:
    """Share of the memory limit over context, a line per batch."""
    uniform = [r for r in buckets if not r.ragged]
    series = [
        Series(f"batch {b}", tuple((r.context, 100 * r.limit_share) for r in uniform if r.batch == b))
        for b in dict.fromkeys(r.batch for r in uniform)
    ]
    return _figure("Share of the memory limit", series, uniform, y_label="%", log_y=False, y_max=100)


def _time_plots(buckets: Sequence[Row]) -> str:
    """Time over context against the baselines: the smallest batch, a middle one and the largest."""
    uniform = [r for r in buckets if not r.ragged]
    batches = list(dict.fromkeys(r.batch for r in uniform))
    picked = dict.fromkeys(batches[i] for i in (0, len(batches) // 2, -1)) if batches else {}
    return "".join(_time_plot([r for r in uniform if r.batch == batch], batch) for batch in picked)


def _time_plot(buckets: Sequence[Row], batch: int) -> str:
    lines = (
        ("WPH", False, [(r.context, r.time_us) for r in buckets]),
        ("memory limit", True, [(r.context, r.limit_us) for r in buckets]),
        ("Triton as shipped", True, [(r.context, r.shipped_us) for r in buckets]),
        ("Triton tuned", True, [(r.context, r.tuned_us) for r in buckets]),
        ("bf16 attention", True, [(r.context, r.bf16_us) for r in buckets]),
    )
    series = []
    for name, dashed, points in lines:
        known = tuple((float(x), y) for x, y in points if y is not None)
        if known:
            series.append(Series(name, known, dashed))
    return _figure(f"Time per call, batch {batch}", series, buckets, y_label="us", log_y=True)


def _figure(
    title: str,
    series: Sequence[Series],
    buckets: Sequence[Row],
    *,
    y_label: str,
    log_y: bool,
    y_max: float | None = None,
) -> str:
    if not series:
        return ""
    ticks = [(float(c), tokens(c)) for c in sorted({r.context for r in buckets})]
    plot = line_plot(
        series, title=title, x_label="context, tokens", y_label=y_label, x_ticks=ticks, log_y=log_y, y_max=y_max
    )
    return f"<figure><figcaption>{escape(title)} ({buckets[0].evidence})</figcaption>{plot}{legend(series)}</figure>"


def _winners(table: Table, buckets: Sequence[Row]) -> str:
    names = kernel_names(table)
    head = (
        "batch",
        "context",
        "time us",
        "95% interval",
        "of limit",
        "vs Triton shipped",
        "vs Triton tuned",
        "vs bf16",
        "kernel",
        "splits",
        "bottleneck",
        "evidence",
    )
    body = [
        (
            str(r.batch),
            tokens(r.context) + (" ragged" if r.ragged else ""),
            us(r.time_us),
            f"{us(r.ci_low_us)} to {us(r.ci_high_us)}" if r.ci_high_us > r.ci_low_us else "-",
            f"{r.limit_share:.0%}",
            *(times(r.speedup(b)) for b in (r.shipped_us, r.tuned_us, r.bf16_us)),
            names[r.kernel],
            str(r.splits),
            r.bottleneck or "-",
            r.evidence,
        )
        for r in buckets
    ]
    return _table(head, body)


def _kernels(table: Table) -> str:
    names = kernel_names(table)
    head = ("kernel", "registers", "spill bytes", "shared KB", "configuration", "cubin")
    body = [
        (
            names[k.id],
            str(k.registers),
            str(k.spill_bytes),
            f"{k.shared_bytes / 1024:.1f}",
            " ".join(f"{n}={v}" for n, v in k.params),
            k.id,
        )
        for k in table.kernels
    ]
    return _table(head, body)


def _provenance(table: Table) -> str:
    p = table.provenance
    known = (
        (name, getattr(p, name))
        for name in ("date", "seed", "nvcc", "torch", "triton", "cupy", "vllm", "optuna", "git_commit", "template_hash")
    )
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in known if value is not None]
    return f"<p>{escape('; '.join(facts))}</p>"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    headings = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>\n" for line in body)
    return f'<div class="scroll"><table><thead><tr>{headings}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _title(table: Table) -> str:
    return problem_title(table.problem, table.device.name, table.device.arch)


def _tag(table: Table) -> str:
    return f'<span class="tag {escape(table.evidence, quote=True)}">{escape(table.evidence)}</span>'
