"""``wph_decode`` on the emulator, under sanitizers, against the float64 reference."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from itertools import product

import pytest
import torch
from covering import WARPS, Pairs, most_new
from decode_emulated import check, small_case, stored_case
from emulated import emulate_decode

from tuner.emulate import compile_many
from tuner.formats import FORMATS, HEAD_DIMS, slot_layout
from tuner.launch import cache_order
from tuner.reference import Case, bulk_case, codebook, make_cache, synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.space.core import Value
from tuner.space.decode_axes import has_rows_alike, has_unaligned_fields
from tuner.space.decode_landmarks import direct_variant
from tuner.space.plan import DecodePlan
from tuner.suits import suited
from tuner.table import read
from tuner.table.install import TABLE_PATTERN
from tuner.table.store import PACKAGE_TABLES
from tuner.targets import get_target

SPACE = get_space("decode")
GROUPS = (4, 1, 8, 5, 16, 2, 6, 7, 3, 12)
DRAWS = 60


def draw(chooser: random.Random, problem: Problem, warps: int) -> dict[str, Value]:
    """Random axis values, the dependent ones set to what their constraints leave."""
    values = {a.name: chooser.choice(a.values) for a in SPACE.axes} | {"warps": warps}
    values["head_warps"] = chooser.choice([h for h in SPACE.axis("head_warps").values if warps % int(h) == 0])
    values["dim_warps"] = chooser.choice([d for d in (1, 2, 4) if warps // int(values["head_warps"]) % d == 0])
    if values["load"] != "cp_async":
        values["load_bytes"] = 16
    if values["load"] == "direct":
        values["stages"] = 1
    if values["math"] == "mma":
        values["accumulate"] = "precise"
    else:
        values["accumulate"] = chooser.choice(("f32", "f16x2"))
        values["query"] = "shared"
    if values["math"] != "mma" or not problem.layout.format.norm_correction:
        values["squares"] = 1
    if values["math"] != "mma" or problem.layout.outliers:
        values["rescale"] = "always"
    if values["query"] == "paired" and problem.gqa > 4:
        values["query"] = "joined"
    if not problem.layout.format.key_codebook:
        values["lookup"] = "table"
    elif values["lookup"] == "woven" and values["math"] != "mma":
        values["lookup"] = "spread"
    if str(values["words"]).startswith("whole") and not has_rows_alike(SPACE.config(problem, values)):
        values["words"] = "adjacent"
    if str(values["words"]).endswith("adjacent") and not has_unaligned_fields(SPACE.config(problem, values)):
        values["words"] = "strided"
    if problem.layout.format.has_signs:
        values["beginning"] = "ordered"
    if values["reduction"].startswith("cluster"):
        values["schedule"] = "grid"
    if values["reduction"] in ("all_warps", "all_threads", "all_segments"):
        if problem.layout.format.has_signs:
            values["reduction"] = "all"
        else:
            values["beginning"] = "prompt"
    if values["reduction"].startswith("all") and values["schedule"] in ("stream", "share"):
        values["schedule"] = "deal"
    if values["schedule"] == "allot" and values["beginning"] != "prompt":
        values["schedule"] = "deal"
    return values


@lru_cache(maxsize=1)
def matrix() -> tuple[Config, ...]:
    """One configuration per format, head dim and warp count; the other axes drawn so that values meet in pairs.

    Of many draws the one is taken that brings most pairs of values together that have not met yet; with these, every
    group size comes up.
    """
    target, chooser, met = get_target("sm_90"), random.Random(3), Pairs()
    configs: list[Config] = []
    for name, head_dim, warps in product(FORMATS, HEAD_DIMS, WARPS):
        turn, chosen = len(configs), None
        while chosen is None:  # one warp has no registers for 16 heads of 512 dims: the next group size then
            problem = Problem("decode", head_dim, GROUPS[turn % len(GROUPS)], name)
            drawn = (SPACE.config(problem, draw(chooser, problem, warps)) for _ in range(DRAWS))
            chosen = most_new(drawn, met, SPACE, target)
            turn += 1
        configs.append(chosen)
    return tuple(configs)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_many([render(c) for c in matrix()], jobs=2)


def test_the_matrix_reaches_every_axis_value_and_group() -> None:
    for axis in SPACE.axes:
        assert {c[axis.name] for c in matrix()} == set(axis.values), axis.name
    assert {c.problem.gqa for c in matrix()} == set(GROUPS)


@pytest.mark.parametrize("index", range(len(FORMATS) * len(HEAD_DIMS) * len(WARPS)))
def test_agrees_with_the_reference(index: int) -> None:
    config = matrix()[index]
    # Sums in halves cost an output what rounding it to bf16 does, more than to fp16.
    dtype = torch.float16 if index % 5 == 4 and config["accumulate"] != "f16x2" else torch.bfloat16
    check(config, small_case(config, query_dtype=dtype, seed=index), seed=index)


def measured_kernels() -> list[Config]:
    """Of the package's tables, those that a GPU was timed with, each once; the search may no longer allow them."""
    tables = (read(path) for path in sorted(PACKAGE_TABLES.glob(TABLE_PATTERN)))
    measured = [t for t in tables if t.evidence == "measured" and t.problem.op == "decode"]
    return list(dict.fromkeys(k.config(t.problem) for t in measured for k in t.kernels))


