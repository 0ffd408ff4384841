"""The gate passes what is right and catches each way of being wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import emulate_decode
from torch import Tensor

from tuner.check import Level, _cases, check_decode, check_dequant, decode_errors
from tuner.launch import cache_order
from tuner.measure.peer import vllm_errors
from tuner.reference import Case, dequantize
from tuner.space import Problem, default_config
from tuner.space.decode_landmarks import lead_configs
from tuner.suits import reads_head_major, refusal

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


@pytest.mark.parametrize(("head_dim", "gqa", "kv_heads"), [(128, 1, 16), (256, 8, 2), (128, 4, 8)])
@pytest.mark.parametrize("level", ["tiny", "quick", "full"])
def test_what_tends_to_win_can_read_every_case(level: Level, head_dim: int, gqa: int, kv_heads: int) -> None:
    problem = Problem("decode", head_dim, gqa, "turboquant_4bit_nc")
    leads = lead_configs(problem, kv_heads)
    assert any(c["load"].startswith("bulk") for c in leads)
    for token_major in (False, True):
        cases = _cases(problem, "cpu", level, kv_heads, token_major)
        for config in leads:
            if reads_head_major(config) or token_major:
                assert not any(refusal(config, cache_order(case.kv_cache)) for case in cases), config.describe()


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


def scaled_by(factor: float) -> Callable[[Case, Tensor], None]:
    def run(case: Case, out: Tensor) -> None:
        out.copy_(case.expected() * factor)

    return run


def test_a_kernel_may_not_be_worse_than_vllms_own() -> None:
    """Within the tolerance is not enough where vLLM's is only off by rounding its output."""
    peer = decode_errors(exact, PROBLEM, level="tiny")
    assert len(peer) == 2 and 1e-3 < peer[0] < 3e-3 and math.isnan(peer[1])  # the second is fp16
    worse = scaled_by(1.0015)
    assert check_decode(worse, PROBLEM, level="tiny").passed
    result = check_decode(worse, PROBLEM, level="tiny", peer_errors=peer)
    assert not result.passed and "x that of vLLM's own kernel" in result.detail and "bfloat16" in result.detail
    same = check_decode(exact, PROBLEM, level="tiny", peer_errors=peer)
    assert same.passed and same.detail.endswith("at most 1.00 x vLLM's at bfloat16")


def test_what_vllm_cannot_do_sets_no_bar() -> None:
    """vLLM's kernel writes NaN for requests of length 0; a case it fails as a whole says nothing."""

    def no_zeros(case: Case, out: Tensor) -> None:
        exact(case, out)
        out[case.seq_lens == 0] = math.nan

    errors, expected = (decode_errors(run, PROBLEM, level="tiny") for run in (no_zeros, exact))
    assert errors[0] == expected[0]
    assert check_decode(scaled_by(1.0015), PROBLEM, level="tiny", peer_errors=(math.nan, math.nan)).passed


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


def test_without_vllm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WPH_VLLM_SOURCE", raising=False)
    for level in ("quick", "full"):
        assert vllm_errors(Problem("decode", 64, 4, "turboquant_seed"), "cpu", level, 2) == ()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", "this vLLM has no vllm.v1.attention.ops.triton_turboquant_decode"),
        ("def triton_turboquant_decode_attention(rows): ...", "TypeError: "),
        ("def triton_turboquant_decode_attention(**kwargs): raise NotImplementedError('no pages')", "no pages"),
    ],
)
def test_another_vllm_than_we_know_sets_no_bar_and_says_so(tmp_path: Path, code: str, reason: str) -> None:
    ops = tmp_path / "vllm/v1/attention/ops"
    ops.mkdir(parents=True)
    (ops / "triton_decode_attention.py").write_text("")
    (ops / "triton_turboquant_decode.py").write_text(code)
    program = (
        "from tuner.measure.peer import vllm_errors; from tuner.space import Problem; "
        "assert vllm_errors(Problem('decode', 64, 4, 'turboquant_4bit_nc'), 'cpu', 'full', 2) == ()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "WPH_VLLM_SOURCE": str(tmp_path), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("vLLM's own kernel sets no bar: ") and reason in done.stderr
