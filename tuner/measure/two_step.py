"""The seed's way to attend: dequantise every cached row to bf16, then run attention over an uncompressed cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tuner.baselines import DecodeInputs, prepare
from tuner.errors import TunerError
from tuner.reference import Case


def dequantize_then_attend(
    dequantize: Callable[[], None], key: Tensor, value: Tensor, case: Case, attention: str
) -> Callable[[], Tensor]:
    """A call of both steps that returns out [B, Hq, D] and can be captured in a CUDA graph.

    ``dequantize`` writes all rows of ``case`` to ``key`` and ``value``, bf16 [B * max_blocks, block_size, Hk, D] in the
    order of the block table. ``attention``: sdpa_bf16, or a paged peer that reads those tensors in place. Requests
    must be of one length. Raises TunerError otherwise, or where the peer is not available.
    """
    if bool((case.seq_lens != case.seq_lens[0]).any()):
        raise TunerError("requests of different lengths: the seed's path is timed on batches of one length")
    attend = _sdpa(key, value, case) if attention == "sdpa_bf16" else _paged(key, value, case, attention)

    def run() -> Tensor:
        dequantize()
        return attend()

    return run


def _sdpa(key: Tensor, value: Tensor, case: Case) -> Callable[[], Tensor]:
    """torch's attention on views of the rows as [B, Hk, S, D]: a copy would not be what the first step wrote."""
    batch, length = len(case.seq_lens), int(case.seq_lens[0])
    k, v = (x.view(batch, -1, *x.shape[2:])[:, :length].transpose(1, 2) for x in (key, value))
    query = case.query.to(torch.bfloat16)[:, :, None, :]
    grouped = query.shape[1] > k.shape[1]

    def attend() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=case.scale, enable_gqa=grouped)
        return out[:, :, 0]

    return attend


def _paged(key: Tensor, value: Tensor, case: Case, attention: str) -> Callable[[], Tensor]:
    entries = torch.arange(case.block_table.numel(), dtype=torch.int32, device=key.device)
    table = entries.view(case.block_table.shape)
    inputs = DecodeInputs(
        case.query, case.kv_cache, table, case.seq_lens, case.scale, case.codec, lambda: (key, value)
    )
    return prepare(attention, inputs)
