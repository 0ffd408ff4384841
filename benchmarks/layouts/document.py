"""docs/layout-study.md and its plots, from the recorded data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from tuner.report.rows import geometric_mean
from tuner.report.svg import Series, line_plot, standalone
from tuner.report.terminal import tokens, us

Study = Mapping[str, Any]
Row = Mapping[str, Any]
SEED_WARPS = 4
"""Warps per CTA of the kernel that this project grew from, which its authors found best of 1, 4 and 8."""

_HEAD = """# Layouts of a CTA: what wins where, and why

How many warps a CTA should have, what they should divide among themselves (KV heads, tokens, slices of the head dim,
planes), and how many rows each should keep in flight. Every layout that the search space allows was compiled, and timed
or predicted at four buckets, as each section says. Everything else is held fixed: codebook levels come from registers,
so that no table in shared memory counts against small CTAs; `wph_decode` copies asynchronously and multiplies on tensor
cores, `wph_dequant` loads directly and rotates on tensor cores, one step per CTA. Splits are the best of those tried
for each bucket. A search over all axes finds faster kernels than the ones here; this shows what the layout alone does.

Tables and plots are written by `python benchmarks/layout_study.py --render` from the data in
[layout-study/](layout-study/), the [conclusions](#conclusions) by hand from the same data. *measured*: timed on the
device named, as measuring is done everywhere here. *predicted*: the static model's estimate from the machine code for
that target; no such GPU was attached. The model knows registers, occupancy, bytes in flight, waves and instructions.
It does not know bank conflicts of a layout, the instruction cache, or how well DRAM pages are used.

*of limit*: time to move the bytes at the read bandwidth, over the time. *in flight*: bytes that the loads of an SM
full of these CTAs keep under way, over what Little's law asks for at that bandwidth. *resident*: warps per SM. *as
good*: layouts within 1% of the best on average. *best of 4 warps*: how many times slower the best layout of four warps
is, the count that the kernel this project grew from settled on.
"""


_COLUMNS = "| best layout on average | of limit | behind the best | registers | shared KB | resident | in flight |"
_RULES = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def document(studies: Sequence[Study], images: Mapping[str, Sequence[str]]) -> str:
    """The whole page. ``images``: name of a study -> paths of its plots, relative to the page."""
    ordered = sorted(studies, key=lambda s: (s["op"], s["head_dim"], s["evidence"], s["device"]["name"]))
    measured = any(s["evidence"] == "measured" for s in ordered)
    parts = [_HEAD, *([] if measured else ["**Nothing below was measured yet: all of it is predicted.**\n"])]
    parts.append(_overview(ordered))
    parts += [_section(s, images.get(name(s), ())) for s in ordered]
    return "\n".join(parts)


def name(study: Study) -> str:
    """Of its files."""
    device = study["device"]["name"].replace(" ", "_").replace("/", "_")
    return f"{study['op']}-d{study['head_dim']}-{device}"


def plots(study: Study) -> dict[str, str]:
    """File name -> SVG: share of the limit over warps, and over rows in flight, a line per bucket."""
    found = {}
    for key, label in (("warps", "warps per CTA"), ("rows_in_flight", "rows in flight per warp")):
        series = []
        for bucket in study["buckets"]:
            best = _best_by(study, key, bucket)
            points = tuple((float(v), 100 * _share(study, row, bucket)) for v, row in sorted(best.items()))
            if points:
                series.append(Series(_bucket(study, bucket), points))
        ticks = sorted({x for s in series for x, _ in s.points})
        if not ticks:
            continue
        title = f"{_title(study)}: best share of the limit by {label}"
        plot = line_plot(
            series,
            title=title,
            x_label=label,
            y_label="% of the limit",
            x_ticks=[(x, f"{x:g}") for x in ticks],
            y_max=100,
        )
        found[f"{name(study)}-{key.replace('_', '-')}.svg"] = standalone(plot, series, title)
    return found


def _overview(studies: Sequence[Study]) -> str:
    lines = [
        "## Overview\n",
        "| op | head dim | device | evidence | best layout on average | of limit | as good "
        "| best of 4 warps | lost with 4 |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | --- | ---: |",
    ]
    for s in studies:
        ran = _ran(s)
        if not ran:
            continue
        best = min(ran, key=lambda r: _mean_slowness(s, r))
        fours = [r for r in ran if r["warps"] == SEED_WARPS]
        four = min(fours, key=lambda r: _mean_slowness(s, r)) if fours else None
        lost = f"{_mean_slowness(s, four) / _mean_slowness(s, best) - 1:.1%}" if four else "-"
        lines.append(
            f"| {s['op']} | {s['head_dim']} | {s['device']['name']} | {s['evidence']} | {_layout(best)} | "
            f"{1 / _mean_slowness(s, best):.0%} | {_as_good(s, ran)} | {_layout(four) if four else '-'} | {lost} |"
        )
    return "\n".join(lines) + "\n"


def _as_good(study: Study, ran: Sequence[Row]) -> str:
    """How many of those that ran are within 1% of the best on average."""
    least = min(_mean_slowness(study, r) for r in ran)
    return f"{sum(_mean_slowness(study, r) <= 1.01 * least for r in ran)} of {len(ran)}"


def _section(study: Study, images: Iterable[str]) -> str:
    ran = _ran(study)
    failed = [r for r in study["layouts"] if "failure" in r]
    tried = f"{len(study['layouts'])} of {study['layouts_allowed']} layouts tried"
    facts = [
        f"## {_title(study)}",
        "",
        f"{study['evidence'].capitalize()}, {study['provenance']['date'][:10]}. {study['q_heads']} query and "
        f"{study['kv_heads']} KV heads, `{study['cache_format']}`; {tried}"
        + (f", {len(failed)} of them failed ({failed[0]['failure'].partition(':')[0]})." if failed else "."),
        "",
    ]
    if not ran:
        return "\n".join([*facts, "None ran.\n"])
    facts += [
        _winners(study),
        _by_warps(study),
        _by_split(study),
        _why(study, ran),
        *(f"![{path}]({path})" for path in images),
        "",
    ]
    return "\n".join(facts)


def _why(study: Study, ran: Sequence[Row]) -> str:
    """What the best layouts have that the worst have not: medians of the best and of the worst quarter."""
    ordered = sorted(ran, key=lambda r: _mean_slowness(study, r))
    spread = _mean_slowness(study, ordered[-1]) / _mean_slowness(study, ordered[0]) - 1
    if spread <= 0.01:
        if study["evidence"] == "predicted":
            return (
                "The model sees no difference between the layouts (all within 1%): it takes memory for the limit of "
                "each. Only a measurement can say more.\n"
            )
        return "All layouts are within 1% of each other: what limits the kernel here is not the layout.\n"
    quarter = max(1, len(ordered) // 4)
    lines = [
        f"From the best to the worst layout the time grows by {spread:.0%}. Medians of the best and worst quarter:\n",
        "| quarter | of limit | warps | rows in flight | registers | shared KB | resident | in flight | spilling |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, rows in (("best", ordered[:quarter]), ("worst", ordered[-quarter:])):
        middle = {k: median(r[k] for r in rows) for k in ("warps", "rows_in_flight", "registers", "resident_warps")}
        flight = median(r["bytes_in_flight_per_sm"] for r in rows) / study["bytes_needed_per_sm"]
        shared_kb = median(r["shared_bytes"] for r in rows) / 1024
        lines.append(
            f"| {label} | {1 / median(_mean_slowness(study, r) for r in rows):.0%} | {middle['warps']:g} | "
            f"{middle['rows_in_flight']:g} | {middle['registers']:g} | "
            f"{shared_kb:.1f} | {middle['resident_warps']:g}/{study['max_warps']} | "
            f"{flight:.1f} x | {sum(r['spill_bytes'] > 0 for r in rows)} of {len(rows)} |"
        )
    return "\n".join(lines) + "\n"


def _winners(study: Study) -> str:
    """Who wins each bucket, and by how much over the best of the seed's warp count."""
    lines = [
        "| batch | context | best layout | us | of limit | resident | in flight | limited by | best of 4 warps |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for bucket, (batch, context) in study["buckets"].items():
        best = _best_by(study, "warps", bucket)
        if not best:
            continue
        row = min(best.values(), key=lambda r: r["times_us"][bucket])
        time = row["times_us"][bucket]
        four = f"{best[SEED_WARPS]['times_us'][bucket] / time:.2f} x" if SEED_WARPS in best else "-"
        lines.append(
            f"| {batch} | {tokens(context)} | {_layout(row)} | {us(time)} | {_share(study, row, bucket):.0%} | "
            f"{row['resident_warps']}/{study['max_warps']} | {_in_flight(study, row)} | "
            f"{row.get('bottlenecks', {}).get(bucket, '-')} | {four} |"
        )
    return "\n".join(lines) + "\n"


def _by_warps(study: Study) -> str:
    """The best layout of each warp count, on average."""
    return "\n".join([f"| warps {_COLUMNS}", f"| ---: {_RULES}", *_table_by(study, "warps")]) + "\n"


def _by_split(study: Study) -> str:
    """The best layout of the best ways to divide the work, on average."""
    lines = _table_by(study, "split", most=8)
    return "\n".join([f"| divided into {_COLUMNS}", f"| --- {_RULES}", *lines]) + "\n"


def _table_by(study: Study, key: str, most: int | None = None) -> list[str]:
    """A line per value of ``key``; with ``most`` only of so many, the fastest first."""
    ran = _ran(study)
    least = min(_mean_slowness(study, r) for r in ran)
    lines = []
    groups = {value: [r for r in ran if r[key] == value] for value in sorted({r[key] for r in ran})}
    best = {value: min(rows, key=lambda r: _mean_slowness(study, r)) for value, rows in groups.items()}
    values = sorted(best, key=lambda v: _mean_slowness(study, best[v]))[:most] if most else list(best)
    for value in values:
        row = best[value]
        slowness = _mean_slowness(study, row)
        resident = f"{row['resident_warps']}/{study['max_warps']}"
        lines.append(
            f"| {value} | {_layout(row)} | {1 / slowness:.0%} | {slowness / least - 1:.1%} | {row['registers']} | "
            f"{row['shared_bytes'] / 1024:.1f} | {resident} | {_in_flight(study, row)} |"
        )
    return lines


def _ran(study: Study) -> list[Row]:
    """Layouts with a time in every bucket that any has one in."""
    buckets = {b for r in study["layouts"] for b in r.get("times_us", {})}
    return [r for r in study["layouts"] if buckets and r.get("times_us", {}).keys() == buckets]


def _best_by(study: Study, key: str, bucket: str) -> dict[int, Row]:
    """Value of ``key`` -> the fastest layout of it at ``bucket``."""
    best: dict[int, Row] = {}
    for row in study["layouts"]:
        time = row.get("times_us", {}).get(bucket)
        if time is not None and (row[key] not in best or time < best[row[key]]["times_us"][bucket]):
            best[row[key]] = row
    return best


def _mean_slowness(study: Study, row: Row) -> float:
    """Geometric mean over buckets of time over limit."""
    return geometric_mean(t / study["limits_us"][b] for b, t in row["times_us"].items()) or float("inf")


def _share(study: Study, row: Row, bucket: str) -> float:
    return float(study["limits_us"][bucket] / row["times_us"][bucket])


def _in_flight(study: Study, row: Row) -> str:
    return f"{row['bytes_in_flight_per_sm'] / study['bytes_needed_per_sm']:.1f} x"


def _layout(row: Row) -> str:
    plural = "s" if row["warps"] > 1 else ""
    return f"{row['warps']} warp{plural}: {row['split']}, {row['rows_in_flight']} rows"


def _bucket(study: Study, bucket: str) -> str:
    batch, context = study["buckets"][bucket]
    return f"{batch} x {tokens(context)}"


def _title(study: Study) -> str:
    return f"{study['op']}, head dim {study['head_dim']}, {study['device']['name']} ({study['evidence']})"
