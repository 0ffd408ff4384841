"""The inputs that kernels are timed on: one large cache of real quantised data, shared by all buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tuner.baselines import DecodeInputs
from tuner.formats import SlotLayout, slot_layout
from tuner.reference import Case, Codec, bulk_cache
from tuner.workload import Bucket, Shape

_SHARE = 0.4  # of the free memory


class Pool:
    """A cache for one layout and number of KV heads, grown to the largest bucket asked for within the budget."""

    def __init__(self, block_size: int, pool_bytes: int | None, seed: int) -> None:
        self._block_size = block_size
        self._pool_bytes = pool_bytes
        self._seed = seed
        self._key: tuple[SlotLayout, int] | None = None
        self._cache: Tensor | None = None
        self._cases: dict[tuple[str, int], Case] = {}
        self._dense: tuple[Case, tuple[Tensor, Tensor]] | None = None

    def cases(self, shape: Shape, cache_format: str, buckets: Sequence[Bucket]) -> dict[str, Case]:
        """A case per bucket that fits, by bucket key."""
        layout = slot_layout(cache_format, shape.head_dim)
        fitting = self.reserve(shape, cache_format, buckets)
        return {bucket.key: self._case(layout, shape, bucket) for bucket in fitting}

    def reserve(self, shape: Shape, cache_format: str, buckets: Sequence[Bucket]) -> list[Bucket]:
        """Makes the cache large enough for all of ``buckets`` that fit; returns those."""
        layout = slot_layout(cache_format, shape.head_dim)
        block_bytes = self._block_size * shape.kv_heads * layout.token_bytes
        self._select(layout, shape.kv_heads)
        limit = self._budget() // block_bytes
        fitting = [bucket for bucket in buckets if self._blocks(bucket) <= limit]
        if fitting:
            self._grow(layout, shape.kv_heads, max(map(self._blocks, fitting)), limit)
        return fitting

    def inputs(self, case: Case, *, dense: bool) -> DecodeInputs:
        """What a baseline takes; ``dense``: with an uncompressed cache, of only as many blocks as the case uses.

        Peers of the same case share that cache until ``forget_dense()``: it may be half of the memory.
        """
        if not dense:
            return DecodeInputs.of(case)
        lengths = case.seq_lens.tolist()
        used = sum(-(-length // self._block_size) for length in lengths)
        generator = torch.Generator(device="cuda").manual_seed(self._seed)
        shape = (used, self._block_size, case.kv_heads, case.layout.head_dim)

        def rows() -> Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

        def both() -> tuple[Tensor, Tensor]:
            if self._dense is None or self._dense[0] is not case:
                self._dense = None
                self._dense = (case, (rows(), rows()))
            return self._dense[1]

        small = replace(case, kv_cache=case.kv_cache[:used], block_table=self._table(lengths, used, generator))
        return DecodeInputs.of(small, both)

    def forget_dense(self) -> None:
        """Lets go of the uncompressed cache."""
        self._dense = None

    def _select(self, layout: SlotLayout, kv_heads: int) -> None:
        if self._key != (layout, kv_heads):
            self._key, self._cache = (layout, kv_heads), None
            self._cases.clear()
            torch.cuda.empty_cache()

    def _budget(self) -> int:
        if self._pool_bytes is not None:
            return self._pool_bytes
        held = 0 if self._cache is None else self._cache.numel()
        return int(_SHARE * (torch.cuda.mem_get_info()[0] + held))

    def _grow(self, layout: SlotLayout, kv_heads: int, blocks: int, limit: int) -> None:
        """Makes room for ``blocks``; at least doubles, because buckets tend to come in ascending order."""
        if self._cache is not None:
            if self._cache.shape[0] >= blocks:
                return
            blocks = max(blocks, min(limit, 2 * self._cache.shape[0]))
        self._cache = None
        self._cases.clear()
        torch.cuda.empty_cache()
        self._cache = bulk_cache(layout, blocks, self._block_size, kv_heads, "cuda", self._seed)

    def _blocks(self, bucket: Bucket) -> int:
        return sum(-(-length // self._block_size) for length in bucket.lengths(self._seed))

    def _case(self, layout: SlotLayout, shape: Shape, bucket: Bucket) -> Case:
        key = (bucket.key, shape.q_heads)
        if key not in self._cases:
            assert self._cache is not None
            lengths = bucket.lengths(self._seed)
            generator = torch.Generator(device="cuda").manual_seed(self._seed)
            query = torch.randn(
                (bucket.batch, shape.q_heads, shape.head_dim), generator=generator, dtype=torch.float32, device="cuda"
            )
            self._cases[key] = Case(
                query=query.bfloat16(),
                kv_cache=self._cache,
                block_table=self._table(lengths, self._cache.shape[0], generator),
                seq_lens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
                scale=shape.head_dim**-0.5,
                codec=Codec.for_layout(layout, self._seed).to("cuda"),
            )
        return self._cases[key]

    def _table(self, lengths: Sequence[int], blocks: int, generator: torch.Generator) -> Tensor:
        """int32 [B, max_blocks], pages drawn without repetition from the first ``blocks``, in random order."""
        pages = torch.randperm(blocks, generator=generator, device="cuda", dtype=torch.int32)
        used = [-(-length // self._block_size) for length in lengths]
        table = torch.zeros(len(used), max(used), dtype=torch.int32, device="cuda")
        start = 0
        for row, count in zip(table, used, strict=True):
            row[:count] = pages[start : start + count]
            start += count
        return table
