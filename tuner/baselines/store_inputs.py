"""What a store runs on: the rows of one call, the cache that they go to, and where in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.formats import SlotLayout
from tuner.space.core import Problem

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoreInputs:
    """One store, as the public API takes it.

    ``key``, ``value`` [N, Hk, D] bf16 or fp16; ``kv_cache`` uint8 [blocks, block_size, Hk, slot] ([blocks, 2, ...] for
    formats with separate planes), last stride 1; ``slot_mapping`` int32 or int64 [N]; ``codec`` the per-layer
    constants (``reference.Codec``).
    """

    key: Tensor
    value: Tensor
    kv_cache: Tensor
    slot_mapping: Tensor
    codec: Any

    @property
    def layout(self) -> SlotLayout:
        layout: SlotLayout = self.codec.layout
        return layout

    @property
    def problem(self) -> Problem:
        return Problem("store", self.layout.head_dim, 1, self.layout.format.name)
