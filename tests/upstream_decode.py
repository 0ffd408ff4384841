"""A pytest plugin (``-p tests.upstream_decode``) under which vLLM's own tests decode with our kernels.

It puts our layer behind the function that those tests call; a call that our kernels decline is a failure, not vLLM's.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
from vllm.v1.attention.ops import triton_turboquant_decode as ops

from tuner.vllm.eligible import LayerFacts
from tuner.vllm.layer import Layer

served: list[str] = []
"""Cache format of each call that our kernels ran."""


def preset_of(call: dict[str, Any], head_dim: int) -> str:
    """The cache format whose parameters a call of vLLM's decode function was given."""
    for name in TQ_PRESETS:
        config = TurboQuantConfig.from_cache_dtype(name, head_dim=head_dim)
        wanted = {
            "mse_bits": config.key_mse_bits,
            "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits,
            "key_fp8": config.key_fp8,
            "norm_correction": config.norm_correction,
        }
        if all(call[k] == v for k, v in wanted.items()):
            return name
    raise AssertionError(f"no preset has the parameters of this call: {call}")


def decode(**call: Any) -> Tensor:
    query, cache = call["query"], call["kv_cache"]
    preset = preset_of(call, query.shape[2])
    layer = Layer(LayerFacts(query.shape[2], query.shape[1], cache.shape[2], preset, call["scale"]))
    layer.prepare(query.device, "upstream")
    layer.reserve(query.shape[0], query.dtype)
    out = layer.decode(query, cache, call["block_table"], call["seq_lens"], call["centroids"], None)
    assert out is not None, layer.reason
    served.append(preset)
    return out


def pytest_configure(config: pytest.Config) -> None:
    ops.triton_turboquant_decode_attention = decode


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"decode calls that our kernels ran: {len(served)} ({', '.join(served)})")
