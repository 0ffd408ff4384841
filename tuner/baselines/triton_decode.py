"""Split-KV decode attention in Triton, with the structure that vLLM ships and its constants open.

One program per (request, query head, split); each walks its tokens in steps of BLOCK_KV with an online softmax and
writes a normalised fp32 partial result and its log-sum-exp; a second kernel merges the splits. The query is
rotated outside, by a GEMM with the fp32 Hadamard matrix. ``block_h`` 16 is a variant of our own: one program serves
a group of query heads on tensor cores, so that each key and value is unpacked once per group.
"""

# Triton writes compile-time arguments in capitals and leaves the others without types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, index"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tuner.baselines.inputs import Constants, DecodeInputs, TritonConstants, constants_for
from tuner.baselines.support import hadamard_matrix, no_triton_here
from tuner.baselines.unpack import field_at, fp8_at, half_at, packed_at
from tuner.space.core import Problem

MERGE_WARPS = 4
MERGE_STAGES = 2


@triton.jit
def decode_stage1(
    query,  # [B, Hq, D], rotated fp32 where keys are coded by a codebook, else as given
    kv_cache,  # uint8, by byte
    block_table,
    seq_lens,
    centroids,
    partials,  # fp32 [B, Hq, SPLITS, D + 1]: normalised output, then log-sum-exp
    scale,
    query_batch_stride,
    query_head_stride,
    block_stride,  # bytes
    token_stride,
    head_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    NORM_CORRECTION: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (B, Hq, SPLITS), or (B, Hq / GROUP, SPLITS) with BLOCK_H > 1."""
    request = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    if BLOCK_H == 1:
        head = tl.program_id(1)
        kv_head = head // GROUP
    else:
        kv_head = tl.program_id(1)
        member = tl.arange(0, BLOCK_H)
        head = kv_head * GROUP + member
    length = tl.load(seq_lens + request)
    share = tl.cdiv(length, SPLITS)
    start = share * split
    end = tl.minimum(start + share, length)
    if start >= end:
        return

    d = tl.arange(0, HEAD_DIM)
    if BLOCK_H == 1:
        q = tl.load(query + request * query_batch_stride + head * query_head_stride + d).to(tl.float32)
        highest = -float("inf")
        total = 0.0
        acc = tl.zeros([HEAD_DIM], dtype=tl.float32)
    else:
        q_rows = query + request * query_batch_stride + head[:, None] * query_head_stride + d[None, :]
        q = tl.load(q_rows, mask=member[:, None] < GROUP, other=0.0).to(tl.float16)
        highest = tl.full([BLOCK_H], -float("inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        acc = tl.zeros([BLOCK_H, HEAD_DIM], dtype=tl.float32)

    for first in range(start, end, BLOCK_KV):
        token = first + tl.arange(0, BLOCK_KV)
        live = token < end
        block = tl.load(block_table + request * table_stride + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        in_block = (token % BLOCK_SIZE).to(tl.int64)
        slot = kv_cache + block * block_stride + in_block * token_stride + kv_head.to(tl.int64) * head_stride
        rows = live[:, None]

        if KEY_BITS == 8:
            key = fp8_at(slot[:, None] + d[None, :], rows)
        else:
            key = tl.load(centroids + field_at(slot[:, None], d[None, :], rows, KEY_BITS), mask=rows, other=0.0)
        if NORM_CORRECTION:
            key = key * (1.0 / tl.sqrt(tl.sum(key * key, axis=1) + 1e-16))[:, None]
        if NORM_OFFSET >= 0:
            key_scale = half_at(slot + NORM_OFFSET, live) * scale
        else:
            key_scale = tl.full([BLOCK_KV], 1.0, dtype=tl.float32) * scale

        value_slot = slot + VALUE_OFFSET
        step = half_at(value_slot + SCALE_OFFSET, live)
        zero = half_at(value_slot + SCALE_OFFSET + 2, live)
        level = packed_at(value_slot[:, None], d[None, :], rows, VALUE_BITS).to(tl.float32)
        value = level * step[:, None] + zero[:, None]

        if BLOCK_H == 1:
            score = tl.sum(q[None, :] * key, axis=1) * key_scale
            score = tl.where(live, score, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(score, axis=0))
            weight = tl.exp(score - new_highest)
            decay = tl.exp(highest - new_highest)
            acc = acc * decay + tl.sum(weight[:, None] * value, axis=0)
            total = total * decay + tl.sum(weight, axis=0)
        else:
            score = tl.dot(q, tl.trans(key.to(tl.float16))) * key_scale[None, :]
            score = tl.where(live[None, :], score, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(score, axis=1))
            weight = tl.exp(score - new_highest[:, None])
            decay = tl.exp(highest - new_highest)
            acc = acc * decay[:, None] + tl.dot(weight.to(tl.float16), value.to(tl.float16))
            total = total * decay + tl.sum(weight, axis=1)
        highest = new_highest

    width = HEAD_DIM + 1
    group_size = GROUP if BLOCK_H > 1 else 1
    row = ((request * tl.num_programs(1) * group_size + head) * SPLITS + split) * width
    if BLOCK_H == 1:
        tl.store(partials + row + d, acc / total)
        tl.store(partials + row + HEAD_DIM, highest + tl.log(total))
    else:
        ours = member < GROUP
        tl.store(partials + row[:, None] + d[None, :], acc / total[:, None], mask=ours[:, None])
        tl.store(partials + row + HEAD_DIM, highest + tl.log(total), mask=ours)


@triton.jit
def decode_merge(
    partials,
    out,
    seq_lens,
    out_batch_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (B, Hq): the splits that hold tokens, weighted by their log-sum-exp. Length 0 gives zeros."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(seq_lens + request)
    share = tl.cdiv(length, SPLITS)
    d = tl.arange(0, HEAD_DIM)
    rows = partials + (request * tl.num_programs(1) + head) * SPLITS * (HEAD_DIM + 1)
    highest = -float("inf")
    total = 0.0
    acc = tl.zeros([HEAD_DIM], dtype=tl.float32)
    for split in range(SPLITS):
        if share * split < length:
            row = rows + split * (HEAD_DIM + 1)
            lse = tl.load(row + HEAD_DIM)
            new_highest = tl.maximum(highest, lse)
            decay = tl.exp(highest - new_highest)
            weight = tl.exp(lse - new_highest)
            acc = acc * decay + weight * tl.load(row + d)
            total = total * decay + weight
            highest = new_highest
    result = tl.where(total > 0.0, acc / tl.where(total > 0.0, total, 1.0), 0.0)
    tl.store(out + request * out_batch_stride + head * out_head_stride + d, result.to(out.dtype.element_ty))


def stage1_constexprs(problem: Problem, constants: TritonConstants, block_size: int) -> dict[str, int]:
    """Compile-time arguments of decode_stage1; -1 marks a field that the format has not."""
    layout = problem.layout
    key, value = layout.key, layout.value
    assert value.scale_offset is not None
    return {
        "GROUP": problem.gqa,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_SIZE": block_size,
        "SPLITS": constants.splits,
        "KEY_BITS": key.bits,
        "NORM_OFFSET": -1 if key.norm_offset is None else key.norm_offset,
        "VALUE_OFFSET": layout.value_offset,
        "VALUE_BITS": value.bits,
        "SCALE_OFFSET": value.scale_offset,
        "NORM_CORRECTION": int(layout.format.norm_correction),
        "BLOCK_KV": constants.block_kv,
        "BLOCK_H": constants.block_h,
    }


def merge_constexprs(problem: Problem, constants: TritonConstants) -> dict[str, int]:
    return {"HEAD_DIM": problem.head_dim, "SPLITS": constants.splits}


def unavailable(name: str, device: Any, problem: Problem) -> str | None:
    """Why the kernel cannot run on ``device`` for ``problem``, or None."""
    if problem.layout.format.separate_planes:
        return f"{problem.cache_format} has no fused Triton kernel: it is dequantised before attention"
    return no_triton_here(device)


def prepare(name: str, inputs: DecodeInputs, constants: Constants | None = None) -> Any:
    """A call that runs rotation, stage 1 and merge into buffers made here, and returns out [B, Hq, D]."""
    problem = inputs.problem("decode")
    chosen: TritonConstants = constants_for("decode", constants, problem)
    query, cache, table = inputs.query, inputs.kv_cache, inputs.block_table
    batch, q_heads, head_dim = query.shape
    device = query.device
    rotates = inputs.layout.format.rotates_query
    matrix = hadamard_matrix(head_dim, device) if rotates else None
    wide = torch.empty(query.shape, dtype=torch.float32, device=device)
    rotated = torch.empty_like(wide) if rotates else query
    partials = torch.empty(batch, q_heads, chosen.splits, head_dim + 1, dtype=torch.float32, device=device)
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    heads = q_heads if chosen.block_h == 1 else inputs.kv_heads
    stage1 = stage1_constexprs(problem, chosen, inputs.block_size)
    merge = merge_constexprs(problem, chosen)

    def run() -> torch.Tensor:
        if matrix is not None:
            wide.copy_(query)
            torch.matmul(wide, matrix, out=rotated)
        decode_stage1[(batch, heads, chosen.splits)](
            rotated,
            cache,
            table,
            inputs.seq_lens,
            inputs.codec.centroids,
            partials,
            inputs.scale,
            rotated.stride(0),
            rotated.stride(1),
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            table.stride(0),
            **stage1,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,  # Triton's default until 3.9, and what vLLM is timed with
        )
        decode_merge[(batch, q_heads)](
            partials,
            out,
            inputs.seq_lens,
            out.stride(0),
            out.stride(1),
            **merge,
            num_warps=MERGE_WARPS,
            num_stages=MERGE_STAGES,
            enable_fp_fusion=True,
        )
        return out

    return run
