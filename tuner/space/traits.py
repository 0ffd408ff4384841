"""What a configuration of ``wph_decode`` comes to: facts that follow from its axes, for template, launcher and plan."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from tuner.space.core import Config

GROUP_TOKENS = 16
"""Tokens of one page that are copied and multiplied together (the M of mma.m16n8k16)."""

_GRID_FACTOR = {3: 1.2606987953186035, 4: 1.7335957288742065}
"""Per index width, what brings all Lloyd-Max levels of N(0, 1) closest to halves (relative error of the set: 6e-6 for
3 bits, 2.7e-5 for 4, against 1.7e-4 unscaled). Found by trying every multiple of 2^-24 from 1 to 2."""

_SQUARE_MIDDLE = {1: {3: 0.59765625, 4: 0.755859375}, 2: {3: 2.798828125, 4: 3.9609375}}
"""Likewise what is subtracted from the squares of those levels before they are rounded to halves, by how many are added
up in a half, one after the other: the multiple of 2^-9 with which rounding varies least from row to row (what all rows
have in common scales all scores). With four of them peaked softmaxes would be off by more than the gate allows."""

_SM_REGISTERS = 65536
"""Of all targets."""


@dataclass(frozen=True)
class DecodeTraits:
    """Counts and choices; sizes in bytes are ``DecodePlan``'s."""

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
    def holds_query(self) -> bool:
        """Each warp keeps the query's fragments in registers."""
        return self.config["query"] in ("registers", "borrowed")

    @property
    def borrows(self) -> bool:
        """The query is filed where a stage will lie, whose tokens are asked for once all warps hold it."""
        return bool(self.config["query"] == "borrowed")

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
    def bulk(self) -> bool:
        """Bulk copies, of all heads of 16 tokens (``load`` bulk) or of the CTA's heads token by token (bulk_rows)."""
        return self.config["load"] in ("bulk", "bulk_rows")

    @property
    def files_first(self) -> bool:
        """The query is filed while the ids of blocks travel, not while tokens do: where every lane asks for tokens,
        asking takes as long as the first of them."""
        return self.prompt and self.config["load"] == "cp_async"

    @property
    def asks_in_turn(self) -> bool:
        """Of the warps that share a stripe of tokens each asks for a step in turn: who asks waits for the slowest, and
        copies of single rows take long. Two warps gain nothing."""
        return self.prompt and self.bulk and int(self.config["head_warps"]) * int(self.config["dim_warps"]) > 2

    @property
    def shares(self) -> bool:
        """A persistent grid, whose CTAs take pieces of requests."""
        return self.config["schedule"] in ("share", "deal", "allot")

    @property
    def dealt(self) -> bool:
        """One warp finds the CTA's piece, and what has no tokens is seen to last."""
        return self.config["schedule"] in ("deal", "allot")

    @property
    def allots(self) -> bool:
        """That warp reads the lengths ahead and divides by reciprocals, while the others ask for a share of what all
        requests need."""
        return bool(self.config["schedule"] == "allot")

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
    def total_dims(self) -> int:
        """Accumulated values per query head: coefficients, then outliers."""
        layout = self.config.problem.layout
        return layout.block_d + layout.outliers

    @property
    def value_halves(self) -> bool:
        """3-bit values are read two bytes at a time: a lane's share of a row is a multiple of six bytes."""
        return self.config.problem.layout.value.bits == 3 and self.slice_dims >= 128

    @cached_property
    def level_scale(self) -> float:
        """Codebook levels are multiplied by this before they become halves; the kernel divides it out again."""
        layout = self.config.problem.layout
        return _GRID_FACTOR[layout.key.bits] * layout.block_d**0.5 if layout.format.key_codebook else 1.0

    @property
    def precise(self) -> bool:
        """Squares of keys reach fp32 as differences from their middle, and softmax weights are halves of full
        precision."""
        return bool(self.config["accumulate"] == "precise")

    @property
    def square_steps(self) -> int:
        """k-steps whose squares are added up in halves before they reach fp32."""
        return int(self.config["squares"])

    @property
    def chains_squares(self) -> bool:
        return self.square_steps > 1

    @property
    def square_middle(self) -> float:
        """A sum of squares in halves begins with minus this."""
        return _SQUARE_MIDDLE[self.square_steps][self.config.problem.layout.key.bits]

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

    @property
    def cluster(self) -> int:
        """CTAs that add up what they have in each other's shared memory; 1 where nothing is added up there."""
        return {"cluster2": 2, "cluster4": 4, "cluster8": 8}.get(str(self.config["reduction"]), 1)

    @property
    def pushes(self) -> bool:
        """The CTAs of a cluster store their sums in each other's shared memory, where the others are read else."""
        return self.prompt and self.cluster > 1

    @property
    def waits(self) -> bool:
        """The contributors to a request wait for each other, and each adds up a share: query heads, or segments."""
        return self.config["reduction"] in ("all", "all_warps", "all_threads", "all_segments")

    @property
    def tells_waits(self) -> bool:
        """Whoever concludes a request says whether it has other work: with segments the others know."""
        return self.waits and not self.by_segment

    @property
    def divides_shares(self) -> bool:
        """Where a CTA's share has fewer heads (or segments) than can be added up at a time, the contributions to each
        are divided."""
        return self.config["reduction"] in ("all_warps", "all_threads", "all_segments")

    @property
    def by_vector(self) -> bool:
        """Sums of several CTAs are added up by all threads, each of which has a vector of a row at a time."""
        return self.config["reduction"] in ("all_threads", "all_segments")

    @property
    def by_segment(self) -> bool:
        """What contributors share out are segments of rows, as many coefficients as a warp has vectors for, and the
        last one has no share where it goes on to tokens of another request."""
        return bool(self.config["reduction"] == "all_segments")

    @property
    def evens(self) -> bool:
        """The pieces of a request are as long as each other, where its CTAs wait for each other's segments."""
        return self.allots and self.by_segment

    @property
    def _vector_warps(self) -> int:
        """Warps that a row has a vector for every lane of."""
        return max(self.config.problem.layout.block_d // 128, 1)

    @property
    def row_segments(self) -> int:
        """What is shared out of a row: all of it, or segments."""
        return self._vector_warps if self.by_segment else 1

    @property
    def row_warps(self) -> int:
        """Warps that share a row when contributions to it are added up: one, or as many as it has vectors for."""
        return self._vector_warps if self.by_vector and not self.by_segment else 1

    segments_together = 2
    """Segments that a warp adds up at a time where few have contributed to many of them."""

    @property
    def share_words(self) -> int:
        """Words of 64 bits that contributors to a request come to where they wait for each other: a count, and bits for
        32 shares, each."""
        return min(-(-self.query_rows * self.row_segments // 32), 4) if self.by_segment else 1

    @property
    def arrival_counters(self) -> int:
        """Counters of a request and its CTAs' heads where they wait for each other."""
        return 4 * self.share_words

    @property
    def most_shares(self) -> int:
        """Contributors that add up a share each where they wait: as many as there are bits for."""
        return 32 * self.share_words

    patience = 40
    """Times that a contributor looks whether all have come before it leaves its share to the last one."""

    @property
    def sums_ahead(self) -> int:
        """Contributions to a row whose sums travel at a time: as many as half a warp's registers hold, 2 to 8; with
        everything in order by the head dim alone, and 8 where a thread has only a vector of each."""
        per_lane = self.config.problem.layout.block_d // 32
        if self.by_vector:
            return 8
        if not self.prompt:
            return 2 if per_lane > 8 else 4 if per_lane > 4 else 8
        threads = 32 * self.config["warps"] * self.config["min_ctas"]
        return int(min(max(_SM_REGISTERS // threads // 2 // per_lane, 2), 8))

    def share_parts(self, heads: int, contributions: int) -> int:
        """Parts of the contributions to each of the ``heads`` (or segments) that a CTA adds up, as the kernel reckons;
        one or several warps have a part."""
        enough = self.sums_ahead // 2 if self.by_segment else self.sums_ahead  # a part has more contributions
        parts, most = 1, min(self.config["warps"] // self.row_warps // heads, (contributions - 1) // enough)
        while self.divides_shares and 2 * parts <= most:
            parts *= 2
        return parts

    branch = 8
    """Contributions to a request that one CTA adds up where ``reduction`` is "tree"."""

    @property
    def beginning_steps(self) -> int:
        """Steps that beginning and ending a span are taken to last."""
        return int(self.config["lead"])

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
