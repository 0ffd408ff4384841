"""Runs the Triton baselines under Triton's interpreter and prints one JSON line per case: id -> worst errors.

A program of its own, because TRITON_INTERPRET must be set before triton is imported: test_baselines.py starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tuner.baselines import DecodeInputs, DequantConstants, StoreInputs, TritonConstants, prepare
from tuner.baselines.triton_dequant import prepare as prepare_dequant
from tuner.check_store import store_case
from tuner.formats import FORMATS, HEAD_DIMS, VLLM_PRESETS, slot_layout
from tuner.reference import Case, dequantize, store, synthetic_cache
from tuner.space import Problem

LENGTHS = (0, 1, 17)
ONE_HEAD = {"q_heads": 1, "kv_heads": 1}
MANY_ROWS = DequantConstants(rows=16, num_warps=4, num_stages=1)
FEW = TritonConstants(block_kv=4, num_warps=1, num_stages=1, splits=8)
NARROW = TritonConstants(block_kv=16, num_warps=4, num_stages=2, splits=8)
GROUPED = TritonConstants(block_kv=16, num_warps=4, num_stages=2, splits=8, block_h=16)
DECODE = {
    **{f"decode {f} {d}": (f, d, ONE_HEAD, FEW) for f in VLLM_PRESETS for d in (64, 256, 512)},
    **{f"decode {f} as shipped": (f, 128, ONE_HEAD, None) for f in VLLM_PRESETS},
    **{
        f"decode group {g} {name}": (f, 64, {"q_heads": 2 * g, "kv_heads": 2}, constants)
        for g, f in ((5, "turboquant_4bit_nc"), (6, "turboquant_3bit_nc"), (7, "turboquant_k8v4"))
        for name, constants in (("alone", NARROW), ("grouped", GROUPED))
    },
    "decode group 16 grouped": ("turboquant_k3v4_nc", 256, {"q_heads": 16, "kv_heads": 1}, GROUPED),
    "decode head-major": (
        "turboquant_4bit_nc", 64, {"q_heads": 2, "kv_heads": 2, "order": "head", "padding": 48}, NARROW,
    ),
    "decode wide": (
        "turboquant_3bit_nc", 64, {"q_heads": 2, "kv_heads": 2, "block_size": 32, "index_dtype": torch.int64}, NARROW,
    ),
    "decode peaked": ("turboquant_4bit_nc", 128, {**ONE_HEAD, "peak": 100.0}, NARROW),
}  # fmt: skip
DEQUANT = {
    **{f"dequant {f} {d}": (f, d, {"kv_heads": 1}, MANY_ROWS, False) for f in FORMATS for d in HEAD_DIMS},
    "dequant as shipped": ("turboquant_seed", 128, {}, None, False),
    "dequant by block": ("turboquant_3bit_nc", 64, {"order": "head"}, DequantConstants(8, 4, 1), True),
    "dequant wide": (
        "turboquant_outlier", 64, {"order": "head", "padding": 16, "block_size": 32, "index_dtype": torch.int64},
        DequantConstants(4, 4, 1), False,
    ),
}  # fmt: skip
VLLM = {f"vllm {f}": (f, 64) for f in VLLM_PRESETS}
STORE = {f"store {f}": (f, 64) for f in VLLM_PRESETS}


def make_case(cache_format: str, head_dim: int, **shape: Any) -> Case:
    layout = slot_layout(cache_format, head_dim)
    return synthetic_cache(layout, LENGTHS, query_dtype=torch.float16, seed=3, **shape)


def decode_error(cache_format: str, head_dim: int, shape: dict[str, Any], constants: TritonConstants | None) -> Any:
    """Worst relative error of an output row; NaN anywhere makes it NaN, a non-zero empty request infinite."""
    case = make_case(cache_format, head_dim, **shape)
    out, expected = prepare("triton", DecodeInputs.of(case), constants)().double(), case.expected()
    if out[0].abs().max() > 0:
        return {"error": float("inf")}
    return {"error": float(((out - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30))[1:].max())}


def dequant_error(
    cache_format: str, head_dim: int, shape: dict[str, Any], constants: DequantConstants | None, by_block_id: bool
) -> Any:
    """Worst excess over one bf16 step (the interpreter truncates), relative to the row; writes beyond the lengths."""
    case = make_case(cache_format, head_dim, q_heads=2, **{"kv_heads": 2, **shape})
    inputs = DecodeInputs.of(case)
    outputs = prepare_dequant("triton_dequant", inputs, constants, by_block_id=by_block_id)()
    worst, written = 0.0, 0.0
    for out, truth in zip(outputs, dequantize(case.kv_cache, case.codec), strict=True):
        live = torch.zeros(out.shape[:2], dtype=torch.bool)
        for request, length in enumerate(LENGTHS):
            for position in range(length):
                block = int(case.block_table[request, position // case.block_size])
                token = position % case.block_size
                row = (block, token) if by_block_id else (request, position)
                live[row] = True
                expected = truth[block, token]
                excess = (out[row].double() - expected).abs() - expected.abs() * 2.0**-7
                worst = max(worst, float((excess / expected.norm(dim=-1, keepdim=True)).max()))
        written = max(written, float(out[~live].abs().max()))
    return {"error": worst, "written": written}


def vllm_error(cache_format: str, head_dim: int) -> Any:
    """Largest difference between vLLM's kernel and ours as shipped, on requests that are not empty."""
    inputs = DecodeInputs.of(make_case(cache_format, head_dim, q_heads=2, kv_heads=1))
    ours, theirs = (prepare(name, inputs)()[1:].double() for name in ("triton", "vllm_triton"))
    return {"error": float((ours - theirs).abs().max()), "size": float(theirs.abs().max())}


def store_error(cache_format: str, head_dim: int) -> Any:
    """Relative error of the slots that vLLM wrote against the reference's, both decoded; bytes written elsewhere."""
    case = store_case(Problem("store", head_dim, 1, cache_format), 6, kv_heads=2, dtype=torch.float16)
    key = case.key.clamp(-60, 60)
    if not case.codec.layout.format.key_codebook:
        key = key.float().to(torch.float8_e4m3fn).half()  # the interpreter truncates what a GPU rounds
    case = replace(case, key=key, value=case.value.clamp(-60, 60))
    ours, theirs = case.before.clone(), case.before.clone()
    store(ours, case.key, case.value, case.slot_mapping, case.codec)
    prepare("vllm_store", StoreInputs(case.key, case.value, theirs, case.slot_mapping, case.codec))()
    slots = case.slot_mapping[case.slot_mapping >= 0].long()
    live = torch.zeros(case.before.shape[:2], dtype=torch.bool)
    live[slots // case.before.shape[1], slots % case.before.shape[1]] = True
    error = max(
        float((a[live] - b[live]).norm() / b[live].norm())
        for a, b in zip(dequantize(theirs, case.codec), dequantize(ours, case.codec), strict=True)
    )
    return {"error": error, "written": float((theirs[~live] != ours[~live]).sum())}


def results(family: str) -> Iterator[tuple[str, Any]]:
    cases, measure = {
        "decode": (DECODE, decode_error),
        "dequant": (DEQUANT, dequant_error),
        "vllm": (VLLM, vllm_error),
        "store": (STORE, store_error),
    }[family]
    for name, arguments in cases.items():
        yield name, measure(*arguments)


if __name__ == "__main__":
    for name, result in results(sys.argv[1]):
        print(json.dumps([name, result]), flush=True)
