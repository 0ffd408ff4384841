"""What a baseline runs on: the tensors of one decode step, and the constants of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.errors import UsageError
from tuner.formats import SlotLayout
from tuner.space.core import Problem

if TYPE_CHECKING:
    from torch import Tensor

Dense = Callable[[], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step, as the public API takes it.

    ``query`` [B, Hq, D] bf16 or fp16; ``kv_cache`` uint8 [blocks, block_size, Hk, slot], or
    [blocks, 2, block_size, Hk, slot] for formats with separate planes, last stride 1; ``block_table`` int32 or
    int64 [B, max_blocks]; ``seq_lens`` int32 [B]; ``codec`` the per-layer constants (``reference.Codec``: layout,
    centroids, signs, channels). ``dense`` makes the uncompressed cache of the bf16 peers: K and V, bf16
    [blocks, block_size, Hk, D] under the same block ids; without it they dequantise ``kv_cache`` themselves.
    """

    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    codec: Any
    dense: Dense | None = None

    @staticmethod
    def of(case: Any, dense: Dense | None = None) -> DecodeInputs:
        """The inputs of a ``reference.Case``."""
        return DecodeInputs(
            case.query, case.kv_cache, case.block_table, case.seq_lens, case.scale, case.codec, dense
        )

    @property
    def layout(self) -> SlotLayout:
        layout: SlotLayout = self.codec.layout
        return layout

    @property
    def kv_heads(self) -> int:
        return int(self.kv_cache.shape[-2])

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.kv_cache.shape[-3])

    @property
    def gqa(self) -> int:
        """Query heads per KV head."""
        return int(self.query.shape[1]) // self.kv_heads

    def problem(self, op: str) -> Problem:
        gqa = self.gqa if op == "decode" else 1
        return Problem(op, self.layout.head_dim, gqa, self.layout.format.name)

    def planes(self) -> tuple[Tensor, Tensor]:
        """The bytes that hold keys and those that hold values, both as views [blocks, block_size, Hk, slot]."""
        if self.layout.format.separate_planes:
            return self.kv_cache[:, 0], self.kv_cache[:, 1]
        return self.kv_cache, self.kv_cache[..., self.layout.value_offset :]


@dataclass(frozen=True)
class TritonConstants:
    """Constants of the Triton split-KV decode kernel.

    ``block_kv`` tokens per step; ``num_warps``, ``num_stages`` of stage 1; ``splits`` programs per request and
    query head; ``block_h`` query heads per program: 1 is one program per query head on CUDA cores, 16 serves a
    group at once on tensor cores (padded to 16 rows).
    """

    block_kv: int
    num_warps: int
    num_stages: int
    splits: int
    block_h: int = 1

    def refusal(self, problem: Problem) -> str | None:
        """Why these constants do not compile for ``problem``, or None where they do."""
        for name, values in TUNABLE["decode"].items():
            if getattr(self, name) not in values:
                return f"{name} cannot be {getattr(self, name)}: expected one of {', '.join(map(str, values))}"
        if problem.layout.format.separate_planes:
            return f"{problem.cache_format} is dequantised before attention: no fused Triton kernel"
        if self.block_h > 1 and self.block_kv < 16:
            return "block_h 16 needs block_kv of at least 16: the tokens are a tensor-core dimension"
        return None


@dataclass(frozen=True)
class DequantConstants:
    """Constants of the Triton dequantisation kernel: ``rows`` tokens per program, its warps and stages."""

    rows: int
    num_warps: int
    num_stages: int

    def refusal(self, problem: Problem) -> str | None:
        """Why these constants do not compile for ``problem``, or None where they do."""
        for name, values in TUNABLE["dequant"].items():
            if getattr(self, name) not in values:
                return f"{name} cannot be {getattr(self, name)}: expected one of {', '.join(map(str, values))}"
        return None


Constants = TritonConstants | DequantConstants

TUNABLE: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {
        "block_kv": (4, 8, 16, 32, 64),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3, 4),
        "splits": (8, 16, 32, 64),
        "block_h": (1, 16),
    },
    "dequant": {"rows": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8), "num_stages": (1, 2)},
}
"""Per op, the axes that the search may open."""

SHIPPED: dict[str, TritonConstants | DequantConstants] = {
    "decode": TritonConstants(block_kv=4, num_warps=1, num_stages=1, splits=32),
    "dequant": DequantConstants(rows=1, num_warps=4, num_stages=1),
}
"""Per op, the constants that are hard-coded upstream: vLLM's for decode, one row per program for dequantisation."""


def constants_for(op: str, constants: Constants | None, problem: Problem) -> Any:
    """``constants``, or the shipped ones of ``op``; raises UsageError where they cannot be compiled."""
    chosen = constants or SHIPPED[op]
    if type(chosen) is not type(SHIPPED[op]):
        raise UsageError(f"op {op} takes {type(SHIPPED[op]).__name__}, not {type(chosen).__name__}")
    reason = chosen.refusal(problem)
    if reason:
        raise UsageError(reason)
    return chosen
