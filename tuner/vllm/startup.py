"""What happens once per worker, when vLLM builds its metadata builders: load, reserve, and say what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tuner.vllm import log
from tuner.vllm.layer import Layer
from tuner.vllm.summary import summary

_CONTINUATION_ROWS = 128
"""Query tokens of the longest chunk that upstream hands to the decode kernel."""


def prepare(layer_names: Sequence[str], vllm_config: Any, device: torch.device) -> None:
    """Prepares the layers of one KV-cache group for every batch that vLLM may run, before graphs are captured."""
    layers = _layers(layer_names, vllm_config)
    reason = _engine_objection(vllm_config)
    rows = max(vllm_config.scheduler_config.max_num_seqs, _CONTINUATION_ROWS)
    reserved = set()
    for name, layer in layers.items():
        if reason is not None:
            layer.reason = layer.reason or reason
        layer.prepare(device, name, vllm_config.model_config.max_model_len)
        if layer.facts not in reserved:
            layer.reserve(rows, vllm_config.model_config.dtype)
            reserved.add(layer.facts)
    for line in summary(layers, detail=log.is_debug()):
        log.say(line)


def _layers(layer_names: Sequence[str], vllm_config: Any) -> dict[str, Layer]:
    context = vllm_config.compilation_config.static_forward_context
    found = {}
    for name in layer_names:
        layer = getattr(getattr(context.get(name), "impl", None), "wph_layer", None)
        if isinstance(layer, Layer):
            found[name] = layer
    return found


def _engine_objection(vllm_config: Any) -> str | None:
    """Engine-wide reasons to leave everything to vLLM."""
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "sleep mode is on: it discards memory that our kernels' arrival counters live in"
    parallel = vllm_config.parallel_config
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        return "decode context parallelism shares a request among GPUs"
    return None
