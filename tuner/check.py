"""The correctness gate that a kernel passes before it is timed, and again after.

Outputs are poisoned with NaN and surrounded by more of it; inputs are random, from several seeds, with ragged lengths,
shuffled pages and loud channels; every call is made twice and must give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from tuner.reference import Case, dequantize, synthetic_cache
from tuner.space import Problem

Level = Literal["tiny", "quick", "full"]
"""tiny: a few dozen tokens, for the emulator; quick: before timing; full: every hazard, for tests and finalists."""

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
"""Largest relative error of a head's output, by output type."""

PEER_FACTOR = {torch.bfloat16: 1.1}
"""How many times the error of vLLM's own kernel a kernel may have, by output type.

Not for fp16: vLLM's products are in fp32 throughout and ours in halves, which shows where the output is rounded less.
"""

_ULP_BF16 = 2.0**-7
_ROW_ROUNDING = 2.0**-11
"""Of a row's length, per element: what rounding the operands of a rotation to halves can cost at most."""

_BF16, _FP16 = torch.bfloat16, torch.float16
_CASES: dict[Level, tuple[tuple[tuple[int, ...], dict[str, Any]], ...]] = {
    "tiny": (
        ((0, 1, 17), {"block_size": 16, "query_dtype": _BF16}),
        ((33, 15), {"query_dtype": _FP16, "index_dtype": torch.int64, "order": "head", "padding": 48}),
    ),
    "quick": (
        ((0, 1, 15, 16, 17, 700), {"block_size": 16, "query_dtype": _BF16}),
        ((333, 31, 0, 33), {"block_size": 32, "query_dtype": _FP16, "index_dtype": torch.int64}),
    ),
    "full": (
        ((0, 1, 15, 16, 17, 4097), {"block_size": 16, "query_dtype": _BF16}),
        ((333, 31, 0, 33), {"block_size": 32, "query_dtype": _FP16, "index_dtype": torch.int64}),
        ((63, 64, 65, 1000), {"block_size": 64, "query_dtype": _FP16, "order": "head", "padding": 4096}),
        ((127, 129, 2, 513), {"block_size": 128, "query_dtype": _BF16, "padding": 64}),
        ((900, 450), {"block_size": 16, "query_dtype": _BF16, "peak": 8.0}),
        ((9000,), {"block_size": 16, "query_dtype": _BF16}),
    ),
}


@dataclass(frozen=True)
class CheckResult:
    """``worst_error`` is the largest relative error seen; ``detail`` one line: what was checked, or what failed."""

    passed: bool
    worst_error: float
    detail: str


def check_decode(
    run: Callable[[Case, Tensor], None],
    problem: Problem,
    *,
    device: torch.device | str = "cpu",
    level: Level = "quick",
    kv_heads: int = 2,
    peer_errors: Sequence[float] = (),
    token_major: bool = False,
) -> CheckResult:
    """Runs ``run(case, out)``, which must fill ``out`` [B, Hq, D], on the gate's cases and compares with float64.

    ``out`` has strides of its own. Requests of length 0 must give zeros. Exceptions of ``run`` pass through.
    ``peer_errors``: of vLLM's own kernel on the same cases (``decode_errors``); () where it is not at hand.
    ``token_major``: heads lie within tokens in every case, for kernels that read no other order.
    """
    worst = 0.0
    ratios: dict[torch.dtype, float] = {}
    cases = _decode_cases(problem, str(device), level, kv_heads, token_major)
    for number, (case, expected) in enumerate(cases):
        first, intact = _run_decode(run, case)
        again, _ = _run_decode(run, case)
        error, fault = _decode_error(first, expected, case.seq_lens)
        worst = max(worst, error)
        fault = fault or (None if intact else "writes outside its output")
        fault = fault or (None if _same_bits(first, again) else "two runs differ")
        tolerance = TOLERANCE[case.query.dtype]
        if fault is None and not error <= tolerance:
            fault = f"relative error {error:.2e} exceeds {tolerance:.0e}"
        if peer_errors and peer_errors[number] > 0:
            dtype, ratio = case.query.dtype, error / peer_errors[number]
            ratios[dtype] = max(ratios.get(dtype, 0.0), ratio)
            if fault is None and ratio > PEER_FACTOR[dtype]:
                fault = f"relative error {error:.2e} is {ratio:.2f} x that of vLLM's own kernel"
        if fault:
            _decode_cases.cache_clear()  # a kernel that goes wrong may have damaged the inputs
            return CheckResult(False, worst, f"{fault} ({_describe(case)})")
    against = [f", at most {r:.2f} x vLLM's at {_type_name(t)}" for t, r in ratios.items()]
    return CheckResult(True, worst, f"{len(cases)} cases, worst relative error {worst:.2e}{''.join(against)}")


