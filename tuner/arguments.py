"""Tensors to kernel arguments: validates shapes and strides, fills the structures of ``tuner.abi``.

The same filling serves the GPU (addresses are device addresses) and the emulator (addresses are CPU ones): each
function returns the structure and the tensors behind its pointers, by field name, which must outlive the launch.
"""

from __future__ import annotations

from ctypes import Structure
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def decode_params(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    cache_format: str,
    scale: float,
    splits: int,
    partials: Tensor,
    counters: Tensor,
    centroids: Tensor,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
) -> tuple[Structure, dict[str, Tensor]]:
    """DecodeParams for one call of ``wph_decode`` (and of ``wph_decode_reduce``).

    ``query``, ``out``: [B, Hq, D] bf16 or fp16, any strides but the last. ``kv_cache``: uint8
    [blocks, block_size, Hk, slot] or, for formats with separate planes, [blocks, 2, block_size, Hk, slot], any strides
    but the last. ``block_table``: int32 or int64 [B, max_blocks], ``stride(0)`` may be 0. ``seq_lens``: int32 [B].
    ``partials`` fp32 and ``counters`` int32 (zero): sizes as ``geometry.decode_scratch`` says. Raises UsageError.
    """
    raise NotImplementedError


def dequant_params(
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    key_out: Tensor | None,
    value_out: Tensor | None,
    *,
    cache_format: str,
    head_dim: int,
    centroids: Tensor,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
    by_block_id: bool = False,
) -> tuple[Structure, dict[str, Tensor]]:
    """DequantParams for one call of ``wph_dequant``.

    ``key_out``, ``value_out``: bf16 [destination blocks, block_size, Hk, D], one may be None; both have the same
    strides. Destination block: the block's id where ``by_block_id``, else its position in the flattened block table.
    Raises UsageError.
    """
    raise NotImplementedError
