"""Inputs for checks and timings: paged caches of real quantised data, with everything unused poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tuner.errors import UsageError
from tuner.formats import SlotLayout
from tuner.reference.attention import attend, store
from tuner.reference.codec import Codec

POISON = 0xFF
"""Every unused byte: as fp16 and as E4M3 it reads NaN, so whatever touches it shows."""

_STORE_TOKENS = 4096  # quantised at a time
_TEMPLATE_TOKENS = 1024  # distinct tokens of a bulk cache
_LOUD_CHANNELS = 4
_KEY_GAIN = 8.0
_VALUE_GAIN = 4.0


@dataclass(frozen=True)
class Case:
    """One decode-attention call.

    ``query`` [B, Hq, D] bf16 or fp16; ``kv_cache`` uint8 [blocks, block_size, Hk, slot] (seed formats: a 2 after
    the blocks), last stride 1; ``block_table`` int32 or int64 [B, max_blocks]; ``seq_lens`` int32 [B].
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    codec: Codec

    @property
    def layout(self) -> SlotLayout:
        return self.codec.layout

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[-3]

    @property
    def kv_heads(self) -> int:
        return self.kv_cache.shape[-2]

    def to(self, device: torch.device | str) -> Case:
        """The same call on ``device``, the cache with its strides and padding."""
        return replace(
            self,
            query=self.query.to(device),
            kv_cache=_move(self.kv_cache, device),
            block_table=self.block_table.to(device),
            seq_lens=self.seq_lens.to(device),
            codec=self.codec.to(device),
        )

    def expected(self) -> torch.Tensor:
        """The reference's answer, float64 [B, Hq, D], on the case's device."""
        return attend(self.query, self.kv_cache, self.block_table, self.seq_lens, self.scale, self.codec)