def decode_errors(
    run: Callable[[Case, Tensor], None],
    problem: Problem,
    *,
    device: torch.device | str = "cpu",
    level: Level = "quick",
    kv_heads: int = 2,
) -> tuple[float, ...]:
    """The largest relative error of a head in each of the gate's cases, requests of length 0 aside.

    It may be NaN, and is so in cases whose output type has no factor in PEER_FACTOR: those are not run.
    """
    errors = []
    for case, expected in _decode_cases(problem, str(device), level, kv_heads):
        if case.query.dtype not in PEER_FACTOR:
            errors.append(math.nan)
            continue
        out = torch.full_like(case.query, math.nan)
        run(case, out)
        live = case.seq_lens.to(out.device) > 0
        errors.append(_head_error(out[live], expected[live]))
    return tuple(errors)


def check_dequant(
    run: Callable[[Case, Tensor, Tensor], None],
    problem: Problem,
    *,
    device: torch.device | str = "cpu",
    level: Level = "quick",
    kv_heads: int = 2,
) -> CheckResult:
    """Likewise for ``run(case, key_out, value_out)``, bf16 [B * max_blocks, block_size, Hk, D].

    Blocks past a request's length must stay untouched. FP8 keys and outlier channels must be exact; all else may be
    one bf16 step off, or what fp32 sums lose in a row that cancels. The error is in multiples of what is allowed.
    """
    worst = 0.0
    cases = _dequant_cases(problem, str(device), level, kv_heads)
    for case, expected in cases:
        first = _run_dequant(run, case)
        again = _run_dequant(run, case)
        for name, got, twin, rows in zip(("keys", "values"), first, again, expected, strict=True):
            error, fault = _dequant_error(got, rows, case, exact=name == "keys" and not _rotates(problem))
            worst = max(worst, error)
            fault = fault or (None if _same_bits(got, twin) else "two runs differ")
            if fault:
                _dequant_cases.cache_clear()
                return CheckResult(False, worst, f"{name}: {fault} ({_describe(case)})")
    return CheckResult(True, worst, f"{len(cases)} cases, worst error {worst:.2f} of what is allowed")


def _rotates(problem: Problem) -> bool:
    return problem.layout.format.key_codebook


def _cases(
    problem: Problem, device: str, level: Level, kv_heads: int, token_major: bool = False
) -> tuple[Case, ...]:
    changes = {"order": "token"} if token_major else {}
    return tuple(
        synthetic_cache(
            problem.layout,
            lengths,
            q_heads=problem.gqa * kv_heads,
            kv_heads=kv_heads,
            seed=seed,
            device=device,
            **options | changes,
        )
        for seed, (lengths, options) in enumerate(_CASES[level])
    )


@lru_cache(maxsize=8)
def _decode_cases(
    problem: Problem, device: str, level: Level, kv_heads: int, token_major: bool = False
) -> tuple[tuple[Case, Tensor], ...]:
    return tuple((case, case.expected()) for case in _cases(problem, device, level, kv_heads, token_major))


