"""Shared-memory plan and derived sizes of ``wph_decode``: computed once, read by the template and by the launcher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tuner.space.core import Config

GROUP_TOKENS = 16
"""Tokens of one page that are copied and multiplied together (the M of mma.m16n8k16)."""

_GRID_FACTOR = {3: 1.2606987953186035, 4: 1.7335957288742065}
"""Per index width, what brings all Lloyd-Max levels of N(0, 1) closest to halves (relative error of the set: 6e-6 for
3 bits, 2.7e-5 for 4, against 1.7e-4 unscaled). Found by trying every multiple of 2^-24 from 1 to 2."""


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _odd_chunks(size: int) -> int:
    """``size`` rounded up to an odd number of 16-byte chunks: rows this far apart start in different bank groups."""
    chunks = -(-size // 16)
    return 16 * (chunks | 1)


@dataclass(frozen=True)
class DecodePlan:
    """Sizes in bytes unless said otherwise; offsets count from the start of dynamic shared memory."""

    config: Config

    @cached_property
    def token_warps(self) -> int:
        return self.config["warps"] // (self.config["head_warps"] * self.config["dim_warps"])

    @cached_property
    def tiles(self) -> int:
        """Groups of 16 tokens that a warp takes per step."""
        return self.config["tokens"] // GROUP_TOKENS

    @cached_property
    def head_tiles(self) -> int:
        """Tiles of eight query heads."""
        return -(-self.config.problem.gqa // 8)

    @cached_property
    def slice_dims(self) -> int:
        """Coefficients that one warp handles."""
        return self.config.problem.layout.block_d // self.config["dim_warps"]

    @cached_property
    def outlier_steps(self) -> int:
        """Extra k-steps of 16 for the channels kept in bf16."""
        return -(-self.config.problem.layout.outliers // 16)

    @cached_property
    def key_steps(self) -> int:
        """k-steps of 16 coefficients per slice."""
        return self.slice_dims // 16

    @cached_property
    def query_steps(self) -> int:
        """k-steps stored per KV head: every slice's, then the outliers'."""
        return self.config.problem.layout.block_d // 16 + self.outlier_steps

    @cached_property
    def alignment(self) -> int:
        """Bytes to which slots are aligned once they are in shared memory (2 or 4)."""
        return 4 if self.config.problem.layout.slot_bytes % 4 == 0 and self.config["load"] != "direct" else 2

    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes that are copied per token and head: one slot, or a key row and a value row."""
        layout = self.config.problem.layout
        if layout.format.separate_planes:
            return (layout.key.size, layout.value.size)
        return (layout.slot_bytes,)

    @cached_property
    def row_chunks(self) -> tuple[int, ...]:
        """16-byte chunks that cover such a row wherever it starts."""
        return tuple(-(-(size + 16 - self.alignment) // 16) for size in self.row_bytes)

    @cached_property
    def row_pitches(self) -> tuple[int, ...]:
        """Distance between rows in shared memory after asynchronous copies."""
        return tuple(_odd_chunks(16 * chunks) for chunks in self.row_chunks)

    @cached_property
    def group_bytes(self) -> int:
        """Shared memory of one group of 16 tokens for the warps that share it."""
        if self.config["load"] == "bulk":
            slot = self.config.problem.layout.slot_bytes
            return GROUP_TOKENS * self.config["head_warps"] * slot * len(self.row_bytes)
        return GROUP_TOKENS * sum(self.row_pitches)

    @cached_property
    def teams(self) -> int:
        """Sets of warps that share staged tokens."""
        return self.token_warps if self.config["load"] == "bulk" else self.config["warps"] // self.config["dim_warps"]

    @cached_property
    def stage_bytes(self) -> int:
        return 0 if self.config["load"] == "direct" else self.tiles * self.group_bytes

    @cached_property
    def team_bytes(self) -> int:
        return self.stage_bytes * self.config["stages"]

    @cached_property
    def lookup_bytes(self) -> int:
        """Pair table: every pair of indices to two halves, once or once per bank."""
        fmt = self.config.problem.layout.format
        if not fmt.key_codebook or self.config["lookup"] not in ("table", "replicated"):
            return 0
        entries = 1 << (2 * fmt.key_bits)
        return 4 * entries * (32 if self.config["lookup"] == "replicated" else 1)

    @cached_property
    def query_bytes(self) -> int:
        """Query fragments: per KV head, head tile, k-step and lane four coefficients of four bytes."""
        return self.config["head_warps"] * self.head_tiles * self.query_steps * 32 * 16

    @cached_property
    def multiplier_bytes(self) -> int:
        return self.config["head_warps"] * self.head_tiles * 8 * 4

    @cached_property
    def level_scale(self) -> float:
        """Codebook levels are multiplied by this before they become halves; the kernel divides it out again."""
        layout = self.config.problem.layout
        return _GRID_FACTOR[layout.key.bits] * layout.block_d**0.5 if layout.format.key_codebook else 1.0

    @cached_property
    def exchange_floats(self) -> int:
        """Partial scores and squared lengths that a warp hands to the other slices of its tokens."""
        if self.config["dim_warps"] == 1:
            return 0
        heads = 4 * self.head_tiles if self.config["math"] == "mma" else 2 * self.config.problem.gqa
        per_lane = heads * (2 if self.outlier_steps else 1) + 2
        return 32 * self.tiles * per_lane

    @cached_property
    def exchange_bytes(self) -> int:
        return 2 * self.config["warps"] * self.exchange_floats * 4

    @cached_property
    def total_dims(self) -> int:
        """Accumulated values per query head: coefficients, then outliers."""
        layout = self.config.problem.layout
        return layout.block_d + layout.outliers

    @cached_property
    def merge_bytes(self) -> int:
        """fp32 result of a CTA's heads, where the warps' partial results are added."""
        return self.config["head_warps"] * self.config.problem.gqa * self.total_dims * 4

    @cached_property
    def stats_bytes(self) -> int:
        """Maximum, sum and zero-point sum per head and token stripe."""
        return self.config["head_warps"] * self.token_warps * self.head_tiles * 8 * 3 * 4

    @cached_property
    def barrier_bytes(self) -> int:
        return 16 * self.teams * self.config["stages"] if self.config["load"] == "bulk" else 0

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Start of each region. Staging is reused for merging once a work item's tokens are consumed."""
        regions = (
            ("staging", max(self.teams * self.team_bytes + 16, self.merge_bytes)),
            ("lookup", self.lookup_bytes),
            ("query", self.query_bytes),
            ("multiplier", self.multiplier_bytes),
            ("exchange", self.exchange_bytes),
            ("stats", self.stats_bytes),
            ("barriers", self.barrier_bytes),
            ("flag", 16),
        )
        offsets, at = {}, 0
        for name, size in regions:
            offsets[name] = at
            at += _round_up(size, 128)
        offsets["end"] = at
        return offsets

    @property
    def shared_bytes(self) -> int:
        return self.offsets["end"]