def make_cache(
    layout: SlotLayout,
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    *,
    order: str = "token",
    padding: int = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """An unused cache, uint8 [blocks, block_size, Hk, slot], or [blocks, 2, block_size, Hk, slot] for seed formats.

    Memory is token-major or, with ``order="head"``, head-major within a block (and plane); ``padding`` bytes follow
    each block. Filled with POISON, or with random bytes from ``generator``.
    """
    if order not in ("token", "head"):
        raise UsageError(f"unknown cache order {order!r}: expected 'token' or 'head'")
    planes = 2 if layout.format.separate_planes else 1
    rows = (block_size, kv_heads) if order == "token" else (kv_heads, block_size)
    block_bytes = planes * block_size * kv_heads * layout.slot_bytes
    memory = torch.full((num_blocks, block_bytes + padding), POISON, dtype=torch.uint8, device=device)
    if generator is not None:
        memory.random_(0, 256, generator=generator)
    cache = memory[:, :block_bytes].view(num_blocks, planes, *rows, layout.slot_bytes)
    if order == "head":
        cache = cache.transpose(2, 3)
    return cache if planes == 2 else cache[:, 0]


def synthetic_cache(
    layout: SlotLayout,
    lengths: Sequence[int],
    *,
    q_heads: int,
    kv_heads: int,
    block_size: int = 16,
    query_dtype: torch.dtype = torch.bfloat16,
    index_dtype: torch.dtype = torch.int32,
    order: str = "token",
    padding: int = 0,
    stale_table: bool = True,
    spare_blocks: int = 3,
    peak: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """A case with one request per entry of ``lengths`` (tokens, 0 allowed), every token of it quantised.

    Keys and values are Gaussian with a few loud channels. Pages are shuffled over the whole cache; the unused rest
    of a request's last block and ``spare_blocks`` further blocks stay poisoned. With ``stale_table`` the unused
    part of the block table (always some columns) holds ids that are out of range or another request's, else 0.
    ``peak`` scales the queries: large values make the softmax peaked. Same arguments, same bytes on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    used = [-(-n // block_size) for n in lengths]
    num_blocks = sum(used) + spare_blocks
    cache = make_cache(layout, num_blocks, block_size, kv_heads, order=order, padding=padding)
    codec = Codec.for_layout(layout, seed)
    table, slots = _pages(lengths, used, num_blocks, block_size, stale_table, generator)
    gains = _channel_gains(codec, generator)
    for part in slots.split(_STORE_TOKENS):
        key, value = _random_rows(len(part), kv_heads, gains, generator)
        store(cache, key, value, part, codec)
    query = torch.randn(len(lengths), q_heads, layout.head_dim, generator=generator) * peak
    case = Case(
        query=query.to(query_dtype),
        kv_cache=cache,
        block_table=table.to(index_dtype),
        seq_lens=torch.tensor(list(lengths), dtype=torch.int32),
        scale=layout.head_dim**-0.5,
        codec=codec,
    )
    return case if torch.device(device).type == "cpu" else case.to(device)


def bulk_cache(
    layout: SlotLayout,
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    device: torch.device | str,
    seed: int = 0,
    *,
    order: str = "token",
    padding: int = 0,
) -> torch.Tensor:
    """A cache full of real quantised data, for timing: about a thousand tokens, repeated over all blocks.

    The copies are made on ``device``, so gigabytes take seconds. The codec is ``Codec.for_layout(layout, seed)``.
    """
    cache = make_cache(layout, num_blocks, block_size, kv_heads, order=order, padding=padding, device=device)
    count = min(num_blocks, max(1, _TEMPLATE_TOKENS // block_size))
    template = make_cache(layout, count, block_size, kv_heads, order=order)
    codec = Codec.for_layout(layout, seed)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(count * block_size)
    key, value = _random_rows(len(slots), kv_heads, _channel_gains(codec, generator), generator)
    store(template, key, value, slots, codec)
    template = template.to(device)
    for start in range(0, num_blocks, count):
        part = cache[start : start + count]
        part.copy_(template[: len(part)])
    return cache


def bulk_case(
    layout: SlotLayout,
    lengths: Sequence[int],
    *,
    q_heads: int,
    kv_heads: int,
    block_size: int = 16,
    query_dtype: torch.dtype = torch.bfloat16,
    index_dtype: torch.dtype = torch.int32,
    order: str = "token",
    padding: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """Like synthetic_cache, for timing: the data repeat (bulk_cache), pages are shuffled, nothing is poisoned."""
    used = [-(-n // block_size) for n in lengths]
    num_blocks = max(1, sum(used))
    generator = torch.Generator().manual_seed(seed)
    table, _ = _pages(lengths, used, num_blocks, block_size, False, generator)
    query = torch.randn(len(lengths), q_heads, layout.head_dim, generator=generator)
    return Case(
        query=query.to(device=device, dtype=query_dtype),
        kv_cache=bulk_cache(layout, num_blocks, block_size, kv_heads, device, seed, order=order, padding=padding),
        block_table=table.to(device=device, dtype=index_dtype),
        seq_lens=torch.tensor(list(lengths), dtype=torch.int32, device=device),
        scale=layout.head_dim**-0.5,
        codec=Codec.for_layout(layout, seed).to(device),
    )


def _pages(
    lengths: Sequence[int],
    used: Sequence[int],
    num_blocks: int,
    block_size: int,
    stale: bool,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled block table int64 [B, max_blocks + 2] and the slot of every token, request by request, int64."""
    free = torch.randperm(num_blocks, generator=generator)
    table = torch.zeros(len(used), max(used, default=0) + 2, dtype=torch.int64)
    if stale:
        garbage = torch.tensor([-1, 2**31 - 1, num_blocks, num_blocks // 2])
        table = garbage[torch.randint(0, len(garbage), table.shape, generator=generator)]
    slots = []
    for row, length, ids in zip(table, lengths, free[: sum(used)].split(list(used)), strict=True):
        row[: len(ids)] = ids
        token = torch.arange(length)
        slots.append(ids[token // block_size] * block_size + token % block_size)
    return table, torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)


def _channel_gains(codec: Codec, generator: torch.Generator) -> torch.Tensor:
    """Which channels are loud, [2, D] for keys and values: the codec's own outliers where it has any."""
    layout = codec.layout
    if codec.channels is not None:
        loud = codec.channels[layout.normal :].long()[:_LOUD_CHANNELS]
    else:
        loud = torch.randperm(layout.head_dim, generator=generator)[:_LOUD_CHANNELS]
    gains = torch.ones(2, layout.head_dim)
    gains[0, loud], gains[1, loud] = _KEY_GAIN, _VALUE_GAIN
    return gains


def _random_rows(
    tokens: int, kv_heads: int, gains: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 keys and values [tokens, Hk, D]."""
    rows = torch.randn(2, tokens, kv_heads, gains.shape[-1], generator=generator) * gains[:, None, None]
    key, value = rows.bfloat16()
    return key, value


def _move(cache: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``cache`` on ``device`` with its strides, which Tensor.to drops where blocks are padded."""
    memory = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())
    return memory.to(device).as_strided(cache.shape, cache.stride(), cache.storage_offset())
