"""The public calls: decode attention, dequantisation and the store, on torch tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tuner.arguments import group
from tuner.errors import TunerError, UsageError
from tuner.formats import SlotLayout, slot_layout
from tuner.kernels import Selection, Tables, default_decode, default_kernel
from tuner.launch import DecodeCall, DequantCall, StoreCall, Workspace, cache_order
from tuner.reference import Codec
from tuner.reference import store as reference_store
from tuner.space import Problem
from tuner.suits import comes_piecemeal


def load_tables(folder: Path | str | None = None, device: int | None = None) -> Tables:
    """The dispatch tables for ``device`` (torch's current one), from ``folder`` or the usual places.

    The usual places: $VLLM_TUNED_CONFIG_FOLDER, ``tuned/`` of vLLM's configuration folder, then the package. Raises
    TunerError without a GPU or the folder.
    """
    if not torch.cuda.is_available():
        raise TunerError("no NVIDIA GPU: torch sees none, and a table's kernels run on nothing else")
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"no folder {folder}: expected one that holds dispatch tables")
    return Tables(None if folder is None else Path(folder), device)


def decode_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    cache_format: str,
    centroids: Tensor | None = None,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
    tables: Tables | None = None,
    out: Tensor | None = None,
    max_context: int | None = None,
    tokens: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Decode attention over a compressed paged cache; [B, Hq, D] of the query's type, on torch's current stream.

    ``query`` [B, Hq, D] fp16 or bf16; ``kv_cache`` uint8 [blocks, block_size, Hk, slot] (formats with separate planes:
    [blocks, 2, block_size, Hk, slot]), any strides but the last; ``block_table`` int32 or int64 [B, max_blocks],
    ``stride(0)`` may be 0; ``seq_lens`` int32 [B], 0 allowed (that row becomes zeros). ``centroids``, ``signs``,
    ``channels`` are the layer's constants as ``reference.Codec`` describes them; None means those of layer seed 0.
    Without a table, or where it has no choice, the default configuration runs, compiled once if need be.
    ``max_context``: the longest request as the host knows it, for a finer choice from the tables; with it ``tokens``,
    those of all requests together, tell equal requests from unequal ones, which they are taken for otherwise.
    ``workspace``: scratch for calls that overlap others. Can be captured in a CUDA graph after one call of the same
    sizes without ``max_context``, which a capture does not look at.
    """
    device = _cuda_index(kv_cache)
    if query.dim() != 3 or kv_cache.dim() < 4 or block_table.dim() != 2:
        raise UsageError("expected query [B, Hq, D], kv_cache with 4 or 5 dimensions and block_table [B, max_blocks]")
    batch, q_heads, head_dim = query.shape
    block_size, kv_heads = kv_cache.shape[-3], kv_cache.shape[-2]
    problem = Problem("decode", head_dim, group(q_heads, kv_heads), cache_format)
    capturing = torch.cuda.is_current_stream_capturing()
    order = cache_order(kv_cache)
    chosen = None
    context = None if capturing else max_context
    longest = context or block_table.shape[1] * block_size
    if tables is not None:
        chosen = tables.select(
            problem,
            batch=batch,
            kv_heads=kv_heads,
            context=context,
            tokens=tokens,
            longest=longest,
            order=order,
        )
    if chosen is None:
        chosen = default_decode(problem, device, order, batch=batch, context=longest)
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    codec = _codec(problem.layout, kv_cache.device, centroids, signs, channels)
    DecodeCall(
        chosen.kernel,
        query,
        kv_cache,
        block_table,
        seq_lens,
        result,
        scale=scale,
        codec=codec,
        splits=chosen.splits,
        workspace=workspace,
    )()
    return result


def dequantize(
    kv_cache: Tensor,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    *,
    cache_format: str,
    head_dim: int,
    which: str = "both",
    by_block_id: bool = False,
    dirty: Tensor | None = None,
    centroids: Tensor | None = None,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
    tables: Tables | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(K, V), bf16 [B * max_blocks, block_size, Hk, D] each: block j of request b at b * max_blocks + j.

    Rows past a request's length are not written. ``which``: "both", "key" or "value", the other is None. ``out``: the
    tensors to write to, instead of new ones. Everything else as in decode_attention().

    ``by_block_id``: the outputs are images of the cache, [blocks, block_size, Hk, D], a block at its id. ``dirty``
    brings such an image (``out``) up to date: the slots int32 or int64 [N] that were written since, negative ones
    skipped, which is what store() was given as slot_mapping. Only those rows are decoded and written, so the image
    equals a full decode of every row that was ever listed, also where another request reuses a block. There is no
    block table then: the kernel groups adjacent slots itself, from device memory, so a captured graph replays with
    other slots, lengths and requests.
    """
    if which not in ("both", "key", "value"):
        raise UsageError(f"which is {which!r}: expected 'both', 'key' or 'value'")
    device = _cuda_index(kv_cache)
    if kv_cache.dim() < 4 or (block_table is not None and block_table.dim() != 2):
        raise UsageError("expected kv_cache with 4 or 5 dimensions and block_table [B, max_blocks]")
    if dirty is not None and out is None:
        raise UsageError("dirty is given without out: expected the tensors that it brings up to date")
    if dirty is None and block_table is None:
        raise UsageError("block_table is None: expected [B, max_blocks], or dirty in its place")
    problem = Problem("dequant", head_dim, 1, cache_format)
    chosen: Selection | None = None
    if tables is not None:
        requests = dirty if dirty is not None else block_table
        assert requests is not None
        chosen = tables.select(problem, batch=requests.shape[0], kv_heads=kv_cache.shape[-2])
    if chosen is None or comes_piecemeal(chosen.kernel.config, cache_order(kv_cache)):
        chosen = default_kernel(problem, device)
    if out is None:
        assert block_table is not None
        blocks = kv_cache.shape[0] if by_block_id else block_table.numel()
        shape = (blocks, *kv_cache.shape[-3:-1], head_dim)
        key, value = (
            torch.empty(shape, dtype=torch.bfloat16, device=kv_cache.device) if which in ("both", name) else None
            for name in ("key", "value")
        )
    else:
        key, value = out
    codec = _codec(problem.layout, kv_cache.device, centroids, signs, channels)
    DequantCall(
        chosen.kernel, kv_cache, block_table, seq_lens, key, value, codec=codec, by_block_id=by_block_id, dirty=dirty
    )()
    return key, value


def store(
    kv_cache: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    *,
    cache_format: str,
    centroids: Tensor | None = None,
    signs: Tensor | None = None,
    channels: Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """Quantises ``key`` and ``value`` [N, Hk, D] into the slots ``slot_mapping`` [N]; negative ones write nothing.

    ``key``, ``value`` bf16 or fp16, any strides but the last; slot = block * block_size + token, int32 or int64, no
    slot twice. One launch on a GPU, of the table's or the default kernel; the torch reference for tensors on the CPU,
    which takes any float type. Everything else as in decode_attention().
    """
    layout = slot_layout(cache_format, key.shape[-1])
    codec = _codec(layout, kv_cache.device, centroids, signs, channels)
    if kv_cache.device.type != "cuda":
        reference_store(kv_cache, key, value, slot_mapping, codec)
        return
    problem = Problem("store", layout.head_dim, 1, cache_format)
    chosen: Selection | None = None
    if tables is not None:
        chosen = tables.select(problem, batch=slot_mapping.shape[0], kv_heads=kv_cache.shape[-2])
    if chosen is None:
        chosen = default_kernel(problem, _cuda_index(kv_cache))
    StoreCall(chosen.kernel, kv_cache, key, value, slot_mapping, codec=codec)()


def _cuda_index(kv_cache: Tensor) -> int:
    if kv_cache.device.type != "cuda":
        raise UsageError(f"kv_cache is on {kv_cache.device}: expected a CUDA device (tuner.reference runs anywhere)")
    return kv_cache.device.index or 0


def _codec(
    layout: SlotLayout, device: torch.device, centroids: Tensor | None, signs: Tensor | None, channels: Tensor | None
) -> Codec:
    codec = _default_codec(layout, device)
    return replace(
        codec,
        centroids=codec.centroids if centroids is None else centroids,
        signs=codec.signs if signs is None else signs,
        channels=codec.channels if channels is None else channels,
    )


@lru_cache(maxsize=64)
def _default_codec(layout: SlotLayout, device: torch.device) -> Codec:
    return Codec.for_layout(layout).to(device)