@pytest.mark.parametrize("config", measured_kernels(), ids=Config.describe)
def test_what_the_package_ships_as_measured_agrees_with_the_reference(config: Config) -> None:
    check(config, small_case(config, (0, 1, 70, 300)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("landmark", [default_config, seed_config, lambda p: direct_variant(default_config(p))])
def test_landmarks_run_every_format(name: str, landmark: object) -> None:
    config = landmark(Problem("decode", 128, 4, name))  # type: ignore[operator]
    check(config, small_case(config))


FORMAT = "turboquant_4bit_nc"
DEFAULT = default_config(Problem("decode", 128, 4, FORMAT))
PERSISTENT = DEFAULT.with_(schedule="stream", reduction="kernel")
SHARED = DEFAULT.with_(schedule="share", reduction="kernel")
DEALT = DEFAULT.with_(schedule="deal", lookup="woven", query="paired", words="adjacent", tail="apart")
PROMPT = DEALT.with_(beginning="prompt")


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 4176, 8320])
def test_block_sizes(block_size: int) -> None:
    check(DEFAULT, small_case(DEFAULT, (300, 15, 128), block_size=block_size))


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        PERSISTENT,
        DEFAULT.with_(schedule="stream", load="bulk", head_warps=2),
        SHARED,
        DEFAULT.with_(schedule="share", load="bulk", head_warps=2, reduction="tree"),
        DEFAULT.with_(schedule="share", load="bulk_rows", warps=16, head_warps=8, reduction="tree"),
        DEFAULT.with_(schedule="share", warps=1),
        DEALT,
        DEALT.with_(warps=1, reduction="kernel"),
        PROMPT,
        PROMPT.with_(load="bulk_rows", warps=16, head_warps=8, stages=3, lead=12),
        PROMPT.with_(load="bulk", words="strided", head_warps=4, stages=1, schedule="grid", reduction="all"),
        PROMPT.with_(schedule="allot"),
        PROMPT.with_(schedule="allot", load="bulk_rows", warps=16, head_warps=8, lead=12, reduction="all_warps"),
        PROMPT.with_(schedule="allot", load="bulk_rows", warps=16, head_warps=8, lead=12, reduction="all_threads"),
        PROMPT.with_(schedule="allot", load="bulk_rows", warps=16, head_warps=8, lead=12, reduction="all_segments"),
        PROMPT.with_(schedule="allot", warps=1, lead=8, reduction="kernel"),
        PERSISTENT.with_(warps=1, beginning="prompt"),
        DEFAULT.with_(lookup="shuffle", beginning="prompt"),
    ],
)
@pytest.mark.parametrize("splits", [1, 2, 7, 9, 13, 40])
def test_any_number_of_splits(config: Config, splits: int) -> None:
    lengths = (0, 333, 1, 0, 64, 16, 15, 129)
    check(config, small_case(config, lengths), splits, seed=splits, concurrent_ctas=1 + splits % 4)


