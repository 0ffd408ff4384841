"""Shared-memory banks that the lanes of ``wph_decode`` meet in when they read packed words of staged rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from tuner.space.core import Config
from tuner.space.plan import DecodePlan

_BANKS, _WORD, _LANES = 32, 4, range(32)


def token_pitch(config: Config, kv_heads: int) -> int:
    """Bytes between tokens in shared memory, of a cache whose heads lie within tokens; 0 where nothing is staged."""
    plan = DecodePlan(config)
    if config["load"] == "direct":
        return 0
    if config["load"] == "cp_async":
        return plan.row_pitches[0]
    heads = kv_heads if config["load"] == "bulk" else config["head_warps"]
    return int(heads) * config.problem.layout.slot_bytes


@lru_cache(maxsize=4096)
def word_reads(config: Config, pitch: int) -> tuple[int, int]:
    """Reads of a warp for the words of one group of 16 tokens ``pitch`` bytes apart, and the turns that they take:
    a read takes as many as the most words that its lanes want of one bank."""
    reads = turns = 0
    for addresses in _reads(config, pitch):
        banks: dict[int, set[int]] = {}
        for address in addresses:
            banks.setdefault(address // _WORD % _BANKS, set()).add(address // _WORD)
        reads += 1
        turns += max(len(words) for words in banks.values())
    return reads, turns


def _reads(config: Config, pitch: int) -> Iterator[list[int]]:
    """The lanes' addresses of each read: keys of rows g and g + 8 by quarters t of a row, values of rows 2t, 2t + 1 and
    8 more by eighths g."""
    plan, layout = DecodePlan(config), config.problem.layout
    per_key, per_value = plan.slice_dims * layout.key.bits // 32, plan.slice_dims * layout.value.bits // 64  # bytes
    whole = plan.alignment == 4
    key_reads = list(_words(per_key, 4, layout.key.bits, whole, plan))
    value_words = _words(per_value, 8, layout.value.bits, whole, plan)
    value_reads = list(_halves(per_value) if plan.value_halves else value_words)
    for row in (0, 8):
        for offset, at in key_reads:
            yield [pitch * (_token(lane // 4, plan) + row) + at * (lane % 4) + offset for lane in _LANES]
    for row, far in ((0, 0), (1, 0), (0, 8), (1, 8)):
        tokens = [_token(2 * (lane % 4) + row, plan) + far for lane in _LANES]
        for offset, at in value_reads:
            yield [pitch * token + at * (lane // 4) + offset for lane, token in enumerate(tokens)]


def _token(row: int, plan: DecodePlan) -> int:
    """Which token stands in a row of a matrix: as the template deals them."""
    return row // 2 + row % 2 * 4 if plan.adjacent else row


def _halves(size: int) -> Iterator[tuple[int, int]]:
    """As ``_words``, of what is read two bytes at a time."""
    yield from ((2 * i, size) for i in range(size // 2))


def _words(size: int, lanes: int, bits: int, whole: bool, plan: DecodePlan) -> Iterator[tuple[int, int]]:
    """Offset of each word that a lane reads of its ``size`` bytes, and how far apart ``lanes`` lanes begin."""
    count = -(-size // _WORD)
    turned = plan.whole_words and bits == 4
    whole = whole or turned
    apart = size * plan.config["dim_warps"] if plan.adjacent else size
    if plan.adjacent or bits == 3:
        yield from ((_WORD * i, apart) for i in range(count + (not whole)))
    else:
        yield from ((_WORD * (lanes * i + n), _WORD) for i in range(count) for n in range(1 if whole else 2))
    if turned:  # the last word is read in halves, both there where rows begin at a word
        yield (_WORD * (count - 1), apart) if plan.adjacent else (_WORD * lanes * (count - 1), _WORD)
