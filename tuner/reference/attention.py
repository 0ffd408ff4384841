"""Operations on a paged cache: write slots, read everything back, decode attention."""

from __future__ import annotations

import torch

from tuner.errors import UsageError
from tuner.reference.codec import Codec, dequantize_key, dequantize_value, quantize_key, quantize_value

_CHUNK_ELEMENTS = 1 << 22  # of K or V in float64 at a time: bounds memory at long contexts


def store(
    kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor, codec: Codec
) -> None:
    """Writes ``key`` and ``value`` [>= N, Hk, D] to the slots ``slot_mapping`` [N] (block * block_size + token).

    Negative slots write nothing; of a slot only the bytes that carry data are written. Rows beyond the N first are
    ignored: padding of a batch.
    """
    keys, values = _planes(kv_cache, codec)
    used = slot_mapping >= 0
    slots = slot_mapping[used].long()
    block_size = keys.shape[1]
    where = (slots // block_size, slots % block_size)
    layout = codec.layout
    keys[..., : layout.key.size][where] = quantize_key(key[: len(used)][used], codec)
    values[..., : layout.value.size][where] = quantize_value(value[: len(used)][used], codec)


def dequantize(kv_cache: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of a cache, float64 [blocks, block_size, Hk, D] each, in the original space."""
    keys, values = _planes(kv_cache, codec)
    return dequantize_key(keys, codec), dequantize_value(values, codec)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    codec: Codec,
) -> torch.Tensor:
    """Decode attention of ``query`` [B, Hq, D] over the cache, float64 [B, Hq, D].

    Only the first ceil(seq_len / block_size) entries of a row of ``block_table`` and the first seq_len tokens are
    looked at, whatever the others hold. A request of length 0 gives zeros. Query head h reads KV head h // group.
    """
    keys, values = _planes(kv_cache, codec)
    block_size, kv_heads = keys.shape[1:3]
    batch, q_heads, head_dim = query.shape
    if q_heads % kv_heads:
        raise UsageError(f"{q_heads} query heads cannot share {kv_heads} KV heads: expected a multiple")
    grouped = query.double().reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    out = torch.zeros_like(grouped)
    blocks_at_once = max(1, _CHUNK_ELEMENTS // (block_size * kv_heads * head_dim))
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        blocks = block_table[b, : -(-length // block_size)].long()
        counts = _token_counts(length, blocks_at_once * block_size)
        chunks = list(zip(blocks.split(blocks_at_once), counts, strict=True))
        scores = torch.cat(
            [
                torch.einsum("hgd,thd->hgt", grouped[b], dequantize_key(keys[ids].flatten(0, 1)[:n], codec))
                for ids, n in chunks
            ],
            dim=-1,
        )
        weights = torch.softmax(scores * scale, dim=-1)
        start = 0
        for ids, n in chunks:
            rows = dequantize_value(values[ids].flatten(0, 1)[:n], codec)
            out[b] += torch.einsum("hgt,thd->hgd", weights[..., start : start + n], rows)
            start += n
    return out.reshape(batch, q_heads, head_dim)


def _token_counts(length: int, step: int) -> list[int]:
    return [min(step, length - start) for start in range(0, length, step)]


def _planes(kv_cache: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the key and value bytes, [blocks, block_size, Hk, bytes] each, of either cache family."""
    layout = codec.layout
    dims = 5 if layout.format.separate_planes else 4
    if kv_cache.dtype != torch.uint8 or kv_cache.dim() != dims or kv_cache.shape[-1] < layout.slot_bytes:
        raise UsageError(
            f"kv_cache {tuple(kv_cache.shape)} {kv_cache.dtype} does not hold {layout.format.name}: "
            f"expected uint8, {dims} dimensions, slots of at least {layout.slot_bytes} bytes"
        )
    if layout.format.separate_planes:
        return kv_cache[:, 0], kv_cache[:, 1]
    return kv_cache, kv_cache[..., layout.value_offset :]
