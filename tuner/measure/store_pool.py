"""The inputs that stores are timed on: rows as a model makes them, and slots as vLLM hands them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.baselines import StoreInputs
from tuner.check import CheckResult, Level
from tuner.check_store import StoreRun, check_store
from tuner.formats import SlotLayout, slot_layout
from tuner.launch import LoadedKernel, StoreCall
from tuner.reference import Codec, make_cache
from tuner.workload import Bucket, Shape

SCATTERED = 256
"""Tokens up to which a call is a decode step, each to a block of its own; more are a chunk that fills its blocks."""
CACHE_TOKENS = 1 << 17


class StorePool:
    """A cache of ``CACHE_TOKENS`` for one layout and number of KV heads, and a case per bucket."""

    def __init__(self, block_size: int, seed: int) -> None:
        self._block_size, self._seed = block_size, seed
        self._key: tuple[SlotLayout, int] | None = None
        self._cache: Tensor | None = None
        self._cases: dict[str, StoreInputs] = {}

    def cases(self, shape: Shape, cache_format: str, buckets: Sequence[Bucket]) -> dict[str, StoreInputs]:
        """Inputs of a call of ``bucket.tokens`` tokens, by bucket key; buckets beyond the cache are left out."""
        layout = slot_layout(cache_format, shape.head_dim)
        if self._key != (layout, shape.kv_heads):
            self._key, self._cache = (layout, shape.kv_heads), None
            self._cases.clear()
        fitting = [b for b in buckets if b.tokens <= CACHE_TOKENS]
        for bucket in fitting:
            if bucket.key not in self._cases:
                self._cases[bucket.key] = self._case(layout, shape.kv_heads, bucket.tokens)
        return {b.key: self._cases[b.key] for b in fitting}

    def reserve(self, shape: Shape, cache_format: str, buckets: Sequence[Bucket]) -> None:
        """Nothing: the cache has one size."""

    def inputs(self, case: StoreInputs, *, dense: bool) -> StoreInputs:
        """What a baseline takes: the case itself. No store has an uncompressed peer."""
        return case

    def _case(self, layout: SlotLayout, kv_heads: int, tokens: int) -> StoreInputs:
        blocks = CACHE_TOKENS // self._block_size
        if self._cache is None:
            self._cache = make_cache(layout, blocks, self._block_size, kv_heads, device="cuda")
        generator = torch.Generator(device="cuda").manual_seed(self._seed)
        rows = torch.randn(2, tokens, kv_heads, layout.head_dim, generator=generator, device="cuda")
        key, value = rows.bfloat16()
        slots = slot_mapping(tokens, blocks, self._block_size, generator)
        return StoreInputs(key, value, self._cache, slots, Codec.for_layout(layout, self._seed).to("cuda"))


def slot_mapping(tokens: int, blocks: int, block_size: int, generator: torch.Generator) -> Tensor:
    """int64 [tokens], no slot twice, on the generator's device: scattered for a decode step, else a prefill chunk."""
    device = generator.device
    order = torch.randperm(blocks, generator=generator, device=device)
    if tokens <= min(SCATTERED, blocks):
        return order[:tokens] * block_size + torch.randint(block_size, (tokens,), generator=generator, device=device)
    places = torch.arange(tokens, device=device)
    return order[places // block_size] * block_size + places % block_size


def store_call(kernel: LoadedKernel, case: StoreInputs) -> StoreCall:
    return StoreCall(kernel, case.kv_cache, case.key, case.value, case.slot_mapping, codec=case.codec)


def runner(kernel: LoadedKernel) -> StoreRun:
    """What the gate runs for a kernel on the GPU."""

    def run(kv_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, codec: Codec) -> None:
        StoreCall(kernel, kv_cache, key, value, slots, codec=codec)()

    return run


def check_loaded(kernel: LoadedKernel, level: Level, kv_heads: int) -> CheckResult:
    """The gate of op store for a kernel on the GPU."""
    return check_store(runner(kernel), kernel.config.problem, device="cuda", level=level, kv_heads=kv_heads)
