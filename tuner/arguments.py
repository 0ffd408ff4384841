"""Tensors to kernel arguments: validates shapes and strides, fills the structures of ``tuner.abi``.

The same filling serves the GPU (addresses are device addresses) and the emulator (addresses are CPU ones): each
function returns the structure and the tensors behind its pointers, by field name, which must outlive the launch.
"""

from __future__ import annotations

from ctypes import Structure
from typing import Any

import torch
from torch import Tensor

from tuner.abi import DecodeParams, DequantParams, StoreParams
from tuner.errors import UsageError
from tuner.formats import SlotLayout, slot_layout
from tuner.geometry import DIRTY_RUN_TOKENS


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
    ``partials`` fp32, 16-byte aligned, and ``counters`` int32 (zero), 8-byte aligned: sizes as
    ``geometry.decode_scratch`` says. Raises UsageError.
    """
    _expect("query", query, 3, (torch.bfloat16, torch.float16))
    _expect("out", out, 3, (query.dtype,))
    if out.shape != query.shape:
        raise UsageError(f"out has shape {_shape(out)}: expected that of query, {_shape(query)}")
    batch, q_heads, head_dim = query.shape
    layout = slot_layout(cache_format, head_dim)
    _expect("partials", partials, 1, (torch.float32,))
    if partials.data_ptr() % 16:
        raise UsageError("partials start off a multiple of 16 bytes: expected a whole allocation or an aligned part")
    _expect("counters", counters, 1, (torch.int32,))
    if counters.data_ptr() % 8:
        raise UsageError("counters start off a multiple of 8 bytes: expected a whole allocation or an aligned part")
    tensors = {"query": query, "out": out, "partials": partials, "counters": counters}
    fields = _cache_fields(layout, kv_cache, block_table, seq_lens, tensors)
    _code_fields(layout, centroids, signs, channels, tensors)
    _expect_one_device(tensors)
    if fields["batch"] != batch:
        raise UsageError(f"seq_lens has {fields['batch']} rows but query has {batch}: expected one per request")
    group(q_heads, fields["kv_heads"])
    if splits < 1:
        raise UsageError(f"splits is {splits}: expected at least 1")
    params = DecodeParams(
        **fields,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        query_batch_stride=query.stride(0),
        query_head_stride=query.stride(1),
        out_batch_stride=out.stride(0),
        out_head_stride=out.stride(1),
        is_bf16=int(query.dtype == torch.bfloat16),
        scale=scale,
        splits=splits,
    )
    return params, tensors


def dequant_params(
    kv_cache: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    key_out: Tensor | None,
    value_out: Tensor | None,
    *,
    cache_format: str,
    head_dim: int,
    centroids: Tensor,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
    by_block_id: bool = False,
    dirty: Tensor | None = None,
) -> tuple[Structure, dict[str, Tensor]]:
    """DequantParams for one call of ``wph_dequant``.

    ``key_out``, ``value_out``: bf16 [destination blocks, block_size, Hk, D], one may be None; both have the same
    strides. Destination block: the block's id where ``by_block_id``, else its position in the flattened block table.
    ``dirty``: int32 or int64 [N], slots (block * block_size + token, negative: none) to decode in place of a block
    table; the destination then is the block's id. Raises UsageError.
    """
    layout = slot_layout(cache_format, head_dim)
    outputs = {name: out for name, out in (("key_out", key_out), ("value_out", value_out)) if out is not None}
    if not outputs:
        raise UsageError("neither key_out nor value_out is given: expected at least one of them")
    tensors: dict[str, Tensor] = dict(outputs)
    if dirty is not None:
        if block_table is not None or seq_lens is not None:
            raise UsageError("dirty is given with block_table or seq_lens: expected None for both")
        fields = _dirty_fields(layout, kv_cache, dirty, tensors)
        by_block_id = True
    elif block_table is None or seq_lens is None:
        raise UsageError("block_table or seq_lens is None: expected both, or dirty in their place")
    else:
        fields = _cache_fields(layout, kv_cache, block_table, seq_lens, tensors)
    _code_fields(layout, centroids, signs, channels, tensors)
    _expect_one_device(tensors)
    destinations = kv_cache.shape[0] if by_block_id else fields["batch"] * fields["max_blocks"]
    row = (fields["block_size"], fields["kv_heads"], head_dim)
    strides = next(iter(outputs.values())).stride()
    for name, out in outputs.items():
        _expect(name, out, 4, (torch.bfloat16,))
        if out.shape[0] < destinations or tuple(out.shape[1:]) != row:
            raise UsageError(f"{name} has shape {_shape(out)}: expected [at least {destinations}, {_join(row)}]")
        if out.stride() != strides:
            raise UsageError(f"value_out has strides {out.stride()}: expected those of key_out, {strides}")
    params = DequantParams(
        **fields,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        out_block_stride=strides[0],
        out_token_stride=strides[1],
        out_head_stride=strides[2],
        by_block_id=int(by_block_id),
    )
    return params, tensors


def store_params(
    kv_cache: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    cache_format: str,
    centroids: Tensor,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
) -> tuple[Structure, dict[str, Tensor]]:
    """StoreParams for one call of ``wph_store``.

    ``key``, ``value``: bf16 or fp16 [at least N, Hk, D], any strides but the last. ``slot_mapping``: int32 or
    int64 [N], block * block_size + token, negative where nothing is written; rows beyond the first N are ignored.
    Raises UsageError.
    """
    _expect("key", key, 3, (torch.bfloat16, torch.float16))
    _expect("value", value, 3, (key.dtype,))
    _expect("slot_mapping", slot_mapping, 1, (torch.int32, torch.int64))
    if slot_mapping.stride(0) != 1 and slot_mapping.shape[0] > 1:
        raise UsageError(f"slot_mapping has stride {slot_mapping.stride(0)}: expected 1")
    if value.shape != key.shape:
        raise UsageError(f"value has shape {_shape(value)}: expected that of key, {_shape(key)}")
    tokens, kv_heads = slot_mapping.shape[0], key.shape[1]
    if key.shape[0] < tokens:
        raise UsageError(f"key has {key.shape[0]} tokens but slot_mapping {tokens}: expected at least as many")
    layout = slot_layout(cache_format, key.shape[2])
    tensors = {"key": key, "value": value, "slot_mapping": slot_mapping, "kv_cache": kv_cache}
    fields = _slot_fields(layout, kv_cache)
    _code_fields(layout, centroids, signs, channels, tensors)
    _expect_one_device(tensors)
    if fields["kv_heads"] != kv_heads:
        raise UsageError(f"key has {kv_heads} heads but kv_cache {fields['kv_heads']}: expected the same")
    # The kernel numbers slots and (token, head) pairs with 32 bits.
    if kv_cache.shape[0] * fields["block_size"] >= 1 << 32 or tokens * kv_heads >= 1 << 31:
        slots = kv_cache.shape[0] * fields["block_size"]
        raise UsageError(f"{slots} slots and {tokens * kv_heads} rows: expected less than 2^32 and 2^31")
    params = StoreParams(
        **fields,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        key_token_stride=key.stride(0),
        key_head_stride=key.stride(1),
        value_token_stride=value.stride(0),
        value_head_stride=value.stride(1),
        is_bf16=int(key.dtype == torch.bfloat16),
        slot_mapping_bytes=slot_mapping.element_size(),
        tokens=tokens,
    )
    return params, tensors


def group(q_heads: int, kv_heads: int) -> int:
    """Query heads per KV head. Raises UsageError where they do not divide."""
    if kv_heads < 1 or q_heads % kv_heads:
        raise UsageError(f"{q_heads} query heads over {kv_heads} KV heads: expected a multiple")
    return q_heads // kv_heads


def _cache_fields(
    layout: SlotLayout, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The paged cache's part of a structure without its pointers; adds the tensors behind those to ``tensors``."""
    fields = _slot_fields(layout, kv_cache)
    _expect("seq_lens", seq_lens, 1, (torch.int32,))
    _expect("block_table", block_table, 2, (torch.int32, torch.int64))
    if block_table.shape[0] != seq_lens.shape[0]:
        raise UsageError(f"block_table has {block_table.shape[0]} rows: expected one per request, {seq_lens.shape[0]}")
    tensors.update(kv_cache=kv_cache, block_table=block_table, seq_lens=seq_lens)
    return fields | {
        "block_table_stride": block_table.stride(0),
        "block_table_bytes": block_table.element_size(),
        "max_blocks": block_table.shape[1],
        "batch": seq_lens.shape[0],
    }


