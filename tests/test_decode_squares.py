"""Squares of keys that ``wph_decode`` adds up in halves: on the emulator, and what the halves cost a key's length."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from decode_emulated import check, small_case

from tuner.emulate import compile_many
from tuner.reference import bulk_case, codebook, midpoints
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space
from tuner.space.core import Value
from tuner.space.plan import DecodePlan
from tuner.targets import get_target

FORMATS = ("turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
QUERIES: dict[str, tuple[int, dict[str, Value]]] = {
    "shared": (8, {"lookup": "spread"}),
    "registers": (6, {"lookup": "woven", "dim_warps": 2, "tail": "apart", "beginning": "prompt"}),
    "paired": (4, {"lookup": "table", "tokens": 32}),
    "joined": (16, {"lookup": "prmt", "head_warps": 2}),
}
"""Query heads per KV head and layout by where the query waits: of 3-bit indices, some are looked up four k-steps at a
time (spread, woven), some k-step by k-step."""


def chained(cache_format: str, head_dim: int, query: str) -> Config:
    gqa, layout = QUERIES[query]
    config = default_config(Problem("decode", head_dim, gqa, cache_format))
    return config.with_(squares=2, query=query, stages=1, **layout)


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_many([render(chained(*values)) for values in product(FORMATS, (128, 256), QUERIES)], jobs=2)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_chains_of_squares_agree_with_the_reference(cache_format: str, head_dim: int, query: str) -> None:
    config = chained(cache_format, head_dim, query)
    assert not get_space("decode").refusals(config, get_target("sm_90"))
    check(config, small_case(config, (150, 0, 1, 33)))


@pytest.mark.parametrize(("cache_format", "words"), [(FORMATS[0], "whole_adjacent"), (FORMATS[1], "whole")])
def test_chains_of_squares_in_rows_that_begin_within_words(cache_format: str, words: str) -> None:
    """As what wins on an H200 reads them."""
    config = chained(cache_format, 256, "registers").with_(load="bulk", warps=8, head_warps=4, words=words, tokens=32)
    assert not get_space("decode").refusals(config, get_target("sm_90"))
    check(config, small_case(config, (150, 0, 1, 33)))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_scores_of_many_nats_see_exact_lengths(cache_format: str) -> None:
    """Scores deviate by about 50: whatever moves a key's length by 1e-5 moves its weight by a thousandth."""
    config = default_config(Problem("decode", 128, 4, cache_format)).with_(squares=2)
    lengths = tuple(1024 - 3 * i for i in range(16))
    for seed in range(6):
        case = bulk_case(config.problem.layout, lengths, q_heads=16, kv_heads=4, seed=seed)
        check(config, replace(case, query=case.query * 30), splits=1)


def coded_rows(bits: int, head_dim: int) -> np.ndarray:
    """Normal rows as the kernel multiplies them, levels as halves [2000, D]."""
    plan = DecodePlan(default_config(Problem("decode", head_dim, 4, f"turboquant_{bits}bit_nc")))
    levels = codebook(bits, head_dim)
    rows = np.random.default_rng(0).standard_normal((2000, head_dim)) * head_dim**-0.5
    return (levels.numpy() * plan.level_scale).astype(np.float16)[np.searchsorted(midpoints(levels).numpy(), rows)]


def squared_lengths(rows: np.ndarray, middle: float, steps: int) -> np.ndarray:
    """Sums of squares [N] of halves [N, D], ``steps`` k-steps at a time in halves."""
    chains = rows.astype(np.float64).reshape(len(rows), -1, steps, 16)
    pending = np.full((len(rows), chains.shape[1], 16), -middle, np.float16)
    for k in range(steps):  # a product of halves and a half are exact in float64: one rounding, as an FMA's
        pending = (chains[:, :, k] ** 2 + pending).astype(np.float16)
    return pending.astype(np.float64).sum((1, 2)) + middle * rows.shape[1] / steps


LENGTH_ERRORS = {
    (3, 1): (1.8e-4, 1.2e-5),
    (3, 2): (1.6e-5, 2e-5),
    (4, 1): (1.1e-4, 5.2e-6),
    (4, 2): (1.6e-5, 2.6e-5),
}
"""Per index width and k-steps in a chain, what a row's squared length may be off by: in the mean over rows, which only
scales all scores alike, and the deviation at head dim 128; a tenth more than is found."""


@pytest.mark.parametrize(("bits", "steps"), LENGTH_ERRORS)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_chains_begin_where_rounding_moves_a_rows_length_least(head_dim: int, bits: int, steps: int) -> None:
    config = default_config(Problem("decode", head_dim, 4, f"turboquant_{bits}bit_nc")).with_(squares=steps)
    middle = DecodePlan(config).square_middle
    assert float(np.float16(middle)) == middle
    rows = coded_rows(bits, head_dim)
    errors = squared_lengths(rows, middle, steps) / (rows.astype(np.float64) ** 2).sum(1) - 1
    mean, deviation = LENGTH_ERRORS[bits, steps]
    assert abs(errors.mean()) < mean
    assert errors.std() < deviation * (128 / head_dim) ** 0.5