@pytest.mark.parametrize(
    ("cache_format", "kv_heads", "dim_warps", "load_bytes"),
    [
        ("turboquant_4bit_nc", 1, 1, 16),
        ("turboquant_4bit_nc", 3, 1, 8),
        ("turboquant_3bit_nc", 1, 1, 16),
        ("turboquant_3bit_nc", 3, 2, 4),
        ("turboquant_k8v4", 1, 4, 16),
    ],
)
def test_copies_find_every_row(cache_format: str, kv_heads: int, dim_warps: int, load_bytes: int) -> None:
    """Rows whose distance is no multiple of 4 bytes: only every eighth starts as far from a multiple of 16."""
    config = default_config(Problem("decode", 256, 3, cache_format)).with_(stages=1, beginning="prompt")
    config = config.with_(dim_warps=dim_warps, load_bytes=load_bytes, lookup="table")
    case = synthetic_cache(config.problem.layout, (100, 16, 0, 33), q_heads=3 * kv_heads, kv_heads=kv_heads)
    check(config, case)


@pytest.mark.parametrize(
    ("cache_format", "head_dim", "dim_warps", "lookup"),
    [
        ("turboquant_k3v4_nc", 64, 1, "woven"),
        ("turboquant_3bit_nc", 64, 1, "spread"),
        ("turboquant_3bit_nc", 128, 1, "woven"),
        ("turboquant_k3v4_nc", 256, 1, "spread"),
        ("turboquant_3bit_nc", 256, 4, "woven"),
        ("turboquant_3bit_nc", 512, 4, "spread"),
    ],
)
def test_bytes_that_begin_with_two_3_bit_indices(cache_format: str, head_dim: int, dim_warps: int, lookup: str) -> None:
    config = default_config(Problem("decode", head_dim, 2, cache_format))
    config = config.with_(dim_warps=dim_warps, lookup=lookup, stages=1, tail="apart")
    check(config, small_case(config, (100, 16, 0, 33)))


TURNED: list[tuple[str, int, dict[str, Value]]] = [
    (FORMAT, 64, {"warps": 2, "math": "fma", "accumulate": "f32"}),
    (FORMAT, 64, {"warps": 2, "beginning": "prompt"}),
    (FORMAT, 128, {"warps": 4, "tokens": 32, "lookup": "woven", "query": "paired", "beginning": "prompt"}),
    (FORMAT, 256, {"warps": 8, "dim_warps": 2, "lookup": "prmt", "schedule": "deal", "reduction": "all"}),
    (FORMAT, 512, {"warps": 8, "dim_warps": 4, "stages": 1, "reduction": "cluster2", "beginning": "prompt"}),
    ("turboquant_k3v4_nc", 128, {"warps": 4, "lookup": "woven", "schedule": "deal", "beginning": "prompt"}),
    ("turboquant_k3v4_nc", 256, {"warps": 4, "dim_warps": 2, "lookup": "table"}),
]
WAYS = {FORMAT: ("whole", "whole_adjacent"), "turboquant_k3v4_nc": ("whole",)}


@pytest.mark.parametrize(
    ("cache_format", "head_dim", "values"),
    [(name, head_dim, {"words": words, **values}) for name, head_dim, values in TURNED for words in WAYS[name]],
)
def test_rows_turned_to_their_first_whole_word(cache_format: str, head_dim: int, values: dict[str, Value]) -> None:
    """Of two heads one has keys, the other values that begin in the middle of a word."""
    config = default_config(Problem("decode", head_dim, 3, cache_format)).with_(load="bulk", head_warps=2, **values)
    assert not SPACE.refusals(config, get_target("sm_90"))
    case = synthetic_cache(config.problem.layout, (333, 0, 1, 64), q_heads=6, kv_heads=2)
    check(config, case, splits=3)


def test_tokens_that_are_not_whole_words_apart_are_read_otherwise() -> None:
    config = DEFAULT.with_(load="bulk", head_warps=2, words="whole")
    case = small_case(config, (100, 40), order="head")
    assert suited(config, cache_order(case.kv_cache)) == direct_variant(config)
    assert suited(config, cache_order(small_case(config, (100, 40), order="token").kv_cache)) == config


