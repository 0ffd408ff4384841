"""Attention over an uncompressed cache: what compression must beat. bf16 through torch, and vLLM's FlashAttention-3
or FlashInfer where they are at hand; FlashAttention-3 also with an fp8 cache.

All read the same tokens as the compressed cache holds. The paged ones use the compressed cache's own shuffled pages,
cut to blocks of 16 tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tuner.baselines.inputs import Constants, DecodeInputs
from tuner.baselines.support import no_cuda, package_folder
from tuner.errors import TunerError
from tuner.space.core import Problem

FA3_VARIABLE = "WPH_FA3_LIBRARY"
PAGE_TOKENS = 16
FP8_MAX = 448.0
_FP8_ROWS = 1 << 14  # pages converted at a time: bounds the temporary copy
_FLASHINFER_WORKSPACE_BYTES = 256 << 20


def unavailable(name: str, device: Any, problem: Problem) -> str | None:
    """Why peer ``name`` cannot run on ``device`` at this head dim, or None."""
    if name == "sdpa_bf16":
        return None
    if name == "flashinfer_bf16" and package_folder("flashinfer") is None:
        return "flashinfer is not installed"
    if problem.head_dim > 256:
        return f"no kernel for head dim {problem.head_dim}: at most 256"
    if name.startswith("fa3") and fa3_library() is None:
        return f"no FlashAttention-3: install vLLM, or set {FA3_VARIABLE} to its _vllm_fa3_C.abi3.so"
    reason = no_cuda(device)
    if reason is None and name.startswith("fa3") and torch.cuda.get_device_capability(device)[0] != 9:
        return "FlashAttention-3 runs on sm_90 only"
    return reason


def prepare(name: str, inputs: DecodeInputs, constants: Constants | None = None) -> Any:
    """A call of peer ``name`` that returns out [B, Hq, D]; builds its uncompressed cache first."""
    reason = unavailable(name, inputs.query.device, inputs.problem("decode"))
    if reason:
        raise TunerError(f"baseline {name} is not available: {reason}")
    if name == "sdpa_bf16":
        return _sdpa(inputs)
    if name == "flashinfer_bf16":
        return _flashinfer(inputs)
    return _fa3(inputs, fp8=name == "fa3_fp8")


def fa3_library() -> Path | None:
    """vLLM's FlashAttention-3 library: ``WPH_FA3_LIBRARY``, else the installed vLLM's; None without either."""
    path = os.environ.get(FA3_VARIABLE)
    if path:
        return Path(path) if Path(path).is_file() else None
    vllm = package_folder("vllm")
    library = vllm / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so" if vllm else None
    return library if library and library.is_file() else None


def _dense(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, bf16 [blocks, block_size, Hk, D], paged like the compressed cache."""
    if inputs.dense is not None:
        return inputs.dense()
    from tuner.baselines import triton_dequant

    key, value = triton_dequant.prepare("triton_dequant", inputs, by_block_id=True)()
    return key, value


def _live_table(inputs: DecodeInputs) -> torch.Tensor:
    """Block table int64 with 0 in place of the entries that no token needs (they may hold anything)."""
    columns = torch.arange(inputs.block_table.shape[1], device=inputs.block_table.device)
    used = columns[None, :] * inputs.block_size < inputs.seq_lens[:, None]
    return torch.where(used, inputs.block_table.long(), 0)