@lru_cache(maxsize=8)
def _dequant_cases(
    problem: Problem, device: str, level: Level, kv_heads: int
) -> tuple[tuple[Case, tuple[Tensor, Tensor]], ...]:
    return tuple((c, dequantize(c.kv_cache, c.codec)) for c in _cases(problem, device, level, kv_heads))


def _run_decode(run: Callable[[Case, Tensor], None], case: Case) -> tuple[Tensor, bool]:
    """The output, and whether the poison around it survived."""
    batch, heads, dim = case.query.shape
    around = torch.full((batch + 2, heads + 1, dim), math.nan, dtype=case.query.dtype, device=case.query.device)
    out = around[1:-1, :heads]
    run(case, out)
    result = out.clone()
    out.fill_(math.nan)
    return result, bool(around.isnan().all())


def _decode_error(got: Tensor, expected: Tensor, seq_lens: Tensor) -> tuple[float, str | None]:
    """Largest relative error of a head, and what is wrong beyond that."""
    if got.isnan().any():
        return math.nan, "NaN in the output, or part of it not written"
    empty = (seq_lens == 0).to(got.device)
    if bool((got[empty] != 0).any()):
        return math.inf, "a request of length 0 is not zero"
    if bool(empty.all()):
        return 0.0, None
    return _head_error(got[~empty], expected[~empty]), None


def _head_error(got: Tensor, expected: Tensor) -> float:
    return float(((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _run_dequant(run: Callable[[Case, Tensor, Tensor], None], case: Case) -> tuple[Tensor, Tensor]:
    blocks = case.block_table.numel()
    shape = (blocks, case.block_size, case.kv_heads, case.layout.head_dim)
    key, value = (torch.full(shape, math.nan, dtype=torch.bfloat16, device=case.query.device) for _ in range(2))
    run(case, key, value)
    return key, value


def _dequant_error(got: Tensor, rows: Tensor, case: Case, *, exact: bool) -> tuple[float, str | None]:
    """Largest deviation over what is allowed. ``rows`` float64 [blocks, block_size, Hk, D]: the whole cache."""
    worst = 0.0
    by_request = got.unflatten(0, tuple(case.block_table.shape))
    for b, length in enumerate(case.seq_lens.tolist()):
        used = -(-length // case.block_size)
        if not bool(by_request[b, used:].isnan().all()):
            return math.inf, "blocks past the request's length were written"
        if not length:
            continue
        want = rows[case.block_table[b, :used].long()].flatten(0, 1)[:length]
        have = by_request[b, :used].flatten(0, 1)[:length]
        if have.isnan().any():
            return math.nan, "NaN in the output, or part of it not written"
        rounded = want.bfloat16()
        allowed = want.abs() * _ULP_BF16 + want.norm(dim=-1, keepdim=True) * _ROW_ROUNDING
        if exact:
            must_equal = torch.ones(want.shape[-1], dtype=torch.bool, device=want.device)
        else:
            must_equal = _outlier_mask(case, want.device)
        if not torch.equal(have[..., must_equal], rounded[..., must_equal]):
            return math.inf, "values that the format fixes are not exact"
        deviation = (have.double() - rounded.double()).abs() / allowed.clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, float(deviation.max()))
        if worst > 1:
            return worst, f"deviation {worst:.2f} of what is allowed"
    return worst, None


def _outlier_mask(case: Case, device: torch.device) -> Tensor:
    mask = torch.zeros(case.layout.head_dim, dtype=torch.bool, device=device)
    if case.codec.channels is not None:
        mask[case.codec.channels[case.layout.normal :].long()] = True
    return mask


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def _describe(case: Case) -> str:
    lengths = ",".join(map(str, case.seq_lens.tolist()))
    dtype = _type_name(case.query.dtype)
    return f"lengths {lengths}, block size {case.block_size}, {case.kv_heads} KV heads, {dtype}"


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
