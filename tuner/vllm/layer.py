"""One attention layer at run time: decides, launches, and hands back to vLLM's kernel whatever it cannot do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tuner.arguments import decode_params
from tuner.geometry import decode_scratch
from tuner.launch import cache_order, decode_launches
from tuner.vllm import log
from tuner.vllm.dispatch import Chosen, Dispatch, dispatch_for
from tuner.vllm.eligible import LayerFacts, objection
from tuner.vllm.prepared import Launches, Prepared
from tuner.vllm.scratch import Scratch, scratch_for
from tuner.vllm.timing import Timings

_ALIGNMENT = 256


class Layer:
    """``facts`` as vLLM built the layer. ``reason`` says why vLLM's kernel runs it; None while ours may."""

    def __init__(self, facts: LayerFacts) -> None:
        self.facts = facts
        self.name = "?"
        self.reason = objection(facts)
        self.dispatch: Dispatch | None = None
        self._scratch: Scratch | None = None
        self._max_context = 0
        self._launches = Launches()

    def prepare(self, device: torch.device, name: str = "?", max_context: int = 0) -> None:
        """Verifies and loads this layer's kernels; ``max_context`` 0: as far as the block table reaches.

        Never raises.
        """
        self.name, self._max_context = name, max_context
        if self.reason is not None or self.dispatch is not None:
            return
        try:
            index = torch.cuda.current_device() if device.index is None else device.index
            dispatch = dispatch_for(self.facts.problem, self.facts.kv_heads, index)
            self._scratch = scratch_for(torch.device("cuda", index))
        except Exception as error:
            self.give_up(error)
            return
        self.dispatch = dispatch
        if not dispatch.usable:
            self.reason = dispatch.problem_found

    def reserve(self, rows: int, dtype: torch.dtype) -> None:
        """Makes room for calls of up to ``rows`` rows; after ``prepare`` and before capture. Never raises."""
        if self.reason is not None or self.dispatch is None or self._scratch is None:
            return
        try:
            floats, counters = self.dispatch.requirement(rows, self._max_context)
            shape = (rows, self.facts.q_heads, self.facts.head_dim)
            self._scratch.reserve(floats, counters, shape, dtype)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """From here on vLLM's kernel runs this layer."""
        self.reason = f"{type(error).__name__}: {error}"
        log.warn(f"{self.facts.describe()}: vLLM's kernel runs from here on: {self.reason}")

    def decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        centroids: Tensor,
        context: int | None,
        tokens: int | None = None,
    ) -> Tensor | None:
        """Attention of ``query`` [B, Hq, D] over the cache, valid until the next call; None: vLLM's kernel must run.

        ``context``: the longest request as the host knows it, an upper bound will do without ``tokens``,
        those of all requests together. Never raises.
        """
        if self.reason is not None:
            return None
        try:
            return self._decode(query, kv_cache, block_table, seq_lens, centroids, context, tokens)
        except Exception as error:
            self.give_up(error)
            return None

    def _decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        centroids: Tensor,
        context: int | None,
        tokens: int | None,
    ) -> Tensor | None:
        batch = query.shape[0]
        if batch == 0 or query.device.type != "cuda" or min(seq_lens.shape[0], block_table.shape[0]) < batch:
            return None
        dispatch, scratch = self.dispatch, self._scratch
        if dispatch is None or scratch is None:  # start-up did not come this far, and said so
            return None
        capturing = torch.cuda.is_current_stream_capturing()
        order = cache_order(kv_cache)
        # Layers share choices: only the alignment of a cache matters to them, not where it lies.
        order = replace(order, address=order.address % _ALIGNMENT)
        longest = self._max_context or block_table.shape[1] * kv_cache.shape[1]
        chosen = dispatch.choose(batch, None if capturing else context or None, longest, order, tokens)
        if isinstance(chosen, str):
            shape = self.facts.describe()
            log.say(f"{shape}: vLLM's kernel runs for some batches, first for {batch}: {chosen}", about=shape)
            return None
        if log.is_debug():
            log.debug(f"{self.name}: batch {batch}{' in a graph' if capturing else ''}: {chosen.origin}")
        need = decode_scratch(chosen.kernel.config, batch=batch, kv_heads=self.facts.kv_heads, splits=chosen.splits)
        counters = scratch.counters(need.counters)
        partials, out = scratch.take(need.partial_floats, (batch, query.shape[1], query.shape[2]), query.dtype)
        seq_lens, block_table = seq_lens[:batch], block_table[:batch]
        key = (
            id(chosen.kernel), chosen.splits, query.shape, query.stride(), query.dtype, order,
            block_table.shape, block_table.stride(), block_table.dtype, seq_lens.dtype, centroids.data_ptr(),
        )  # fmt: skip
        prepared = self._launches.get(
            key,
            lambda: self._prepare_launch(
                chosen, (query, kv_cache, block_table, seq_lens, out), partials, counters, centroids
            ),
        )
        with TIMINGS.call(self.facts, batch, capturing):
            prepared.launch(
                query=query, kv_cache=kv_cache, block_table=block_table, seq_lens=seq_lens, out=out,
                partials=partials, counters=counters,
            )  # fmt: skip
        return out

    def _prepare_launch(
        self, chosen: Chosen, tensors: tuple[Tensor, ...], partials: Tensor, counters: Tensor, centroids: Tensor
    ) -> Prepared:
        query, kv_cache, block_table, seq_lens, out = tensors
        params, _ = decode_params(
            query,
            kv_cache,
            block_table,
            seq_lens,
            out,
            cache_format=self.facts.cache_format,
            scale=self.facts.scale,
            splits=chosen.splits,
            partials=partials,
            counters=counters,
            centroids=centroids,
        )
        launches = decode_launches(chosen.kernel.config, query, kv_cache, chosen.splits)
        return Prepared(chosen.kernel, launches, params, (centroids,))


TIMINGS = Timings.from_environment()
