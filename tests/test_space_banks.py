"""Bank conflicts of packed words, against cases counted by hand."""

from __future__ import annotations

import re

import pytest

from tuner.render import render
from tuner.space import Config, Problem, default_config
from tuner.space.banks import _token, token_pitch, word_reads
from tuner.space.decode_landmarks import lead_configs
from tuner.space.plan import DecodePlan

FORMAT = "turboquant_4bit_nc"


def bulk(head_dim: int, kv_heads: int, **values: object) -> Config:
    config = default_config(Problem("decode", head_dim, 4, FORMAT))
    return config.with_(load="bulk", head_warps=kv_heads, warps=16, dim_warps=1).with_(**values)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "apart", "strided", "adjacent"),
    [
        # Words between tokens, modulo 32 banks. Strided: keys take 2 rows x D / 32 words, values 4 rows x D / 64, two
        # reads each; lanes t of row g lie in banks apart * g + t. Adjacent: one read more than words, for each row.
        (128, 8, 12, (32, 32), (22, 76)),  # 12 g + t are all different; runs of 4 words begin in 8 banks only
        (256, 2, 3, (64, 128), (38, 38)),  # 3 g + t: a row's last lane meets the next row's first; 3 g + 8 t do not
        (256, 4, 6, (64, 128), (38, 76)),
        (512, 4, 6, (128, 256), (70, 140)),
    ],
)
def test_turns_of_reads(
    head_dim: int, kv_heads: int, apart: int, strided: tuple[int, int], adjacent: tuple[int, int]
) -> None:
    config = bulk(head_dim, kv_heads)
    pitch = token_pitch(config, kv_heads)
    assert pitch % 4 == 0 and pitch // 4 % 32 == apart
    assert word_reads(config, pitch) == strided
    assert word_reads(config.with_(words="adjacent"), pitch) == adjacent
    assert word_reads(config.with_(words="whole"), pitch) == (adjacent[0], adjacent[0] * strided[1] // strided[0])
    assert word_reads(config.with_(words="whole_adjacent"), pitch) == adjacent


def test_slices_take_their_part_of_each_lanes_run() -> None:
    """Two slices of 256 channels: runs of 4 and 2 words, as far apart as without slices, so that no two lanes meet."""
    config = bulk(256, 2, dim_warps=2, words="adjacent")
    assert word_reads(config, token_pitch(config, 2)) == (2 * 5 + 4 * 3, 2 * 5 + 4 * 3)


def test_tokens_dealt_to_rows_keep_values_apart() -> None:
    """Rows 2t hold tokens t: were they tokens 2t, lanes g and t would meet where 6 t and 4 g do."""
    config = bulk(256, 2, words="adjacent")
    reads, turns = word_reads(config, 131 * 4)
    assert turns == reads
    assert word_reads(config, 2 * 131 * 4)[1] == 2 * reads, "twice the distance is what tokens 2t would have"


@pytest.mark.parametrize("words", ["strided", "adjacent", "whole", "whole_adjacent"])
def test_tokens_stand_where_the_template_deals_them(words: str) -> None:
    config = bulk(256, 2, words=words)
    code = re.search(r"int row_token\(int r\) \{ return ([r\d /%*+]+); \}", render(config).text)
    assert bool(code) == words.endswith("adjacent")
    expression = code[1].replace("/", "//") if code else "r"
    assert [_token(r, DecodePlan(config)) for r in range(8)] == [eval(expression, {"r": r}) for r in range(8)]


@pytest.mark.parametrize(("head_dim", "dim_warps", "values"), [(128, 1, 3), (256, 1, 6), (256, 2, 3), (128, 2, 2)])
def test_3_bit_values_are_read_two_bytes_at_a_time(head_dim: int, dim_warps: int, values: int) -> None:
    """Where a lane's share is a multiple of six bytes: else, three bytes, in two words."""
    config = default_config(Problem("decode", head_dim, 4, "turboquant_3bit_nc"))
    config = config.with_(dim_warps=dim_warps, load="bulk")
    keys = -(-3 * head_dim // dim_warps // 128) + 1
    assert word_reads(config, 102 * 8)[0] == 2 * keys + 4 * values


def test_pitches_of_each_way_to_load() -> None:
    assert token_pitch(bulk(128, 8), 8) == 8 * 134
    assert token_pitch(bulk(128, 8, load="bulk_rows"), 32) == 8 * 134
    assert token_pitch(bulk(128, 1, load="cp_async"), 8) % 32 == 16, "an odd number of 16-byte chunks"
    assert token_pitch(bulk(128, 1, load="direct"), 8) == 0


@pytest.mark.parametrize(
    ("head_dim", "gqa", "kv_heads", "words"), [(128, 4, 8, "whole"), (256, 8, 2, "whole_adjacent")]
)
def test_leads_take_the_words_with_fewer_turns(head_dim: int, gqa: int, kv_heads: int, words: str) -> None:
    leads = lead_configs(Problem("decode", head_dim, gqa, FORMAT), kv_heads)
    assert {c["words"] for c in leads if c["tail"] == "apart" and c["load"] == "bulk"} == {words}
    assert {c["words"] for c in leads if c["load"] == "cp_async"} == {"strided"}
