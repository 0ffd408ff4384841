"""Which caches a kernel can read: its way of loading wants a memory order and an alignment.

The caller's cache fixes both at run time, so this is no constraint of the space: whoever launches asks here and falls
back on plain loads (decode attention on ``space.decode_landmarks.direct_variant``, dequantisation on its default).
"""

from __future__ import annotations

from dataclasses import dataclass

from tuner.space import Config
from tuner.space.decode_landmarks import direct_variant
from tuner.space.plan import DecodePlan
from tuner.space.traits import GROUP_TOKENS


@dataclass(frozen=True)
class CacheOrder:
    """Where a cache lies: its first byte's address, strides in bytes (``plane`` 0 where K and V share a slot)."""

    address: int
    block: int
    plane: int
    token: int
    head: int
    block_size: int
    kv_heads: int

    @staticmethod
    def standard(config: Config, *, kv_heads: int, block_size: int = 16) -> CacheOrder:
        """A freshly allocated cache: heads within tokens within blocks, nothing between them."""
        layout = config.problem.layout
        token = kv_heads * layout.slot_bytes
        plane = block_size * token
        planes = layout.format.separate_planes
        return CacheOrder(0, plane * (1 + planes), plane * planes, token, layout.slot_bytes, block_size, kv_heads)

    @property
    def strides(self) -> tuple[int, ...]:
        """Everything that decides where a slot may start."""
        return self.address, self.block, self.plane, self.token, self.head


def refusal(config: Config, order: CacheOrder) -> str | None:
    """Why a decode kernel cannot read a cache of this ``order``, or None where it can."""
    if order.block_size % GROUP_TOKENS:
        return f"block size {order.block_size}: expected a multiple of {GROUP_TOKENS}"
    if DecodePlan(config).bulk:
        return _bulk_refusal(config, order)
    if GROUP_TOKENS * order.token >= 1 << 31:
        return f"tokens lie {order.token} bytes apart: expected a run of {GROUP_TOKENS} within 2 GiB"
    alignment = DecodePlan(config).alignment
    if any(stride % alignment for stride in order.strides):
        return f"slots are not aligned to {alignment} bytes"
    if config["load"] == "cp_async" and order.block % 16:
        return "blocks do not all start at the same offset from a multiple of 16 bytes (load=cp_async)"
    return None


def _bulk_refusal(config: Config, order: CacheOrder) -> str | None:
    """What one bulk copy moves must lie side by side and start at a multiple of 16 bytes: 16 tokens, or the CTA's heads
    of one token. Kernels that read whole words want tokens whole words apart."""
    heads, slot = config["head_warps"], config.problem.layout.slot_bytes
    if order.kv_heads % heads:
        return f"{order.kv_heads} KV heads do not divide into CTAs of {heads} (load={config['load']})"
    if config["load"] == "bulk_rows":
        if order.head != slot:
            return "heads of a token do not lie side by side (load=bulk_rows)"
        starts = (order.address, order.block, order.plane, order.token, heads * slot)
        return "tokens are not aligned to 16 bytes (load=bulk_rows)" if any(s % 16 for s in starts) else None
    head_major = order.token == slot
    token_major = order.head == slot and order.token == heads * slot
    if not head_major and not token_major:
        return f"{heads} heads of a token are not all that lies between tokens (load=bulk)"
    if order.token % DecodePlan(config).token_alignment:
        return f"tokens lie {order.token} bytes apart: expected whole words (words={config['words']})"
    starts = (order.address, order.block, order.plane, GROUP_TOKENS * order.token, order.head if head_major else 0)
    if any(start % 16 for start in starts):
        return "pages are not aligned to 16 bytes (load=bulk)"
    return None


def comes_piecemeal(config: Config, order: CacheOrder) -> bool:
    """Whether a kernel of op dequant wants bulk copies where they cannot bring its slots.

    It then fetches them piece by piece: rightly, but slower than with plain loads.
    """
    slot = config.problem.layout.slot_bytes
    side_by_side = order.head == slot and order.token == order.kv_heads * slot
    aligned = not any(start % 16 for start in (order.address, order.block, order.plane))
    return config["load"] == "bulk" and not (side_by_side and aligned)


def reads_head_major(config: Config) -> bool:
    """Whether the kernel reads caches in which a head's tokens lie side by side, pages being aligned."""
    return config["load"] != "bulk_rows" and not DecodePlan(config).whole_words


def suited(config: Config, order: CacheOrder) -> Config:
    """``config``, or its variant with plain loads where it cannot read the cache."""
    return config if refusal(config, order) is None else direct_variant(config)
