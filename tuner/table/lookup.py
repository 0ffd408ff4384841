"""Which kernel a table names for a call, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from tuner.table.schema import BatchEntry, BucketEntry, Kernel, Table, Timing

CUT_OFF = 2.0
"""How far outside the tuned range a choice is still trusted, as a factor.

Neighbouring buckets are a factor of 2 to 4 apart, so within the range no call is further than that from a timed one;
beyond it the number of waves, and with it the right number of splits, may differ by more than was ever timed.
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A kernel of the table and the ``splits`` argument of its launch."""

    kernel: str
    splits: int


@dataclass(frozen=True)
class Explanation:
    """Why ``lookup`` answers as it does; ``lines`` is that as text. Without a choice all else is None."""

    choice: Choice | None
    kernel: Kernel | None
    entry: BatchEntry | BucketEntry | None
    timing: Timing | None
    lines: tuple[str, ...]


def lookup(
    table: Table, batch: int, context: int | None = None, *, kv_heads: int | None = None, ragged: bool = False
) -> Choice | None:
    """The choice for ``batch`` requests whose longest has ``context`` tokens; None: run the default configuration.

    Without ``context`` (a CUDA graph, captured once for all lengths) the choice of ``by_batch``. The nearest tuned
    bucket on a log scale is taken, batch before context, the larger one of two equally near. A batch more than
    ``CUT_OFF`` times outside the tuned range has no choice; a context that far outside falls back on ``by_batch``,
    which is valid for every context. ``ragged`` (``mixes_lengths``) asks for a ragged bucket; where batch or context is
    more than ``CUT_OFF`` times outside theirs, by their longest requests, the batch is served as if it were equal.
    ``kv_heads`` (a model sharded otherwise than the tuned one): what counts is the number of independent rows,
    batch x KV heads, so the batch is scaled to the tuned number of KV heads.
    """
    entry = _entry(table, batch * row_scale(table, kv_heads), context, ragged)
    return None if entry is None else Choice(entry.kernel, entry.splits)


def explain(
    table: Table, batch: int, context: int | None = None, *, kv_heads: int | None = None, ragged: bool = False
) -> Explanation:
    """As ``lookup``, with kernel, limit, share, bottleneck, baselines, runner-up and the reason."""
    rows = batch * row_scale(table, kv_heads)
    entry = _entry(table, rows, context, ragged)
    if entry is None:
        batches = sorted({e.batch for e in table.by_batch})
        reason = (
            f"batch {rows:g} is more than {CUT_OFF:g} times outside the tuned batches {batches[0]} to {batches[-1]}: "
            "the template's default configuration runs"
            if batches
            else "the table has no entries: the template's default configuration runs"
        )
        return Explanation(None, None, None, None, (reason,))
    timing = entry.timing if isinstance(entry, BucketEntry) else _nearest(entry.timings, context, _context)
    kernel = table.kernel(entry.kernel)
    lines = (
        *_call_lines(table, entry, timing, batch, context, kv_heads, ragged),
        _kernel_line(kernel, entry.splits),
        _slot_line(table),
        *_time_lines(table, timing),
        _runner_up_line(entry),
    )
    return Explanation(Choice(entry.kernel, entry.splits), kernel, entry, timing, lines)


def mixes_lengths(batch: int, context: int | None, tokens: int | None) -> bool:
    """Whether ``batch`` requests of up to ``context`` tokens, ``tokens`` in all, are so unequal that a ragged bucket
    stands for them: half as long as the longest, or less, in the mean. With ``tokens``, ``context`` has to be the
    longest request itself, not a bound. Without, several requests are taken to be unequal, as most batches are."""
    if context is None or batch <= 1:
        return False
    return tokens is None or 2 * tokens <= batch * context


def row_scale(table: Table, kv_heads: int | None) -> float:
    """Rows of the tuned shape that a request with ``kv_heads`` KV heads counts for."""
    return 1.0 if kv_heads is None else kv_heads / table.kv_heads


def _context(timing: Timing) -> int:
    return timing.context


def _entry(table: Table, batch: float, context: int | None, ragged: bool) -> BatchEntry | BucketEntry | None:
    if batch <= 0 or not _covered(batch, (e.batch for e in table.by_batch)):
        return None
    if context is not None and context > 0:
        for kind in (True, False) if ragged else (False,):
            row = [e for e in table.by_batch_and_context if e.timing.ragged == kind]
            if _covered(batch, (e.batch for e in row)):
                nearest = _nearest(row, batch, lambda e: e.batch).batch
                row = [e for e in row if e.batch == nearest]
                if _covered(context, (e.longest for e in row)):
                    return _nearest(row, context, lambda e: e.longest)
    return _nearest(table.by_batch, batch, lambda e: e.batch)


def _covered(value: float, tuned: Iterable[int]) -> bool:
    known = list(tuned)
    return bool(known) and min(known) / CUT_OFF <= value <= max(known) * CUT_OFF


def _nearest(items: Iterable[T], value: float | None, place: Callable[[T], int]) -> T:
    """The item nearest to ``value`` on a log scale, the larger of two equally near; the largest where value is None."""
    if not value:
        return max(items, key=place)
    # Rounded, because log2(8/4) and log2(16/8) should tie exactly on every machine.
    return min(items, key=lambda item: (round(abs(math.log2(place(item) / value)), 9), -place(item)))


def _call_lines(
    table: Table,
    entry: BatchEntry | BucketEntry,
    timing: Timing,
    batch: int,
    context: int | None,
    kv_heads: int | None,
    ragged: bool,
) -> list[str]:
    asked = f"batch {batch}" + (", ragged" if ragged else "") + (f", {kv_heads} KV heads" if kv_heads else "")
    asked += f", context {context}" if context else ", any context"
    kind = "ragged up to " if timing.ragged else ""
    if isinstance(entry, BucketEntry):
        found = f"{asked}: nearest tuned bucket is batch {entry.batch}, context {kind}{timing.context}"
        if timing.ragged:
            return [f"{found}, the longest {entry.longest}"]
        return [found + (f"; no ragged bucket is within {CUT_OFF:g} x" if ragged else "")]
    why = "as a CUDA graph needs" if not context else f"because {context} is outside the tuned contexts"
    return [
        f"{asked}: the choice of batch {entry.batch} for every context, {why}; it costs at most "
        f"{entry.worst_ratio:.3f} x, on average {entry.mean_ratio:.3f} x the best of each context",
        f"times below are for context {kind}{timing.context}",
    ]


def _kernel_line(kernel: Kernel, splits: int) -> str:
    params = " ".join(f"{n}={v}" for n, v in kernel.params)
    return (
        f"kernel {kernel.id}, splits {splits}: {params}; {kernel.registers} registers, "
        f"{kernel.shared_bytes} bytes shared, {kernel.spill_bytes} bytes spilled"
    )


def _slot_line(table: Table) -> str:
    layout = table.problem.layout
    used, unused = layout.content_bytes, layout.token_bytes - layout.content_bytes
    waste = f"{unused} ({unused / layout.token_bytes:.0%}) are padding" if unused else "no padding"
    return (
        f"cache {table.problem.cache_format}: {layout.token_bytes} bytes per token and KV head, "
        f"{used} of them data, {waste}; {layout.compression:.2f} x fewer than bf16"
    )


def _time_lines(table: Table, t: Timing) -> list[str]:
    interval = f" [{t.ci_low_us:.2f}, {t.ci_high_us:.2f}]" if table.evidence == "measured" else ""
    samples = f" of {t.samples} samples" if t.samples else ""
    clock = f" at {t.clock_mhz:.0f} MHz" if t.clock_mhz else ""
    lines = [
        f"{table.evidence} {t.time_us:.2f} us{interval}{samples}{clock}; "
        f"memory limit {t.limit_us:.2f} us, {t.limit_share:.0%} of it reached"
        + (f"; bottleneck: {t.bottleneck}" if t.bottleneck else "")
    ]
    for name, time_us in t.baselines_us.items():
        lines.append(
            f"baseline {name}: not measured"
            if time_us is None
            else f"baseline {name}: {time_us:.2f} us, {time_us / t.time_us:.2f} x as long"
        )
    return lines


def _runner_up_line(entry: BatchEntry | BucketEntry) -> str:
    r = entry.runner_up
    if r is None:
        return "runner-up: none, no other kernel was timed here"
    if r.tie:
        verdict = "not to be told apart, so the simpler or shared kernel stands"
    else:
        verdict = f"{r.ratio:.3f} x as long"
        if r.ratio < 1 and isinstance(entry, BatchEntry):
            verdict += " here, but slower for other lengths that this entry serves"
        elif r.ratio < 1:
            verdict += " here, but slower in another race, or a kernel more"
    return f"runner-up: {verdict}: splits {r.splits}, " + " ".join(f"{n}={v}" for n, v in r.params)
