"""Choosing few kernels: against exhaustive search on small cases, and on cases with known answers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.table import portfolio
from tuner.table.portfolio import best_splits, cover, for_all_contexts

TIMES = st.dictionaries(
    st.sampled_from([f"b{i}" for i in range(6)]),
    st.dictionaries(
        st.tuples(st.integers(0, 5), st.sampled_from([1, 4])), st.floats(1.0, 1.1), min_size=1, max_size=12
    ),
    max_size=6,
)


def serves(times: portfolio.Times, kernels: tuple[int, ...]) -> bool:
    return all(
        min((t for (k, _), t in row.items() if k in kernels), default=math.inf) <= min(row.values()) * 1.02
        for row in times.values()
    )


@given(TIMES)
@settings(max_examples=200, deadline=None)
def test_cover_is_the_smallest(times: portfolio.Times) -> None:
    chosen = cover(times)
    assert serves(times, chosen)
    if chosen:
        assert not any(serves(times, s) for s in itertools.combinations(range(6), len(chosen) - 1))


@given(TIMES)
@settings(max_examples=100, deadline=None)
def test_greedy_serves_every_bucket(times: portfolio.Times) -> None:
    limit, portfolio._EXACT_SUBSETS = portfolio._EXACT_SUBSETS, 0
    try:
        assert serves(times, cover(times))
    finally:
        portfolio._EXACT_SUBSETS = limit


def test_exact_beats_greedy() -> None:
    """Greedy takes kernel 0, which serves most, and then needs two more; kernels 1 and 2 alone serve all."""
    good = {0: "bcdf", 1: "abc", 2: "def"}
    times = {b: {(k, 1): 1.0 if b in s else 2.0 for k, s in good.items()} for b in "abcdef"}
    assert cover(times) == (1, 2)


def test_one_kernel_within_tolerance_is_enough() -> None:
    times = {"a": {(0, 1): 1.019, (1, 1): 1.0}, "b": {(0, 1): 1.0, (1, 1): 1.5}}
    assert cover(times) == (0,)
    assert cover(times, tolerance=0.01) == (0, 1)


def test_ties_go_to_the_simpler_kernel() -> None:
    assert cover({"a": {(1, 1): 1.0, (0, 1): 1.0}}) == (0,)


def test_many_kernels_stay_quick() -> None:
    times = {f"b{b}": {(k, 1): 1.0 + ((k * 37 + b * 11) % 97) / 97 for k in range(300)} for b in range(45)}
    assert serves(times, cover(times))


def test_best_splits() -> None:
    assert best_splits({"a": {(0, 4): 3.0, (0, 2): 1.0, (1, 8): 2.0}}) == {"a": {0: (2, 1.0), 1: (8, 2.0)}}


def test_for_all_contexts_keeps_the_worst_low() -> None:
    times = {
        "c1k": {(0, 1): 1.0, (0, 8): 1.2, (1, 1): 2.0},
        "c64k": {(0, 1): 9.0, (0, 8): 3.3, (1, 1): 3.0},
    }
    choice = for_all_contexts(times)
    assert choice and (choice.kernel, choice.splits) == (0, 8)
    assert choice.worst_ratio == pytest.approx(1.2) and choice.mean_ratio == pytest.approx(math.sqrt(1.2 * 1.1))


def test_for_all_contexts_wants_a_point_timed_everywhere() -> None:
    times = {"a": {(0, 1): 1.0}, "b": {(0, 2): 1.0}}
    assert for_all_contexts(times) is None
    assert for_all_contexts({}) is None
    assert for_all_contexts({"a": {(0, 1): 1.0, (1, 1): 2.0}}, kernels=[1]) == portfolio.BatchChoice(1, 1, 2.0, 2.0)


def test_mean_decides_between_worsts_that_are_near() -> None:
    times = {"a": {(0, 1): 1.50, (1, 1): 1.70, (2, 1): 1.0}, "b": {(0, 1): 1.5, (1, 1): 1.0, (2, 1): 3.0}}
    choice = for_all_contexts(times)
    assert choice and choice.kernel == 1
    choice = for_all_contexts(times, worst_within=0.1)
    assert choice and choice.kernel == 0


def test_a_choice_is_nearly_as_good_as_another_in_both_ratios() -> None:
    choice = portfolio.BatchChoice(0, 1, 1.4, 1.1)
    assert choice.nearly_as_good_as(portfolio.BatchChoice(1, 1, 1.38, 1.09))
    assert not choice.nearly_as_good_as(portfolio.BatchChoice(1, 1, 1.3, 1.1))
    assert not choice.nearly_as_good_as(portfolio.BatchChoice(1, 1, 1.4, 1.0))
