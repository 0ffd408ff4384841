"""The grid in a few lines: per shape the geometric mean and the worst of its points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.grid.verdict import Result, share, shipped_us, speedup, tuned_us
from tuner.report.rows import geometric_mean

HEADINGS = ("shape", "points", "of limit", "Triton", "tuned", "fa3", "fa3 fp8")
_SECTIONS = {"grid": "", "ragged": " ragged"}


def summary(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row per shape, uniform and ragged batches apart, in the columns of HEADINGS."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result["section"] in _SECTIONS:
            shape = f"D={result['head_dim']} {result['q_heads']}/{result['kv_heads']}{_SECTIONS[result['section']]}"
            groups.setdefault(shape, []).append(result)
    columns: tuple[tuple[str, Callable[[Result], float | None]], ...] = (
        ("{:.0%}", share),
        ("{:.3g}", lambda r: speedup(r, shipped_us(r))),
        ("{:.3g}", lambda r: speedup(r, tuned_us(r))),
        ("{:.3g}", lambda r: speedup(r, r["times_us"].get("fa3_bf16"))),
        ("{:.3g}", lambda r: speedup(r, r["times_us"].get("fa3_fp8"))),
    )
    return [
        (shape, str(len(group)), *(_cell(form, [value(r) for r in group]) for form, value in columns))
        for shape, group in groups.items()
    ]


def _cell(form: str, values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    mean = geometric_mean(known)
    return "-" if mean is None else f"{form.format(mean)}, {form.format(min(known))}"
