"""Runs vLLM's own TurboQuant kernels in Triton's interpreter and compares the reference with them.

Run as ``python oracle_child.py SOURCE FORMAT`` with TRITON_INTERPRET=1 (it must be set before triton is imported, so
this is a process of its own); prints a JSON object of measurements per head dim.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from vllm_source import OPS, TURBOQUANT, load

from tuner.formats import HEAD_DIMS, slot_layout
from tuner.reference import (
    Case,
    Codec,
    codebook,
    dequantize,
    hadamard,
    make_cache,
    midpoints,
    store,
    synthetic_cache,
)

BLOCK_SIZE = 16
KV_HEADS = 2
Q_HEADS = 4


def main(root: Path, name: str) -> dict[int, dict[str, float]]:
    results = {}
    for head_dim in HEAD_DIMS:
        codec = Codec.for_layout(slot_layout(name, head_dim))
        results[head_dim] = (
            _compare_levels(root, codec) | _compare_store(root, codec) | _compare_decode(root, _case(name, head_dim))
        )
    return results


def _case(name: str, head_dim: int) -> Case:
    """Every length that paging can get wrong, but for 0, where vLLM's kernel writes NaN."""
    return synthetic_cache(
        slot_layout(name, head_dim),
        [1, BLOCK_SIZE, BLOCK_SIZE + 1, 30],
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        block_size=BLOCK_SIZE,
        query_dtype=torch.float16,
        peak=2.0,
        seed=head_dim,
    )


def _arguments(codec: Codec) -> dict[str, object]:
    fmt = codec.layout.format
    return {
        "mse_bits": fmt.key_bits,
        "key_packed_size": codec.layout.key.size,
        "value_quant_bits": fmt.value_bits,
        "key_fp8": not fmt.key_codebook,
    }


def _compare_levels(root: Path, codec: Codec) -> dict[str, float]:
    """Largest difference of a codebook level, in float64 against vLLM's fp32; 0 for formats without."""
    fmt, head_dim = codec.layout.format, codec.layout.head_dim
    if not fmt.key_codebook:
        return {"level_error": 0.0}
    theirs = load(root, f"{TURBOQUANT}.centroids").get_centroids(head_dim, fmt.key_bits)
    return {"level_error": float((codebook(fmt.key_bits, head_dim) - theirs).abs().max())}


def _compare_store(root: Path, codec: Codec) -> dict[str, float]:
    """Bytes of the two caches that differ, and by how much the decoded keys and values then do."""
    layout = codec.layout
    generator = torch.Generator().manual_seed(1)
    tokens = BLOCK_SIZE + 8
    key, value = torch.randn(2, tokens, KV_HEADS, layout.head_dim, generator=generator).half()
    key[0] = 0
    key[1] *= 100
    key[2] *= 1e-3
    if not layout.format.key_codebook:
        # On its way to FP8 the interpreter rounds unlike any GPU (no carry into the exponent, subnormals cut off, no
        # saturation), so only values that need no rounding can be compared; test_reference.py checks the rounding.
        key = key.float().clamp(-448, 448).to(torch.float8_e4m3fn).half()
    value[0] = 0
    value[1] = 3.5
    value[2] *= 1000
    slots = torch.randperm(4 * BLOCK_SIZE, generator=generator)[:tokens].int()
    slots[5] = -1
    ours, theirs = (make_cache(layout, 4, BLOCK_SIZE, KV_HEADS) for _ in range(2))
    store(ours, key, value, slots, codec)
    module = load(root, f"{OPS}.triton_turboquant_store")
    matrix = hadamard(torch.eye(layout.head_dim))
    module.triton_turboquant_store(key, value, theirs, slots, matrix, midpoints(codec.centroids), **_arguments(codec))
    written = torch.zeros(4 * BLOCK_SIZE, dtype=torch.bool)
    written[slots[slots >= 0].long()] = True
    untouched = (theirs != 0xFF).any(-1).any(-1).flatten() & ~written
    differing = ours != theirs
    mine, other = (dequantize(c, codec) for c in (ours, theirs))
    return {
        "bytes": float(KV_HEADS * written.sum() * layout.slot_bytes),
        "key_bytes_differ": float(differing[..., : layout.key.size].sum()),
        "value_bytes_differ": float(differing[..., layout.value_offset :].sum()),
        "written_elsewhere": float(untouched.sum()),
        "key_error": _error(mine[0], other[0], written),
        "value_error": _error(mine[1], other[1], written),
    }


def _error(a: torch.Tensor, b: torch.Tensor, written: torch.Tensor) -> float:
    """Largest difference of a decoded row, relative to the row's length."""
    a, b = (x.flatten(0, 1)[written] for x in (a, b))
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max())


def _compare_decode(root: Path, case: Case) -> dict[str, float]:
    """Largest relative error of a head; vLLM's output is rounded to fp16."""
    module = load(root, f"{OPS}.triton_turboquant_decode")
    out = module.triton_turboquant_decode_attention(
        case.query,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        hadamard(torch.eye(case.layout.head_dim)),
        case.codec.centroids,
        case.scale,
        norm_correction=case.layout.format.norm_correction,
        max_num_kv_splits=2,
        **_arguments(case.codec),
    )
    expected = case.expected()
    return {"output_error": float(((out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
