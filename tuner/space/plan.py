"""Shared-memory plan and derived sizes of ``wph_decode``: computed once, read by the template and by the launcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tuner.space.core import Config, Joint
from tuner.space.regions import SHARED_START, Regions, arrange, round_up
from tuner.space.traits import GROUP_TOKENS, DecodeTraits

_LEAST_MERGE_BYTES = 16 * 1024
"""Shared memory that merging may take where staging is smaller."""


def _odd_chunks(size: int) -> int:
    """``size`` rounded up to an odd number of 16-byte chunks: rows this far apart start in different bank groups."""
    chunks = -(-size // 16)
    return 16 * (chunks | 1)


@dataclass(frozen=True)
class DecodePlan(DecodeTraits):
    """Sizes in bytes unless said otherwise; offsets count from the start of dynamic shared memory."""

    @property
    def token_alignment(self) -> int:
        """What the bytes between tokens must be a multiple of."""
        return 4 if self.whole_words else self.alignment

    @property
    def fills_before(self) -> bool:
        """The lookup table is filled while one warp reckons; else while tokens are on their way."""
        return self.prompt and self.dealt and self.lookup_bytes > 0

    @property
    def fills_by_others(self) -> bool:
        """The warps that do not reckon fill that table by themselves."""
        return self.fills_before and self.allots and self.config["warps"] > 1

    @property
    def fills_aside(self) -> bool:
        """The warps that have no row of the query to file fill the lookup table, where they are half and more."""
        idle = self.files_first and self.config["warps"] >= 2 * self.query_rows
        return bool(idle and self.lookup_bytes and not self.fills_before)

    @property
    def woven(self) -> bool:
        """The query lies between the entries of the lookup table."""
        return self.floats and not self.borrows

    @property
    def floats(self) -> bool:
        """The lookup table may lie anywhere: what reads it adds its address."""
        return self.query_gap > 0

    @property
    def query_gap(self) -> int:
        """Where in a woven lookup table its first gap begins, and with it a query that lies there; 0: no gaps."""
        return self.lookup_stride // 2 if self.config["lookup"] == "woven" else 0

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
        if self.bulk:
            slot = self.config.problem.layout.slot_bytes
            return GROUP_TOKENS * self.config["head_warps"] * slot * len(self.row_bytes)
        return GROUP_TOKENS * sum(self.row_pitches)

    @cached_property
    def teams(self) -> int:
        """Sets of warps that share staged tokens."""
        return self.token_warps if self.bulk else self.config["warps"] // self.config["dim_warps"]

    @cached_property
    def stage_bytes(self) -> int:
        return 0 if self.config["load"] == "direct" else self.tiles * self.group_bytes

    @cached_property
    def team_bytes(self) -> int:
        return self.stage_bytes * self.config["stages"]

    @cached_property
    def lookup_stride(self) -> int:
        """Bytes between entries of the pair table (every pair of indices to two halves); 0: no table.

        An entry is there once, or once per bank; 256 bytes apart, a byte that begins with two indices is byte 1 of its
        address.
        """
        strides = {"table": 4, "replicated": 128, "spread": 256, "woven": 256}
        codebook = self.config.problem.layout.format.key_codebook
        return strides.get(str(self.config["lookup"]), 0) if codebook else 0

    @property
    def lookup_entries(self) -> int:
        """Entries of the pair table: pairs of indices, or bytes that begin with one."""
        return 256 if self.lookup_stride == 256 else int(1 << 2 * self.config.problem.layout.format.key_bits)

    @cached_property
    def lookup_bytes(self) -> int:
        """Size of the pair table, a power of two; but where it is woven, it is aligned to a multiple of that."""
        return self.lookup_stride * self.lookup_entries

    shared_start = SHARED_START

    @cached_property
    def query_bytes(self) -> int:
        """Query fragments: per KV head, k-step and place of a query head in a tile four times four coefficients of four
        bytes, what halves hold of them and what they leave."""
        return self.config["head_warps"] * self.head_tiles * self.query_steps * self.tile_heads * 4 * 16

    @property
    def query_room(self) -> int:
        """What they take of a region of their own: nothing where a stage lends its place."""
        return 0 if self.borrows else self.query_bytes

    @cached_property
    def multiplier_bytes(self) -> int:
        return self.config["head_warps"] * self.head_tiles * 8 * 4

    @cached_property
    def exchange_floats(self) -> int:
        """Partial scores and squared lengths that a warp hands to the other slices of its tokens."""
        if self.config["dim_warps"] == 1:
            return 0
        per_lane = 2 * self.lane_heads * (2 if self.outlier_steps else 1) + 2
        return 32 * self.tiles * per_lane

    @cached_property
    def exchange_bytes(self) -> int:
        return 2 * self.config["warps"] * self.exchange_floats * 4

    @cached_property
    def partial_row_floats(self) -> int:
        """A row of partial sums in global memory, in whole 16 bytes."""
        return round_up(self.total_dims, 4)

    @cached_property
    def merge_pitch(self) -> int:
        """Floats between rows where the sums of warps meet, and those of a cluster, with maxima behind them: rows of
        four heads start in different banks."""
        return self.partial_row_floats + 4

    @cached_property
    def stripe_bytes(self) -> int:
        """fp32 sums of one token stripe: every query head of the CTA."""
        return self.query_rows * self.merge_pitch * 4

    @cached_property
    def merge_stripes(self) -> int:
        """Token stripes that find room side by side when staging becomes merge buffer and inbox, a power of two."""
        room = max(self.staging_bytes, _LEAST_MERGE_BYTES) - self.inbox_bytes
        stripes = self.token_warps
        while stripes > 1 and stripes * self.stripe_bytes > room:
            stripes //= 2
        return stripes

    @cached_property
    def staging_bytes(self) -> int:
        """All stages of all teams."""
        return self.teams * self.team_bytes

    @cached_property
    def stats_bytes(self) -> int:
        """Maximum, sum and zero-point sum per head and token stripe."""
        return self.config["head_warps"] * self.token_warps * self.head_tiles * 8 * 3 * 4

    @cached_property
    def barrier_bytes(self) -> int:
        return 16 * self.teams * self.config["stages"] if self.bulk else 0

    @cached_property
    def stage_count(self) -> int:
        return 0 if self.config["load"] == "direct" else self.teams * self.config["stages"]

    @cached_property
    def inbox_bytes(self) -> int:
        """Rows that a CTA adds up, from each of the cluster."""
        rows = -(-self.query_rows // self.cluster) * self.cluster
        return 4 * rows * self.merge_pitch if self.pushes else 0

    @property
    def inbox_offset(self) -> int:
        return self.offsets["merge"] + self.merge_stripes * self.stripe_bytes

    @cached_property
    def merge_bytes(self) -> int:
        """Where the warps' sums meet, and behind it the cluster's."""
        return self.merge_stripes * self.stripe_bytes + self.inbox_bytes

    @cached_property
    def queue_bytes(self) -> int:
        return 0 if self.config["schedule"] == "grid" else 32 if self.dealt else 16

    @cached_property
    def regions(self) -> Regions:
        return Regions(*(getattr(self, name) for name in Regions._fields))

    @property
    def offsets(self) -> Mapping[str, int]:
        return arrange(self.regions)

    @property
    def stages_split(self) -> bool:
        """Some stages lie before the lookup table, the others behind it."""
        return 0 < self.offsets["stages_before"] < self.stage_count

    @property
    def shared_bytes(self) -> int:
        return self.offsets["end"]


_REGIONS = Joint(DecodePlan, Regions._fields)


def shared_bytes(config: Config) -> int:
    """What ``DecodePlan(config).shared_bytes`` is, in a way that lets a census arrange equal regions once."""
    return arrange(Regions(*config.of(_REGIONS)))["end"]
