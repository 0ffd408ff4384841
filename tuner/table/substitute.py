"""Another kernel of a table, where the one it names cannot read the cache at hand."""

from __future__ import annotations

import math

from tuner.geometry import split_candidates
from tuner.suits import CacheOrder, refusal
from tuner.table.lookup import Choice, row_scale
from tuner.table.schema import BatchEntry, BucketEntry, Kernel, Table
from tuner.targets import Target


def substitute(table: Table, batch: int, order: CacheOrder, target: Target, *, context: int) -> Choice | None:
    """The kernel that won at the batch size nearest to ``batch`` among those that can read a cache of ``order``.

    A model that is sharded otherwise than the tuned one is the usual case: kernels that copy the pages of several KV
    heads at once do not divide fewer heads. Nobody timed such a kernel there, so its splits follow the rule by which
    the search picks the ones to time (``split_candidates``), for requests of up to ``context`` tokens. None where no
    kernel of the table can read the cache.
    """
    rows = batch * row_scale(table, order.kv_heads)
    entries: list[BatchEntry | BucketEntry] = [*table.by_batch, *table.by_batch_and_context]
    readable = {k.id: k for k in table.kernels if refusal(k.config(table.problem), order) is None}
    found = [e for e in entries if e.kernel in readable]
    if not found:
        return None
    # Of equally near ones the larger batch, and what won at all contexts before what won at one.
    nearest = min(found, key=lambda e: (round(abs(math.log2(e.batch / rows)), 9), -e.batch))
    kernel = readable[nearest.kernel]
    return Choice(kernel.id, splits_by_rule(kernel, table, batch, order.kv_heads, target, context=context))


def splits_by_rule(kernel: Kernel, table: Table, batch: int, kv_heads: int, target: Target, *, context: int) -> int:
    """The first of the splits that a search would time."""
    return split_candidates(
        kernel.config(table.problem),
        registers=kernel.registers,
        batch=batch,
        kv_heads=kv_heads,
        max_context=context,
        target=target,
    )[0]
