"""Shared-memory plan and derived sizes of ``wph_decode``: computed once, read by the template and by the launcher."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tuner.space.core import Config, Joint
from tuner.space.regions import SHARED_START, Regions, arrange, round_up

GROUP_TOKENS = 16
"""Tokens of one page that are copied and multiplied together (the M of mma.m16n8k16)."""

_GRID_FACTOR = {3: 1.2606987953186035, 4: 1.7335957288742065}
"""Per index width, what brings all Lloyd-Max levels of N(0, 1) closest to halves (relative error of the set: 6e-6 for
3 bits, 2.7e-5 for 4, against 1.7e-4 unscaled). Found by trying every multiple of 2^-24 from 1 to 2."""

_SQUARE_MIDDLE = {3: 0.59765625, 4: 0.755859375}
"""Likewise what is subtracted from the squares of those levels before they are rounded to halves: of all multiples of
2^-8 what moves their sum over a row least (relative error at head dim 128: 9.6e-6 and 4.6e-6; without it 1.9e-5 and
2.3e-5)."""

_SM_REGISTERS = 65536
"""Of all targets."""

_LEAST_MERGE_BYTES = 16 * 1024
"""Shared memory that merging may take where staging is smaller."""


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
    def query_rows(self) -> int:
        """Query heads of a CTA."""
        return int(self.config["head_warps"] * self.config.problem.gqa)

    @cached_property
    def head_tiles(self) -> int:
        """Tiles of eight query heads."""
        return -(-self.config.problem.gqa // 8)

    @property
    def paired(self) -> bool:
        """Of up to four query heads what halves hold and what they leave lie side by side in one tile of eight."""
        return bool(self.config["query"] == "paired")

    @property
    def tile_heads(self) -> int:
        """Query heads of a tile."""
        return 4 if self.paired else 8

    @property
    def lane_heads(self) -> int:
        """Query heads whose softmax a lane follows."""
        if self.config["math"] != "mma":
            return self.config.problem.gqa
        return 1 if self.paired else 2 * self.head_tiles

    @property
    def adjacent(self) -> bool:
        """A lane's words of a row lie side by side, and tokens are dealt to rows so that lanes meet in fewer banks."""
        return self.config["words"] in ("adjacent", "whole_adjacent")

    @property
    def whole_words(self) -> bool:
        """Rows of 4-bit fields are read in whole words: one that begins in the middle of a word is taken from its first
        whole word on, its first two bytes last, which turns it by four coefficients."""
        return self.config["words"] in ("whole", "whole_adjacent")

    @property
    def token_alignment(self) -> int:
        """What the bytes between tokens must be a multiple of."""
        return 4 if self.whole_words else self.alignment

    @property
    def turns_keys(self) -> bool:
        return self.whole_words and self.config.problem.layout.key.bits == 4

    @property
    def apart(self) -> bool:
        """Tokens beyond a request are masked in a last step of its own."""
        return bool(self.config["tail"] == "apart")

    @property
    def prompt(self) -> bool:
        """What no length decides is asked for before any is known, and a warp's whole query before the tokens.
        Mbarriers are opened while that travels, by one lane of each warp, blocks' numbers wait as they were loaded,
        lanes that copy a token's row find out once where it starts, and no warp is idle where a lookup table is filled
        or a cluster's heads are added up."""
        return bool(self.config["beginning"] == "prompt")

    @property
    def fills_before(self) -> bool:
        """The lookup table is filled while one warp reckons; else while tokens are on their way."""
        return self.prompt and self.dealt and self.lookup_bytes > 0

    @property
    def files_first(self) -> bool:
        """The query is filed while the ids of blocks travel, not while tokens do: where every lane asks for tokens,
        asking takes as long as the first of them."""
        return self.prompt and self.config["load"] == "cp_async"

    @property
    def fills_aside(self) -> bool:
        """The warps that have no row of the query to file fill the lookup table, where they are half and more."""
        idle = self.files_first and self.config["warps"] >= 2 * self.query_rows
        return bool(idle and self.lookup_bytes and not self.fills_before)

    @property
    def asks_in_turn(self) -> bool:
        """Of the warps that share a stripe of tokens each asks for a step in turn: who asks waits for the slowest, and
        copies of single rows take long. Two warps gain nothing."""
        return self.prompt and self.bulk and int(self.config["head_warps"]) * int(self.config["dim_warps"]) > 2

    @property
    def shares(self) -> bool:
        """A persistent grid, whose CTAs take pieces of requests."""
        return self.config["schedule"] in ("share", "deal")

    @property
    def dealt(self) -> bool:
        """One warp finds the CTA's piece, and what has no tokens is seen to last."""
        return bool(self.config["schedule"] == "deal")

    @property
    def woven(self) -> bool:
        """The query lies between the entries of the lookup table."""
        return self.query_gap > 0

    @property
    def query_gap(self) -> int:
        """Where in a woven lookup table its first gap begins, and with it the query; 0: the query lies elsewhere."""
        return self.lookup_stride // 2 if self.config["lookup"] == "woven" else 0

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

    @property
    def bulk(self) -> bool:
        """Bulk copies, of all heads of 16 tokens (``load`` bulk) or of the CTA's heads token by token (bulk_rows)."""
        return self.config["load"] in ("bulk", "bulk_rows")

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

    @property
    def value_halves(self) -> bool:
        """3-bit values are read two bytes at a time: a lane's share of a row is a multiple of six bytes."""
        return self.config.problem.layout.value.bits == 3 and self.slice_dims >= 128

    shared_start = SHARED_START

    @cached_property
    def query_bytes(self) -> int:
        """Query fragments: per KV head, k-step and place of a query head in a tile four times four coefficients of four
        bytes, what halves hold of them and what they leave."""
        return self.config["head_warps"] * self.head_tiles * self.query_steps * self.tile_heads * 4 * 16

    @cached_property
    def multiplier_bytes(self) -> int:
        return self.config["head_warps"] * self.head_tiles * 8 * 4

    @cached_property
    def level_scale(self) -> float:
        """Codebook levels are multiplied by this before they become halves; the kernel divides it out again."""
        layout = self.config.problem.layout
        return _GRID_FACTOR[layout.key.bits] * layout.block_d**0.5 if layout.format.key_codebook else 1.0

    arrival_words = 4
    """Counters of a request and its CTAs' heads where ``reduction`` is "all"."""

    most_shares = 32
    """Contributors that add up a share each where ``reduction`` is "all": as many as a word has bits for."""

    patience = 40
    """Times that a contributor looks whether all have come before it leaves its share to the last one."""

    @property
    def sums_ahead(self) -> int:
        """Contributions to a row whose sums travel at a time: as many as half a warp's registers hold, 2 to 8."""
        threads = 32 * self.config["warps"] * self.config["min_ctas"]
        per_lane = self.config.problem.layout.block_d // 32
        return int(min(max(_SM_REGISTERS // threads // 2 // per_lane, 2), 8))

    branch = 8
    """Contributions to a request that one CTA adds up where ``reduction`` is "tree"."""

    @property
    def cluster(self) -> int:
        """CTAs that add up what they have in each other's shared memory; 1 where nothing is added up there."""
        return {"cluster2": 2, "cluster4": 4, "cluster8": 8}.get(str(self.config["reduction"]), 1)

    @property
    def pushes(self) -> bool:
        """The CTAs of a cluster store their sums in each other's shared memory, where the others are read else."""
        return self.prompt and self.cluster > 1

    beginning_steps = 4
    """Steps that beginning and ending a span are taken to last: a cautious estimate, since 6 were seen at 32 x 4k."""

    @property
    def precise(self) -> bool:
        """Squares of keys reach fp32 after every k-step, and softmax weights are halves of full precision."""
        return bool(self.config["accumulate"] == "precise")

    @property
    def square_middle(self) -> float:
        return _SQUARE_MIDDLE[self.config.problem.layout.key.bits]

    @property
    def minus_square_middle(self) -> int:
        """Two halves, as a word."""
        (half,) = struct.unpack("<H", struct.pack("<e", -self.square_middle))
        return int(half) << 16 | int(half)

    @property
    def scaled_weights(self) -> bool:
        """The softmax runs over score + log2(scale of the value); outliers have no scale, and so no such weights."""
        return self.precise and not self.config.problem.layout.outliers

    @property
    def centered(self) -> bool:
        """Sums of indices are centered now and then, because matrix instructions drop bits beside a large sum."""
        return bool(self.config["math"] == "mma" and not self.config.problem.layout.format.value_codebook)

    @property
    def sums_squares(self) -> bool:
        """Squared lengths of keys are added up over lanes by matrix instructions."""
        return bool(self.config["math"] == "mma" and self.config.problem.layout.format.norm_correction)

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
    def total_dims(self) -> int:
        """Accumulated values per query head: coefficients, then outliers."""
        layout = self.config.problem.layout
        return layout.block_d + layout.outliers

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
    def send_slices(self) -> int:
        """Warps that share a query head whose sums they send to where a cluster adds them up."""
        return self._slices(self.query_rows)

    @property
    def inbox_slices(self) -> int:
        """Warps that share a query head where they are added up."""
        return self._slices(-(-self.query_rows // self.cluster))

    def _slices(self, rows: int) -> int:
        """Parts of each of ``rows``: as many as there are warps for, of two coefficients per lane and more."""
        per_lane, slices = self.config.problem.layout.block_d // 32, 1
        while 2 * slices * rows <= self.config["warps"] and 4 * slices <= per_lane:
            slices *= 2
        return slices

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