@pytest.mark.parametrize("config", [DEFAULT, direct_variant(DEFAULT)])
def test_head_major_memory_padding_and_wide_block_ids(config: Config) -> None:
    case = small_case(config, (100, 40), order="head", padding=4096, index_dtype=torch.int64)
    check(config, case)


def test_slots_at_odd_multiples_of_two_bytes() -> None:
    case = small_case(DEFAULT, (100, 40), padding=34)
    assert case.kv_cache.stride(0) % 16
    config = suited(DEFAULT, cache_order(case.kv_cache))
    assert config == direct_variant(DEFAULT)
    check(config, case)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_an_output_at_any_address(head_dim: int) -> None:
    """Heads one element further apart than they are long, from an odd element on: no vector store fits."""
    config = default_config(Problem("decode", head_dim, 2, "turboquant_4bit_nc"))
    case = small_case(config, (100, 40, 0))
    batch, heads, _ = case.query.shape
    room = torch.zeros(batch * heads * (head_dim + 1) + 1, dtype=case.query.dtype)
    out = room[1:].as_strided((batch, heads, head_dim), (heads * (head_dim + 1), head_dim + 1, 1))
    for splits in (1, 3):
        assert torch.equal(emulate_decode(config, case, splits, into=out), emulate_decode(config, case, splits))
    assert not room[0] and not room[head_dim + 1 :: head_dim + 1].any()  # nothing between the heads is touched


@pytest.mark.parametrize("schedule", ["grid", "deal", "allot"])
@pytest.mark.parametrize(("head_dim", "gqa", "warps"), [(64, 3, 1), (128, 16, 4), (256, 16, 1), (512, 4, 2)])
def test_a_query_at_any_address(head_dim: int, gqa: int, warps: int, schedule: str) -> None:
    """Rows that are read ahead: as vectors, and from an odd element on, heads one element further apart than they are
    long. One warp that has more rows of 256 than it holds at a time is among them."""
    config = default_config(Problem("decode", head_dim, gqa, FORMAT))
    config = config.with_(warps=warps, dim_warps=1, stages=1, schedule=schedule, beginning="prompt")
    case = small_case(config, (100, 40, 0))
    batch, heads, _ = case.query.shape
    room = torch.zeros(batch * heads * (head_dim + 1) + 1, dtype=case.query.dtype)
    moved = room[1:].as_strided((batch, heads, head_dim), (heads * (head_dim + 1), head_dim + 1, 1)).copy_(case.query)
    check(config, case)
    assert torch.equal(emulate_decode(config, replace(case, query=moved), 3), emulate_decode(config, case, 3))


@pytest.mark.parametrize("bits", [3, 4])
def test_scaled_levels_are_nearly_halves(bits: int) -> None:
    plan = DecodePlan(default_config(Problem("decode", 128, 4, f"turboquant_{bits}bit_nc")))
    levels = codebook(bits, 128) * plan.level_scale
    assert (levels.half().double() - levels).norm() / levels.norm() < 3e-5


def test_one_block_table_row_for_all_requests() -> None:
    case = small_case(DEFAULT, (90,))
    rows = 3
    expanded = Case(
        query=torch.randn(rows, *case.query.shape[1:]).bfloat16(),
        kv_cache=case.kv_cache,
        block_table=case.block_table.expand(rows, -1),
        seq_lens=torch.tensor([88, 89, 90], dtype=torch.int32),
        scale=case.scale,
        codec=case.codec,
    )
    assert expanded.block_table.stride(0) == 0
    check(DEFAULT, expanded)


@pytest.mark.parametrize("config", [PERSISTENT, SHARED, SHARED.with_(reduction="last"), DEALT, PROMPT])
def test_many_requests_in_the_persistent_queue(config: Config) -> None:
    lengths = tuple((7 * i) % 50 for i in range(70))
    for splits in (3, 50, 70, 100):
        check(config, small_case(config, lengths), splits)


def test_peaked_softmax_and_huge_queries() -> None:
    check(DEFAULT, small_case(DEFAULT, (200, 50), peak=8.0))
    case = small_case(DEFAULT, (200, 50))
    huge = replace(case, query=case.query * 2.0**100, scale=case.scale * 2.0**-100)
    check(DEFAULT, huge)


