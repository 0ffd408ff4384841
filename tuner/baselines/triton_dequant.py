"""Gather-free dequantisation in Triton: paged slots to bf16 rows, straight from the cache.

As in the seed, one program takes a (request, token) and a KV head and returns at once where the token lies beyond
its request's length; ``rows`` tokens per program are open. Keys and values are two launches of one kernel. The
inverse Walsh-Hadamard transform is a butterfly over reshaped registers: each step adds and subtracts neighbours and
moves their index bit to the top, so that log2(BLOCK_D) steps restore the natural order.
"""

# Triton writes compile-time arguments in capitals and leaves the others without types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tuner.baselines.inputs import Constants, DecodeInputs, DequantConstants, constants_for
from tuner.baselines.support import no_triton_here
from tuner.baselines.unpack import bfloat_at, fp8_at, half_at, packed_at
from tuner.space.core import Problem


@triton.jit
def walsh_hadamard(x, ROWS: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr):
    """x [ROWS, N] times Sylvester's matrix (entries +-1) along the last axis; STEPS = log2(N)."""
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(x, [ROWS, N // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [ROWS, N])
    return x


@triton.jit
def dequantize_rows(
    slots,  # uint8, first byte of the plane or of the first value
    block_table,
    seq_lens,
    centroids,
    signs,  # fp32 [normal], or any pointer without SIGNED
    channels,  # int32 [D], or any pointer without OUTLIERS
    out,  # bf16
    block_stride,  # bytes
    token_stride,
    head_stride,
    table_stride,
    out_page_stride,  # elements, between requests or (BY_BLOCK_ID) blocks
    out_token_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    NORMAL: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIERS_PADDED: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    STORED: tl.constexpr,
    INDICES_OFFSET: tl.constexpr,
    NORM_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    NORM_CORRECTION: tl.constexpr,
    BY_BLOCK_ID: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (ceil(positions / ROWS), Hk, B). out row: (request, position) or, with BY_BLOCK_ID, (block, token)."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + request)
    if first >= length:
        return
    position = first + tl.arange(0, ROWS)
    live = position < length
    block = tl.load(block_table + request * table_stride + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    token = (position % BLOCK_SIZE).to(tl.int64)
    slot = slots + block * block_stride + token * token_stride + head * head_stride
    if BY_BLOCK_ID:
        target = out + block * out_page_stride + token * out_token_stride + head * out_head_stride
    else:
        target = out + request * out_page_stride + position.to(tl.int64) * out_token_stride + head * out_head_stride

    d = tl.arange(0, BLOCK_D)[None, :]
    rows = live[:, None]
    if CODEBOOK:
        stored = rows & (d < STORED)
        index = packed_at(slot[:, None] + INDICES_OFFSET, d, stored, BITS)
        x = tl.load(centroids + index, mask=stored, other=0.0)
        factor = half_at(slot + NORM_OFFSET, live) * (1.0 / tl.sqrt(BLOCK_D * 1.0))
        if NORM_CORRECTION:
            factor = factor / tl.sqrt(tl.sum(x * x, axis=1) + 1e-16)
        x = walsh_hadamard(x, ROWS, BLOCK_D, STEPS) * factor[:, None]
    elif BITS == 8:
        x = fp8_at(slot[:, None] + d, rows)
    else:
        step = half_at(slot + SCALE_OFFSET, live)
        zero = half_at(slot + SCALE_OFFSET + 2, live)
        x = packed_at(slot[:, None], d, rows, BITS).to(tl.float32) * step[:, None] + zero[:, None]

    normal = d < NORMAL
    if SIGNED:
        x = x * tl.load(signs + d, mask=normal, other=0.0)
    if OUTLIERS > 0:
        channel = tl.load(channels + d, mask=normal, other=0)
        o = tl.arange(0, OUTLIERS_PADDED)[None, :]
        kept = rows & (o < OUTLIERS)
        outlier = bfloat_at(slot[:, None] + 2 * o, kept)
        outlier_channel = tl.load(channels + NORMAL + o, mask=o < OUTLIERS, other=0)
        tl.store(target[:, None] + outlier_channel, outlier.to(tl.bfloat16), mask=kept)
    else:
        channel = d
    tl.store(target[:, None] + channel, x.to(tl.bfloat16), mask=rows & normal)


def constexprs(
    problem: Problem, constants: DequantConstants, block_size: int, *, values: bool, by_block_id: bool
) -> dict[str, int]:
    """Compile-time arguments of dequantize_rows for the keys or the values; 0 for fields that the format has not."""
    layout = problem.layout
    row = layout.value if values else layout.key
    codebook = layout.format.value_codebook if values else layout.format.key_codebook
    outliers = layout.outliers
    return {
        "HEAD_DIM": problem.head_dim,
        "BLOCK_D": layout.block_d,
        "STEPS": layout.block_d.bit_length() - 1,
        "NORMAL": layout.normal,
        "OUTLIERS": outliers,
        "OUTLIERS_PADDED": triton.next_power_of_2(max(1, outliers)),
        "SIGNED": int(layout.format.has_signs),
        "BLOCK_SIZE": block_size,
        "BITS": row.bits,
        "CODEBOOK": int(codebook),
        "STORED": row.coefficients,
        "INDICES_OFFSET": row.indices_offset,
        "NORM_OFFSET": row.norm_offset or 0,
        "SCALE_OFFSET": row.scale_offset or 0,
        "NORM_CORRECTION": int(layout.format.norm_correction and not values),
        "BY_BLOCK_ID": int(by_block_id),
        "ROWS": constants.rows,
    }


def unavailable(name: str, device: Any, problem: Problem) -> str | None:
    """Why the kernel cannot run on ``device``, or None. Every format and head dim is supported."""
    return no_triton_here(device)


def prepare(
    name: str, inputs: DecodeInputs, constants: Constants | None = None, *, by_block_id: bool = False
) -> Any:
    """A call that decodes all live tokens and returns (K, V), bf16.

    Shape [B, max_positions, Hk, D] with rows in order, where max_positions covers the block table; or, with
    ``by_block_id``, [blocks, block_size, Hk, D] paged like the cache. Rows beyond a request's length stay zero.
    """
    problem = inputs.problem("dequant")
    chosen: DequantConstants = constants_for("dequant", constants, problem)
    codec, table = inputs.codec, inputs.block_table
    batch, positions = table.shape[0], table.shape[1] * inputs.block_size
    pages = (inputs.kv_cache.shape[0], inputs.block_size) if by_block_id else (batch, positions)
    shape = (*pages, inputs.kv_heads, problem.head_dim)
    device = inputs.kv_cache.device
    launches = []
    for values, plane in enumerate(inputs.planes()):
        out = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        meta = constexprs(problem, chosen, inputs.block_size, values=bool(values), by_block_id=by_block_id)
        launches.append((plane, out, meta))
    grid = (triton.cdiv(positions, chosen.rows), inputs.kv_heads, batch)
    unused = codec.centroids

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        for plane, out, meta in launches:
            dequantize_rows[grid](
                plane,
                table,
                inputs.seq_lens,
                codec.centroids,
                unused if codec.signs is None else codec.signs,
                unused if codec.channels is None else codec.channels,
                out,
                plane.stride(0),
                plane.stride(1),
                plane.stride(2),
                table.stride(0),
                out.stride(0),
                out.stride(1),
                out.stride(2),
                **meta,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                enable_fp_fusion=True,
            )
        return launches[0][1], launches[1][1]

    return run
