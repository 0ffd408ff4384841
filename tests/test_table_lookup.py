"""Which kernel a table names for a call, and what it says of why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_table import K0, K1, make_table, timing

from tuner.space import Problem
from tuner.table import Choice, explain, lookup, mixes_lengths
from tuner.table.schema import RunnerUp
from tuner.workload import Bucket


def test_lookup_by_batch() -> None:
    table = make_table()
    assert lookup(table, 1) == Choice(K0.id, 64)
    assert lookup(table, 3) == Choice(K1.id, 8)  # log2(8/3) < log2(3/1)
    assert lookup(table, 2) == Choice(K0.id, 64)
    assert lookup(table, 128) == Choice(K1.id, 1)
    assert lookup(table, 129) is None
    assert lookup(table, 0) is None


def test_lookup_takes_the_larger_of_two_equally_near() -> None:
    table = make_table(by_batch=make_table().by_batch[:2])
    table = replace(table, by_batch=(table.by_batch[0], replace(table.by_batch[1], batch=4)))
    assert lookup(table, 2) == Choice(K1.id, 8)


def test_lookup_by_batch_and_context() -> None:
    table = make_table()
    assert lookup(table, 8, 2000) == Choice(K0.id, 13)
    assert lookup(table, 8, 60000) == Choice(K1.id, 14)
    assert lookup(table, 8, 131072) == Choice(K1.id, 14)
    assert lookup(table, 8, 131073) == lookup(table, 8), "far outside: the choice that is valid for every context"
    assert lookup(table, 8, 500) == lookup(table, 8)


def test_lookup_of_ragged_batches() -> None:
    """The bucket's longest request has 44376 tokens, the 15/16 quantile of those up to 65536."""
    table = make_table()
    for context in (22188, 44376, 60000, 88752):
        assert lookup(table, 8, context, ragged=True) == Choice(K0.id, 17)
    for batch, context in ((8, 22187), (8, 88753), (64, 60000)):
        assert lookup(table, batch, context, ragged=True) == lookup(table, batch, context), "no ragged bucket near"
    assert lookup(table, 8, ragged=True) == lookup(table, 8)
    assert "ragged up to 65536, the longest 44376" in explain(table, 8, 60000, ragged=True).lines[0]
    assert "no ragged bucket is within 2 x" in explain(table, 64, 60000, ragged=True).lines[0]


def test_what_the_host_knows_tells_ragged_batches() -> None:
    assert mixes_lengths(4, 1000, 2000) and not mixes_lengths(4, 1000, 2001)
    assert not mixes_lengths(1, 1000, 1000)
    assert mixes_lengths(4, 1000, None), "most batches are unequal"
    assert not mixes_lengths(4, None, 10) and not mixes_lengths(1, 1000, None)
    for batch in (4, 8, 128):
        ragged = Bucket(batch, 65536, ragged=True)
        assert ragged.longest == max(ragged.lengths()) and mixes_lengths(batch, ragged.longest, ragged.tokens)


def test_lookup_scales_by_kv_heads() -> None:
    assert lookup(make_table(), 4, kv_heads=4) == lookup(make_table(), 8)
    assert lookup(make_table(), 128, kv_heads=4) is None


def test_explain() -> None:
    told = explain(make_table(), 8, 60000)
    text = "\n".join(told.lines)
    assert told.choice == Choice(K1.id, 14) and told.kernel == K1 and told.timing == timing(65536, 20.0)
    for words in ("predicted 20.00 us", "50%", "memory", "10.00 x as long", "not measured", "runner-up: 1.250 x"):
        assert words in text
    assert "by_batch" not in text
    assert explain(make_table(), 8).lines[0].endswith("the best of each context")
    assert "default configuration" in explain(make_table(), 1000).lines[0]


@pytest.mark.parametrize(
    ("context", "tie", "told"),
    [
        (None, False, "0.900 x as long here, but slower for other lengths"),
        (60000, False, "0.900 x as long here, but slower in another race, or a kernel more"),
        (60000, True, "not to be told apart"),
    ],
)
def test_explain_says_why_a_faster_runner_up_does_not_serve(context: int | None, tie: bool, told: str) -> None:
    table = make_table()

    def outrun(entries: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(e, runner_up=RunnerUp(K0.params, 2, 0.9, tie)) for e in entries)

    table = replace(table, by_batch=outrun(table.by_batch), by_batch_and_context=outrun(table.by_batch_and_context))
    assert f"runner-up: {told}" in explain(table, 8, context).lines[-1]


@pytest.mark.parametrize(
    ("cache_format", "told"),
    [
        ("turboquant_4bit_nc", "262 bytes per token and KV head, 262 of them data, no padding; 3.91 x fewer than bf16"),
        ("turboquant_seed", "512 bytes per token and KV head, 374 of them data, 138 (27%) are padding; 2.00 x fewer"),
        ("turboquant_outlier", "512 bytes per token and KV head, 412 of them data, 100 (20%) are padding; 2.00 x"),
    ],
)
def test_explain_tells_what_slots_waste(cache_format: str, told: str) -> None:
    table = make_table(problem=Problem("decode", 256, 16, cache_format))
    assert f"cache {cache_format}: {told}" in "\n".join(explain(table, 8).lines)
