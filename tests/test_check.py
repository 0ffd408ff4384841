"""The gate passes what is right and catches each way of being wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from emulated import emulate_decode
from torch import Tensor

from tuner.check import check_decode, check_dequant
from tuner.reference import Case, dequantize
from tuner.space import Problem, default_config

PROBLEM = Problem("decode", 64, 4, "turboquant_4bit_nc")
DEQUANT = Problem("dequant", 64, 1, "turboquant_outlier")


def exact(case: Case, out: Tensor) -> None:
    out.copy_(case.expected())


def rows(case: Case, key: Tensor, value: Tensor) -> None:
    for out, whole in zip((key, value), dequantize(case.kv_cache, case.codec), strict=True):
        by_request = out.unflatten(0, tuple(case.block_table.shape))
        for b, length in enumerate(case.seq_lens.tolist()):
            for j in range(-(-length // case.block_size)):
                by_request[b, j] = whole[int(case.block_table[b, j])].bfloat16()


@pytest.mark.parametrize("level", ["tiny", "quick"])
def test_the_reference_passes(level: str) -> None:
    result = check_decode(exact, PROBLEM, level=level)
    assert result.passed, result.detail
    assert 0 < result.worst_error < 3e-3


def test_the_reference_passes_full_at_a_large_group() -> None:
    result = check_decode(exact, Problem("decode", 64, 7, "turboquant_k8v4"), level="full", kv_heads=1)
    assert result.passed, result.detail


def wrong_scale(case: Case, out: Tensor) -> None:
    out.copy_(case.expected() * 1.01)


def one_head_wrong(case: Case, out: Tensor) -> None:
    exact(case, out)
    out[-1, -1] = out[-1, 0]


def forgets_a_value(case: Case, out: Tensor) -> None:
    keep = out[-1, -1, -1].clone()
    exact(case, out)
    out[-1, -1, -1] = keep


def garbage_for_empty(case: Case, out: Tensor) -> None:
    exact(case, out)
    out[case.seq_lens == 0] = 0.5


def infinite(case: Case, out: Tensor) -> None:
    exact(case, out)
    out[-1, 0, 0] = math.inf


def one_token_short(case: Case, out: Tensor) -> None:
    shorter = Case(
        case.query, case.kv_cache, case.block_table, (case.seq_lens - 1).clamp_min(0), case.scale, case.codec
    )
    out.copy_(shorter.expected())


def too_far(case: Case, out: Tensor) -> None:
    exact(case, out)
    out.as_strided((1,), (1,), out.storage_offset() + out.stride(0) * out.shape[0]).fill_(1)


def unsteady() -> Callable[[Case, Tensor], None]:
    calls = 0

    def run(case: Case, out: Tensor) -> None:
        nonlocal calls
        calls += 1
        exact(case, out)
        out[-1, -1, -1] *= 1 + calls * 2.0**-7

    return run


@pytest.mark.parametrize(
    ("run", "detail"),
    [
        (wrong_scale, "relative error"),
        (one_head_wrong, "relative error"),
        (forgets_a_value, "NaN"),
        (garbage_for_empty, "length 0"),
        (infinite, "relative error"),
        (one_token_short, "relative error|NaN"),
        (too_far, "outside its output"),
        (unsteady(), "two runs differ"),
    ],
)
def test_wrong_kernels_fail(run: Callable[[Case, Tensor], None], detail: str) -> None:
    result = check_decode(run, PROBLEM, level="tiny")
    assert not result.passed
    assert any(part in result.detail for part in detail.split("|")), result.detail
    assert "block size" in result.detail


@pytest.mark.parametrize("cache_format", ["turboquant_outlier", "turboquant_k8v4"])
def test_dequantised_rows_pass(cache_format: str) -> None:
    result = check_dequant(rows, Problem("dequant", 64, 1, cache_format), level="quick")
    assert result.passed, result.detail


def scaled(case: Case, key: Tensor, value: Tensor) -> None:
    rows(case, key, value)
    value *= 1.02


def past_the_end(case: Case, key: Tensor, value: Tensor) -> None:
    rows(case, key, value)
    key[-1] = 0


def outlier_off(case: Case, key: Tensor, value: Tensor) -> None:
    rows(case, key, value)
    assert case.codec.channels is not None
    key[..., int(case.codec.channels[-1])] *= 1 + 2.0**-7


@pytest.mark.parametrize(
    ("run", "detail"), [(scaled, "values:"), (past_the_end, "past the request"), (outlier_off, "not exact")]
)
def test_wrong_rows_fail(run: Callable[[Case, Tensor, Tensor], None], detail: str) -> None:
    result = check_dequant(run, DEQUANT, level="tiny")
    assert not result.passed
    assert detail in result.detail


@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_outlier"])
def test_emulated_default_kernel_passes(cache_format: str) -> None:
    problem = Problem("decode", 64, 4, cache_format)
    config = default_config(problem)

    def run(case: Case, out: Tensor) -> None:
        out.copy_(emulate_decode(config, case, splits=2))

    result = check_decode(run, problem, level="tiny")
    assert result.passed, result.detail