def _dirty_fields(
    layout: SlotLayout, kv_cache: Tensor, dirty: Tensor, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Likewise where a list of slots stands in place of the block table."""
    fields = _slot_fields(layout, kv_cache)
    _expect("dirty", dirty, 1, (torch.int32, torch.int64))
    # The kernel numbers slots with 32 bits.
    if kv_cache.shape[0] * fields["block_size"] >= 1 << 32:
        raise UsageError(f"{kv_cache.shape[0] * fields['block_size']} slots: expected less than 2^32")
    tensors.update(kv_cache=kv_cache, dirty=dirty)
    return fields | {
        "max_blocks": 1,
        "batch": dirty.shape[0],
        "dirty_bytes": dirty.element_size(),
        "run_tokens": DIRTY_RUN_TOKENS,
    }


def _slot_fields(layout: SlotLayout, kv_cache: Tensor) -> dict[str, Any]:
    """Where a cache's slots lie: strides in bytes, block size and heads."""
    planes = layout.format.separate_planes
    _expect("kv_cache", kv_cache, 5 if planes else 4, (torch.uint8,))
    if planes and kv_cache.shape[1] != 2:
        raise UsageError(f"kv_cache has shape {_shape(kv_cache)}: expected [blocks, 2, block_size, Hk, slot]")
    if kv_cache.shape[-1] < layout.slot_bytes:
        name, d = layout.format.name, layout.head_dim
        expected = f"at least {layout.slot_bytes} for {name} at head dim {d}"
        raise UsageError(f"kv_cache has slots of {kv_cache.shape[-1]} bytes: expected {expected}")
    strides, sizes = kv_cache.stride(), kv_cache.shape
    return {
        "block_stride": strides[0],
        "plane_stride": strides[1] if planes else 0,
        "token_stride": strides[-3],
        "head_stride": strides[-2],
        "block_size": sizes[-3],
        "kv_heads": sizes[-2],
    }


def _code_fields(
    layout: SlotLayout, centroids: Tensor, signs: Tensor | None, channels: Tensor | None, tensors: dict[str, Tensor]
) -> None:
    """Checks the constants of a layer and adds those that the format uses to ``tensors``; the others stay null."""
    fmt, name = layout.format, layout.format.name
    _expect("centroids", centroids, 1, (torch.float32,))
    if fmt.key_codebook and centroids.shape[0] != 1 << fmt.key_bits:
        raise UsageError(f"centroids has {centroids.shape[0]} levels: expected {1 << fmt.key_bits} for {name}")
    tensors["centroids"] = centroids
    if fmt.has_signs:
        tensors["signs"] = _layer_constant("signs", signs, torch.float32, layout.normal, name)
    if layout.outliers:
        tensors["channels"] = _layer_constant("channels", channels, torch.int32, layout.head_dim, name)


def _layer_constant(name: str, tensor: Tensor | None, dtype: torch.dtype, length: int, fmt: str) -> Tensor:
    if tensor is None:
        raise UsageError(f"{name} is missing: {fmt} needs {length} of them, of type {_name(dtype)}")
    _expect(name, tensor, 1, (dtype,))
    if tensor.shape[0] != length:
        raise UsageError(f"{name} has {tensor.shape[0]} elements: expected {length} for {fmt}")
    return tensor


def _expect(name: str, tensor: Tensor, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises UsageError unless ``tensor`` has that many dimensions, one of the types and adjacent last elements."""
    if tensor.dim() != dims:
        raise UsageError(f"{name} has shape {_shape(tensor)}: expected {dims} dimensions")
    if tensor.dtype not in dtypes:
        raise UsageError(f"{name} is {_name(tensor.dtype)}: expected {' or '.join(map(_name, dtypes))}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise UsageError(f"{name} has last stride {tensor.stride(-1)}: expected 1")


def _expect_one_device(tensors: dict[str, Tensor]) -> None:
    home = tensors["kv_cache"].device
    for name, tensor in tensors.items():
        if tensor.device != home:
            raise UsageError(f"{name} is on {tensor.device} but kv_cache on {home}: expected one device")


def _shape(tensor: Tensor) -> str:
    return f"[{_join(tensor.shape)}]"


def _join(sizes: tuple[int, ...] | torch.Size) -> str:
    return ", ".join(map(str, sizes))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
