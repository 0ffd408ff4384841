"""Caches at places that no allocator would choose."""

from __future__ import annotations

import torch


def restride(
    cache: torch.Tensor, *, fill: int, base: int, head_gap: int = 0, token_gap: int = 0, block_gap: int = 0
) -> torch.Tensor:
    """``cache`` again, on its device, with ``base`` bytes before it and gaps in it, all of value ``fill``; uint8.

    The storage ends with the last slot's last byte.
    """
    sizes = cache.shape
    *planes, tokens, heads, slot = sizes[1:]
    head_stride = slot + head_gap
    token_stride = heads * head_stride + token_gap
    plane_stride = tokens * token_stride
    block_stride = (planes[0] if planes else 1) * plane_stride + block_gap
    strides = (block_stride, *([plane_stride] if planes else []), token_stride, head_stride, 1)
    end = base + 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    storage = torch.full((end,), fill, dtype=torch.uint8, device=cache.device)
    return storage.as_strided(sizes, strides, base).copy_(cache)
