"""What a layer asks of a decode kernel, and why ours may not serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuner.errors import UsageError
from tuner.formats import VLLM_PRESETS
from tuner.space.core import Problem


@dataclass(frozen=True)
class LayerFacts:
    """One attention layer as vLLM constructs it; heads are those of this rank. ``scale`` multiplies the scores.

    ``features``: what it wants beyond plain causal attention, in words ("sliding window of 1024").
    """

    head_dim: int
    q_heads: int
    kv_heads: int
    cache_format: str
    scale: float
    features: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        """Raises UsageError where no kernel exists for it."""
        if self.cache_format not in VLLM_PRESETS:
            raise UsageError(f"no kernel for cache format {self.cache_format}: expected {', '.join(VLLM_PRESETS)}")
        if self.kv_heads < 1 or self.q_heads % self.kv_heads:
            raise UsageError(f"{self.q_heads} query heads over {self.kv_heads} KV heads: expected a multiple")
        return Problem("decode", self.head_dim, self.q_heads // self.kv_heads, self.cache_format)

    def describe(self) -> str:
        return f"head dim {self.head_dim}, {self.q_heads}/{self.kv_heads} heads, {self.cache_format}"


def layer_facts(arguments: Mapping[str, Any]) -> LayerFacts:
    """Facts from the arguments of vLLM's implementation class, by name, ``kwargs`` among them."""
    extra = arguments.get("kwargs") or {}
    window = arguments.get("sliding_window")
    cap = arguments.get("logits_soft_cap")
    kind = getattr(arguments.get("attn_type"), "value", arguments.get("attn_type"))
    features = []
    if window is not None and window > 0:
        features.append(f"sliding window of {window}")
    if extra.get("sinks") is not None:
        features.append("attention sinks")
    if cap:
        features.append(f"soft-cap of {cap:g}")
    if arguments.get("alibi_slopes") is not None:
        features.append("ALiBi")
    if kind not in (None, "decoder"):
        features.append(f"attention type {kind}")
    if extra.get("chunk_lookback", -1) > -1:
        features.append("chunked attention")
    kv_heads = arguments.get("num_kv_heads")
    return LayerFacts(
        head_dim=arguments["head_size"],
        q_heads=arguments["num_heads"],
        kv_heads=arguments["num_heads"] if kv_heads is None else kv_heads,
        cache_format=arguments.get("kv_cache_dtype", "auto"),
        scale=float(arguments["scale"]),
        features=tuple(features),
    )


def objection(facts: LayerFacts) -> str | None:
    """Why no kernel of ours serves such a layer, None where one may."""
    if facts.features:
        return f"it has {' and '.join(facts.features)}"
    try:
        _ = facts.problem
    except UsageError as error:
        return str(error)
    return None