def _sdpa(inputs: DecodeInputs) -> Any:
    """torch's scaled_dot_product_attention, cache [B, Hk, S, D]; requests of different lengths need its mask."""
    longest = max(1, int(inputs.seq_lens.max()))
    table = _live_table(inputs)[:, : -(-longest // inputs.block_size)]
    key, value = (x[table].flatten(1, 2)[:, :longest].transpose(1, 2).contiguous() for x in _dense(inputs))
    ragged = bool((inputs.seq_lens != longest).any())
    mask = None
    if ragged:
        mask = (torch.arange(longest, device=table.device) < inputs.seq_lens[:, None])[:, None, None, :]
    query = inputs.query.to(torch.bfloat16)[:, :, None, :]
    groups = inputs.gqa > 1

    def run() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=inputs.scale, enable_gqa=groups
        )
        return out[:, :, 0]

    return run


def _pages(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, V bf16 [pages, 16, Hk, D] and their table int32 [B, max_pages]."""
    key, value = _dense(inputs)
    parts = inputs.block_size // PAGE_TOKENS
    table = _live_table(inputs)[:, :, None] * parts + torch.arange(parts, device=inputs.block_table.device)
    shape = (-1, PAGE_TOKENS, inputs.kv_heads, inputs.layout.head_dim)
    return key.reshape(shape), value.reshape(shape), table.flatten(1).to(torch.int32).contiguous()


def _fa3(inputs: DecodeInputs, *, fp8: bool) -> Any:
    """FlashAttention-3 for one query token per request, called as vLLM does: metadata and fp8 query made before."""
    torch.ops.load_library(str(fa3_library()))
    ops = torch.ops._vllm_fa3_C
    key, value, table = _pages(inputs)
    batch, q_heads, head_dim = inputs.query.shape
    kv_heads, device = inputs.kv_heads, inputs.query.device
    query = inputs.query.to(torch.bfloat16).contiguous()
    out = torch.empty_like(query)
    descales: list[torch.Tensor | None] = [None, None, None]
    if fp8:
        grouped = query.view(batch, kv_heads, -1)
        coded, query_scale = _to_fp8(grouped, dims=(0, 2))
        query = coded.view(batch, q_heads, head_dim)
        key, key_scale = _to_fp8(key, dims=(0, 1, 3))
        value, value_scale = _to_fp8(value, dims=(0, 1, 3))
        descales = [s.expand(batch, kv_heads) for s in (query_scale, key_scale, value_scale)]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    longest = max(1, int(inputs.seq_lens.max()))
    metadata = ops.get_scheduler_metadata(
        batch, 1, longest, q_heads, kv_heads, head_dim, head_dim, query.dtype, inputs.seq_lens, starts,
        None, None, None, None, PAGE_TOKENS, 0, True, -1, -1, False, 0, None, 0,
    )  # fmt: skip

    def run() -> torch.Tensor:
        ops.fwd(
            query, key, value,
            None, None, None,  # new keys and values, value-side query
            out,
            starts, None, None, None, inputs.seq_lens,  # cumulative lengths of q, k, new k; used q, used k
            1, longest, table,
            None, None, None, None, None,  # batch index, left padding, rotary tables
            *descales,
            inputs.scale, True, -1, -1, 0.0, True,  # causal, no window, no soft cap, rotary layout
            metadata, 0, None, 0,  # splits chosen by the kernel, packing likewise, no SMs kept back
            None, 1, 0, None,  # no sinks, no context parallelism
        )  # fmt: skip
        return out

    return run


def _to_fp8(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 of ``x`` scaled per KV head, and the fp32 factors [Hk] that undo it."""
    peak = torch.maximum(x.amax(dims), -x.amin(dims)).float().clamp(min=1e-12)
    factor = peak / FP8_MAX
    divisor = factor.view([1 if i in dims else -1 for i in range(x.dim())]).to(x.dtype)
    coded = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    for target, part in zip(coded.split(_FP8_ROWS), x.split(_FP8_ROWS), strict=True):
        target.copy_((part / divisor).clamp(-FP8_MAX, FP8_MAX))
    return coded, factor


def _flashinfer(inputs: DecodeInputs) -> Any:
    """FlashInfer's paged batch decode, planned here for the lengths at hand; tensor cores where heads are shared."""
    import flashinfer

    key, value, table = _pages(inputs)
    lengths = inputs.seq_lens.long()
    counts = -(-lengths // PAGE_TOKENS)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=table.device)
    starts[1:] = counts.cumsum(0)
    ids = torch.cat([row[:n] for row, n in zip(table, counts.tolist(), strict=True)])
    last = torch.where(lengths > 0, (lengths - 1) % PAGE_TOKENS + 1, 0).to(torch.int32)
    workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=table.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=inputs.gqa > 1)
    wrapper.plan(
        starts, ids, last, inputs.query.shape[1], inputs.kv_heads, inputs.layout.head_dim, PAGE_TOKENS,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, sm_scale=inputs.scale,
    )  # fmt: skip
    query = inputs.query.to(torch.bfloat16).contiguous()
    out = torch.empty_like(query)
    return lambda: wrapper.run(query, (key, value), out=out)