@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_k8v4"])
def test_scores_of_many_nats(cache_format: str) -> None:
    """Scores deviate by about 50: whatever moves a key's length by 1e-5 moves its weight by a thousandth."""
    config = default_config(Problem("decode", 128, 4, cache_format))
    for seed in range(3):
        case = bulk_case(config.problem.layout, (1024, 1021, 700), q_heads=32, kv_heads=8, seed=seed)
        check(config, replace(case, query=case.query * 30))


def value_case(config: Config, size: float) -> Case:
    """1000 tokens whose values have a standard deviation of ``size``."""
    problem, generator, tokens = config.problem, torch.Generator().manual_seed(0), 1000
    cache = make_cache(problem.layout, -(-tokens // 16), 16, 1, generator=generator)
    key, value = torch.randn(2, tokens, 1, problem.head_dim, generator=generator)
    query = torch.randn(problem.gqa, problem.head_dim, generator=generator)
    return stored_case(problem, cache, query, key, size * value)


@pytest.mark.parametrize("rescale", ["always", "lazy"])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2, 1e4])
@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_3bit_nc", "turboquant_seed_dense"])
def test_values_of_any_size(cache_format: str, size: float, rescale: str) -> None:
    config = default_config(Problem("decode", 128, 4, cache_format)).with_(rescale=rescale)
    check(config, value_case(config, size))


@pytest.mark.parametrize("rescale", ["always", "lazy"])
def test_a_row_of_equal_values_adds_nothing_but_its_zero_point(rescale: str) -> None:
    """Its scale is zero as a half; where sums shrink lazily that counts as 2^-40, far below the tolerance."""
    config = default_config(Problem("decode", 64, 2, "turboquant_4bit_nc")).with_(rescale=rescale)
    case = value_case(config, 1.0)
    slot = slot_layout("turboquant_4bit_nc", 64)
    at = slot.value_offset + slot.value.scale_offset
    case.kv_cache[::2, ..., at : at + 2] = 0
    check(config, case)
    case.kv_cache[..., at : at + 2] = 0
    check(config, case)


def test_a_scale_that_is_not_a_number_reaches_the_output() -> None:
    for cache_format, rescale in product(("turboquant_4bit_nc", "turboquant_seed_dense"), ("always", "lazy")):
        config = default_config(Problem("decode", 64, 2, cache_format)).with_(rescale=rescale)
        case = small_case(config, (20,))
        layout = slot_layout(cache_format, 64)
        field = layout.value.scale_offset if layout.value.scale_offset is not None else layout.value.norm_offset
        block = int(case.block_table[0, 0])
        slots = case.kv_cache[block] if not layout.format.separate_planes else case.kv_cache[block, 1]
        start = (0 if layout.format.separate_planes else layout.value_offset) + field
        slots[3, 0, start : start + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
        out = emulate_decode(config, case)
        assert torch.isnan(out[0, :2]).all() and not torch.isnan(out[0, 2:]).any(), cache_format


def test_nan_keys_reach_the_output() -> None:
    config = default_config(Problem("decode", 64, 2, "turboquant_k8v4"))
    case = small_case(config, (20,))
    block, slot = int(case.block_table[0, 0]), slot_layout("turboquant_k8v4", 64)
    case.kv_cache[block, 3, 0, slot.key.indices_offset] = 0x7F
    out = emulate_decode(config, case)
    assert torch.isnan(out[0, :2]).all() and not torch.isnan(out[0, 2:]).any()


def test_two_runs_give_the_same_bits() -> None:
    case = small_case(DEFAULT, (500, 30))
    first = emulate_decode(DEFAULT, case, 5)
    assert torch.equal(first, emulate_decode(DEFAULT, case, 5, seed=3, concurrent_ctas=4))


@pytest.mark.parametrize("cache_format", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_sums_stay_centered_over_many_steps(cache_format: str) -> None:
    """A long flat softmax: what is left of the values' sum is small beside what the middle index adds to it."""
    config = default_config(Problem("decode", 128, 4, cache_format))
    check(config, small_case(config, (1500,), query_dtype=torch.float16), splits=1)
