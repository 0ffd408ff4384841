"""Which kernel a table names for a call, and why."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.table.schema import BatchEntry, BucketEntry, Kernel, Table, Timing

CUT_OFF = 2.0
"""How far outside the tuned range a choice is still trusted, as a factor."""


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
    bucket on a log scale is taken, the larger one of two equally near. A batch more than ``CUT_OFF`` times outside the
    tuned range has no choice; a context that far outside falls back on ``by_batch``, which is valid for every context.
    ``kv_heads`` (a model sharded otherwise than the tuned one): what counts is the number of independent rows,
    batch x KV heads, so the batch is scaled to the tuned number of KV heads.
    """
    raise NotImplementedError


def explain(
    table: Table, batch: int, context: int | None = None, *, kv_heads: int | None = None, ragged: bool = False
) -> Explanation:
    """As ``lookup``, with kernel, limit, share, bottleneck, baselines, runner-up and the reason."""
    raise NotImplementedError
