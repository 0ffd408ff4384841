"""vLLM's TurboQuant backend with the decode and the store seam replaced. vLLM imports this module by name.

Only ``_decode_attention``, the decode call that continuation prefill makes for small chunks, and ``_store_kv`` (if it
is as ``seams.json`` records) try our kernels; everything else, and every call that we cannot serve, is vLLM's own code.
Nothing of ours but this file is needed for that.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import turboquant_attn as upstream

_LOGGER = logging.getLogger("vllm.plugins.wph")


class WphTurboQuantBackend(upstream.TurboQuantAttentionBackend):
    """Keeps upstream's name, cache shape and rules; hands out our implementation and builder."""

    @staticmethod
    def get_impl_cls() -> type[WphTurboQuantImpl]:
        return WphTurboQuantImpl

    @staticmethod
    def get_builder_cls() -> type[WphTurboQuantMetadataBuilder]:
        return WphTurboQuantMetadataBuilder


class WphTurboQuantMetadataBuilder(upstream.TurboQuantMetadataBuilder):
    """Declares what decode graphs can do, and loads kernels before the first of them is captured."""

    # Upstream claims graphs for any uniform query length, but its prefill path reads lengths on the host: with
    # speculative decoding a captured graph would replay stale ones. Single-token decode is what is safe.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        start = time.perf_counter()
        try:
            from tuner.vllm.startup import prepare

            prepare(layer_names, vllm_config, device)
        except Exception as error:
            upstream_only(f"start-up failed: {type(error).__name__}: {error}")
        try:
            from tuner.vllm.store import prepare_stores

            prepare_stores(layer_names, vllm_config, device)
        except Exception as error:
            upstream_only(f"{type(error).__name__}: {error}", "store kernels")
        if os.environ.get("WPH_LOG", "").lower() == "debug":
            seconds = time.perf_counter() - start
            _LOGGER.info("wph: kernels of %d layers verified and loaded in %.2f s", len(layer_names), seconds)


class WphTurboQuantImpl(upstream.TurboQuantAttentionImpl):
    """One layer. ``wph_layer`` is None where our part could not even be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wph_layer: Any = None
        try:
            from tuner.vllm.eligible import layer_facts
            from tuner.vllm.layer import Layer

            bound = inspect.signature(upstream.TurboQuantAttentionImpl.__init__).bind(self, *args, **kwargs)
            self.wph_layer = Layer(layer_facts(bound.arguments))
            if getattr(self, "_soa_store", False):
                self.wph_layer.reason = "the cache is kept in AMD's layout"
        except Exception as error:
            upstream_only(f"{type(error).__name__}: {error}")
        self.wph_store: Any = None
        try:
            self.wph_store = _store_layer(self)
        except Exception as error:
            upstream_only(f"{type(error).__name__}: {error}", "store kernels")

    def _store_kv(self, *args: Any, **kwargs: Any) -> None:
        # Whatever upstream's seam takes passes through; ``wph_store`` is there only where it is the recorded one.
        if self.wph_store is not None:
            call = dict(zip(("key", "value", "kv_cache", "slot_mapping", "layer"), args, strict=False)) | kwargs
            centroids = getattr(call.pop("layer"), "_tq_centroids", None)
            if self.wph_store.store(**call, centroids=centroids):
                return
        super()._store_kv(*args, **kwargs)

    def _decode_attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        Pi: torch.Tensor,  # noqa: N803 (upstream's name)
        centroids: torch.Tensor,
        PiT: torch.Tensor | None = None,  # noqa: N803
        layer: Any = None,
    ) -> torch.Tensor:
        if self.wph_layer is not None:
            out = self.wph_layer.decode(
                query,
                kv_cache,
                attn_metadata.block_table,
                attn_metadata.seq_lens,
                centroids,
                attn_metadata.max_seq_len,
                _tokens(attn_metadata, query.shape[0]),
            )
            if out is not None:
                return out
        return super()._decode_attention(query, kv_cache, attn_metadata, Pi, centroids, PiT, layer)

    def _prefill_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        Pi: torch.Tensor,  # noqa: N803
        centroids: torch.Tensor,
        PiT: torch.Tensor | None = None,  # noqa: N803
        layer: Any = None,
    ) -> torch.Tensor:
        token = _prefilling.set((self.wph_layer, attn_metadata.max_seq_len))
        try:
            return super()._prefill_attention(
                query, key, value, kv_cache, attn_metadata, Pi, centroids, PiT, layer=layer
            )
        finally:
            _prefilling.reset(token)


def _tokens(attn_metadata: Any, batch: int) -> int | None:
    """Tokens of the first ``batch`` requests together, where vLLM left their lengths on the host; a step's layers share
    the metadata, and so the sum. Never raises."""
    try:
        lengths = getattr(attn_metadata, "seq_lens_cpu", None)
        if not isinstance(lengths, torch.Tensor) or lengths.device.type != "cpu":
            return None
        known = getattr(attn_metadata, "wph_tokens", None)
        if known is None or known[0] != batch:
            known = (batch, int(lengths[:batch].sum()))
            with suppress(Exception):  # metadata may take no notes
                attn_metadata.wph_tokens = known
        return int(known[1])
    except Exception:
        return None


def _store_layer(impl: WphTurboQuantImpl) -> Any:
    """The layer's store; None where upstream's seam is not the recorded one, or the cache is in AMD's layout."""
    from tuner.vllm import seam
    from tuner.vllm.store import StoreLayer

    upstream_store = getattr(upstream.TurboQuantAttentionImpl, "_store_kv", None)
    if upstream_store is None or list(inspect.signature(upstream_store).parameters) != seam.facts()["store"]:
        return None
    if getattr(impl, "_soa_store", False) or impl.wph_layer is None:
        return None
    facts = impl.wph_layer.facts
    return StoreLayer(facts.head_dim, facts.kv_heads, facts.cache_format)


_prefilling: ContextVar[tuple[Any, int] | None] = ContextVar("_prefilling", default=None)
"""The layer whose prefill is running, and the longest request of its batch."""
_upstream_decode = upstream.triton_turboquant_decode_attention


def _continuation_decode(**call: Any) -> torch.Tensor:
    """Stands in for the module global that upstream calls; every call from elsewhere passes through."""
    current = _prefilling.get()
    if current is not None and current[0] is not None:
        layer, context = current
        out = layer.decode(
            call["query"], call["kv_cache"], call["block_table"], call["seq_lens"], call["centroids"], context
        )
        if out is not None:
            return out
    return _upstream_decode(**call)


def hook() -> None:
    """Routes the continuation call through us."""
    upstream.triton_turboquant_decode_attention = _continuation_decode


def unhook() -> None:
    """Restores what ``hook`` replaced."""
    upstream.triton_turboquant_decode_attention = _upstream_decode


_said: set[tuple[str, str]] = set()


def upstream_only(reason: str, what: str = "TurboQuant kernels") -> None:
    """Says once why vLLM's own kernels run, even where our own modules are what is broken."""
    if (reason, what) not in _said:
        _said.add((reason, what))
        _LOGGER.warning("wph: vLLM's own %s run: %s", what, reason)


hook()
