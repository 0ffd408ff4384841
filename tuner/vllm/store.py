"""One layer's store at run time: new keys and values to the compressed cache, or back to vLLM's own launches.

Only a table's kernels run here: a store without one stays vLLM's, and so does every store with ``WPH_STORE=0``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tuner.arguments import store_params
from tuner.errors import TunerError, UsageError
from tuner.formats import VLLM_PRESETS
from tuner.launch import LoadedKernel, store_launches
from tuner.space.core import Problem
from tuner.table import Table, find, lookup
from tuner.targets import Target
from tuner.vllm import log
from tuner.vllm.dispatch import Loader, load_table, loading_on
from tuner.vllm.prepared import Launches, Prepared


class StoreDispatch:
    """The kernels of one store problem on one device, verified and loaded at once; ``reason`` says why there are none.

    A table that is damaged, for another arch, or with cubins that are not what it names leaves the store to vLLM.
    """

    def __init__(self, problem: Problem, kv_heads: int, target: Target, load: Loader) -> None:
        """``target`` is the device, with its own name; ``load`` makes verified cubins ready to launch on it."""
        self.problem, self.kv_heads = problem, kv_heads
        self.table: Table | None = None
        self._kernels: dict[str, LoadedKernel] = {}
        self.reason = self._load(target, load)

    def choose(self, tokens: int) -> LoadedKernel | None:
        """The table's kernel for a call of ``tokens`` tokens; None where it has none so far from what was timed."""
        choice = lookup(self.table, tokens, kv_heads=self.kv_heads) if self.table is not None else None
        return None if choice is None else self._kernels[choice.kernel]

    def _load(self, target: Target, load: Loader) -> str | None:
        try:
            path = find(self.problem, target.device_name)
            if path is None:
                return f"no table for {target.device_name} (python tune.py --op store ..., then install)"
            self.table, self._kernels = load_table(path, self.problem, target.arch, load)
        except Exception as error:  # whatever a file or the driver may do, vLLM must go on with its own store
            reason = str(error) if isinstance(error, TunerError) else f"{type(error).__name__}: {error}"
            log.warn(f"store of {self.problem.cache_format} at head dim {self.problem.head_dim}: vLLM's runs: {reason}")
            return reason
        return None


class StoreLayer:
    """One layer. ``reason`` says why vLLM's store runs for it; None while ours may."""

    def __init__(self, head_dim: int, kv_heads: int, cache_format: str) -> None:
        self.kv_heads = kv_heads
        self.dispatch: StoreDispatch | None = None
        self.problem: Problem | None = None
        self.reason: str | None = None
        self._launches = Launches()
        if os.environ.get("WPH_STORE") == "0":
            self.reason = "WPH_STORE is 0"
            return
        if cache_format not in VLLM_PRESETS:
            self.reason = f"no store for cache format {cache_format}: expected {', '.join(VLLM_PRESETS)}"
            return
        try:
            self.problem = Problem("store", head_dim, 1, cache_format)
        except UsageError as error:
            self.reason = str(error)

    def prepare(self, device: torch.device) -> None:
        """Verifies and loads this layer's kernels, before graphs are captured. Never raises."""
        if self.reason is not None or self.dispatch is not None or self.problem is None:
            return
        try:
            index = torch.cuda.current_device() if device.index is None else device.index
            self.dispatch = store_dispatch_for(self.problem, self.kv_heads, index)
        except Exception as error:
            self.give_up(error)
            return
        self.reason = self.dispatch.reason

    def give_up(self, error: Exception) -> None:
        """From here on vLLM's store runs for this layer."""
        self.reason = f"{type(error).__name__}: {error}"
        log.warn(f"store: vLLM's runs from here on: {self.reason}")

    def store(
        self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, centroids: Tensor | None
    ) -> bool:
        """Writes ``key``, ``value`` [N, Hk, D] to the slots ``slot_mapping`` [N]; False: vLLM's store must run.

        Nothing was written then. Never raises.
        """
        if self.reason is not None or centroids is None:
            return False
        try:
            return self._store(key, value, kv_cache, slot_mapping, centroids)
        except Exception as error:
            self.give_up(error)
            return False

    def _store(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, centroids: Tensor) -> bool:
        if key.device.type != "cuda" or slot_mapping.shape[0] == 0:
            return False
        dispatch = self.dispatch
        if dispatch is None:  # start-up did not come this far, and said so
            return False
        kernel = dispatch.choose(slot_mapping.shape[0])
        if kernel is None:
            tokens, what = slot_mapping.shape[0], f"store of {dispatch.problem.cache_format}"
            log.say(f"{what}: vLLM's runs far from the tokens that were timed, first for {tokens}", about=what)
            return False
        prepared = self._prepared_for(kernel, key, value, kv_cache, slot_mapping, centroids)
        prepared.launch(key=key, value=value, kv_cache=kv_cache, slot_mapping=slot_mapping)
        return True

    def _prepared_for(
        self,
        kernel: LoadedKernel,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        centroids: Tensor,
    ) -> Prepared:
        identity = (
            id(kernel), key.shape, key.stride(), key.dtype, value.shape, value.stride(), value.dtype, kv_cache.shape,
            kv_cache.stride(), kv_cache.dtype, slot_mapping.shape, slot_mapping.stride(), slot_mapping.dtype,
            centroids.data_ptr(),
        )  # fmt: skip

        def prepare() -> Prepared:
            assert self.problem is not None
            tensors = (kv_cache, key, value, slot_mapping)
            params, _ = store_params(*tensors, cache_format=self.problem.cache_format, centroids=centroids)
            return Prepared(kernel, store_launches(kernel.config, kv_cache, slot_mapping), params, (centroids,))

        return self._launches.get(identity, prepare)


def prepare_stores(layer_names: Sequence[str], vllm_config: Any, device: torch.device) -> None:
    """Prepares the stores of one KV-cache group and says what runs. Never raises."""
    context = vllm_config.compilation_config.static_forward_context
    impls = [getattr(context.get(name), "impl", None) for name in layer_names]
    stores = [s for s in (getattr(impl, "wph_store", None) for impl in impls) if isinstance(s, StoreLayer)]
    counts: dict[str, int] = {}
    for store in stores:
        store.prepare(device)
        table = store.dispatch.table if store.dispatch is not None else None
        runs = f"vLLM's: {store.reason}" if table is None else f"table of {table.device.name} ({table.evidence})"
        counts[runs] = counts.get(runs, 0) + 1
    for runs, count in counts.items():
        log.say(f"store of {count} layer{'s' * (count > 1)}: {runs}")


@cache
def store_dispatch_for(problem: Problem, kv_heads: int, device: int) -> StoreDispatch:
    """One per process, shared by all layers with that problem. Raises UsageError on a GPU without facts."""
    return StoreDispatch(problem, kv_heads, *loading_on(device))
