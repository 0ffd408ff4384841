"""Where the regions of a ``wph_decode`` CTA's shared memory lie, given their sizes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from tuner.targets import RESERVED_SHARED_BYTES

SHARED_START = RESERVED_SHARED_BYTES
"""Shared address of the first byte of dynamic shared memory."""

_OVERREAD = 16
"""Bytes past the last stage that reading a row's last word may touch."""

_SMALL_TABLE = 8 * 1024
"""A lookup table of at most so many bytes takes the first place: others would save next to nothing."""


class Regions(NamedTuple):
    """All that the layout depends on, named as in ``DecodePlan``: many configurations have these in common."""

    multiplier_bytes: int
    exchange_bytes: int
    stats_bytes: int
    barrier_bytes: int
    queue_bytes: int
    lookup_bytes: int
    stage_bytes: int
    stage_count: int
    query_room: int
    query_gap: int
    merge_bytes: int


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@lru_cache(maxsize=4096)
def arrange(regions: Regions) -> Mapping[str, int]:
    """Start of each region. Staging and, right behind it, the query become the merge buffer once a span's tokens
    are consumed.

    The lookup table must lie at a multiple of its size, so stages and other regions go before and after it, in the
    way that ends first: stages start at ``staging``, and where they are split, those from ``stages_before`` on at
    ``staging_after``. A table with the query in its gaps may lie anywhere, and comes first.
    """
    sizes = {
        "multiplier": regions.multiplier_bytes,
        "exchange": regions.exchange_bytes,
        "stats": regions.stats_bytes,
        "barriers": regions.barrier_bytes,
        # Eight bytes on, the mbarrier of the inbox; or 12 bytes for each word of shares, four at most.
        "flag": 16,
        "queue": regions.queue_bytes,
    }
    others = sorted(((name, round_up(size, 128)) for name, size in sizes.items()), key=lambda o: -sizes[o[0]])
    at = -SHARED_START % regions.lookup_bytes if regions.lookup_bytes and not regions.query_gap else 0
    best: dict[str, int] | None = None
    while best is None or at + regions.lookup_bytes < best["end"]:
        fit = min(regions.stage_count, at // max(regions.stage_bytes, 1))
        for before, query_before in itertools.product({0, max(fit - 1, 0), fit}, (False, True)):
            best = _layout(regions, others, at, before, query_before, best) or best
        if regions.query_gap or regions.lookup_bytes <= _SMALL_TABLE:
            break
        at += regions.lookup_bytes
    assert best is not None, "a layout with everything behind the table always exists"
    return MappingProxyType(best)


def _layout(
    regions: Regions,
    others: list[tuple[str, int]],
    lookup: int,
    before: int,
    query_before: bool,
    best: dict[str, int] | None,
) -> dict[str, int] | None:
    """Regions around a table at ``lookup``, with ``before`` stages and perhaps the query in front of it; None where
    they do not fit, or end no earlier than ``best``.
    """
    after = lookup + regions.lookup_bytes
    stages = [before * regions.stage_bytes, (regions.stage_count - before) * regions.stage_bytes]
    runs = [round_up(n + _OVERREAD, 128) if n else 0 for n in stages]
    if regions.query_gap:
        query = lookup + regions.query_gap
    else:
        query = runs[0] if query_before else after + runs[1]
        runs[0 if query_before else 1] += round_up(regions.query_room, 128)
    behind = runs[1] >= runs[0]
    runs[behind] = max(runs[behind], round_up(regions.merge_bytes, 128))
    if runs[0] > lookup:
        return None
    placed = _place(others, runs[0], lookup, after + runs[1])
    if best and placed["end"] >= best["end"]:
        return None
    merge = after if behind else 0
    fixed = {"lookup": lookup, "staging": 0 if before else after, "query": query, "merge": merge}
    stages_at = {"stages_before": before, "staging_after": after}
    return placed | fixed | stages_at


def _place(others: list[tuple[str, int]], low: int, room: int, high: int) -> dict[str, int]:
    """Offsets of regions of whole 128 bytes, in their order: from ``low`` up while it is below ``room``, then from
    ``high`` up. ``end`` is where the last one ends.
    """
    offsets = {}
    for name, size in others:
        if low + size <= room:
            offsets[name], low = low, low + size
        else:
            offsets[name], high = high, high + size
    return offsets | {"end": high}
