"""Line plots as inline SVG: enough for a report, with nothing to install or to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 40
_TITLE_HEIGHT, _LEGEND_HEIGHT, _LEGEND_COLUMNS = 24, 16, 4
_STYLE = (
    "text { font: 10.5px system-ui, sans-serif; } .title { font-size: 12px; text-anchor: middle; } "
    ".grid { stroke: #ccc; stroke-width: .6; } .x, .axis { text-anchor: middle; } .y { text-anchor: end; }"
)
"""Of a plot that is a file of its own; on a page the page's style holds."""
# Colours that stay apart for most colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Series:
    """Points of one line, x ascending; ``dashed`` marks what is compared against."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


@dataclass(frozen=True)
class _Scale:
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        share = 0.5 if high == low else (v - low) / (high - low)
        return self.start + share * (self.end - self.start)


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    log_y: bool = False,
    y_max: float | None = None,
) -> str:
    """An ``<svg>`` element. x is logarithmic, with ``x_ticks`` as (value, label); y is logarithmic or starts at 0."""
    ys = [y for s in series for _, y in s.points]
    xs = [x for x, _ in x_ticks]
    low, high = (min(ys), max(ys)) if log_y else (0.0, y_max or max(ys) * 1.05)
    x_at = _Scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, log=True)
    y_at = _Scale(low, high, HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">',
        *_grid(x_ticks, _log_ticks(low, high) if log_y else _linear_ticks(high), x_at, y_at),
        f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 6}">{escape(x_label)}</text>',
        f'<text class="axis" transform="translate(12 {HEIGHT / 2:.0f}) rotate(-90)">{escape(y_label)}</text>',
    ]
    for index, one in enumerate(series):
        parts += _line(one, COLOURS[index % len(COLOURS)], x_at, y_at)
    parts.append("</svg>")
    return "\n".join(parts)


def legend(series: Sequence[Series]) -> str:
    """The names of ``series`` in the colours of ``line_plot``, as HTML."""
    items = (
        f'<span><i style="border-color:{COLOURS[i % len(COLOURS)]};border-style:{"dashed" if s.dashed else "solid"}">'
        f"</i>{escape(s.name)}</span>"
        for i, s in enumerate(series)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _line(series: Series, colour: str, x_at: _Scale, y_at: _Scale) -> list[str]:
    spots = [(x_at(x), y_at(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>',
        *(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}">'
            f"<title>{escape(series.name)}: {value:.3g}</title></circle>"
            for (x, y), (_, value) in zip(spots, series.points, strict=True)
        ),
    ]


def _grid(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[float], x_at: _Scale, y_at: _Scale) -> list[str]:
    parts = []
    for value, label in x_ticks:
        x = x_at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}">{escape(label)}</text>')
    for value in y_ticks:
        y = y_at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{value:g}</text>')
    return parts


def _linear_ticks(high: float) -> list[float]:
    """About five round values from 0 to ``high``."""
    step = 10.0 ** math.floor(math.log10(high / 4)) if high > 0 else 1.0
    step *= next(m for m in (1, 2, 2.5, 5, 10) if high / (m * step) <= 5.5)
    return [round(i * step, 10) for i in range(int(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in range, or 1-2-5 steps where those are too few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks


def standalone(svg: str, series: Sequence[Series], title: str) -> str:
    """What ``line_plot`` made as a file of its own: with title, legend and style, on white."""
    rows = -(-len(series) // _LEGEND_COLUMNS)
    height = HEIGHT + _TITLE_HEIGHT + rows * _LEGEND_HEIGHT
    inner = svg.partition("\n")[2].rpartition("\n")[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-_TITLE_HEIGHT} {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<style>{_STYLE}</style>",
        f'<rect y="{-_TITLE_HEIGHT}" width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{WIDTH / 2:.0f}" y="-8">{escape(title)}</text>',
        inner,
    ]
    for i, one in enumerate(series):
        x = _LEFT + (i % _LEGEND_COLUMNS) * (WIDTH - _LEFT) / _LEGEND_COLUMNS
        y = HEIGHT + (i // _LEGEND_COLUMNS) * _LEGEND_HEIGHT + 6
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<line x1="{x:.0f}" x2="{x + 18:.0f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 23:.0f}" y="{y + 4}">{escape(one.name)}</text>')
    return "\n".join([*parts, "</svg>\n"])
