"""Adding up what several CTAs have of a request: branches, CTAs that wait for each other, clusters."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from decode_emulated import TOLERANCE, check, small_case
from emulated import emulate_decode, worst_head_error

from tuner.emulate import EmulationError
from tuner.reference import synthetic_cache
from tuner.render import render
from tuner.space import Problem, default_config, get_space
from tuner.space.core import Value
from tuner.space.plan import DecodePlan
from tuner.targets import get_target


@pytest.mark.parametrize(
    ("cache_format", "values"),
    [
        *product(
            ("turboquant_4bit_nc", "turboquant_outlier"),
            ({"schedule": schedule} for schedule in ("grid", "stream", "share", "deal")),
        ),
        ("turboquant_4bit_nc", {"schedule": "allot", "beginning": "prompt"}),
    ],
)
def test_branches_of_splits(cache_format: str, values: dict[str, Value]) -> None:
    """Around one branch, around whole branches, with a last branch of one, and with more branches than fit in one."""
    config = default_config(Problem("decode", 64, 2, cache_format))
    config = config.with_(reduction="tree", warps=1).with_(**values)
    case = small_case(config, (1300, 0, 1, 16 * 9, 33))
    for splits in (1, 8, 9, 16, 17, 70):
        check(config, case, splits)
    assert torch.equal(emulate_decode(config, case, 70), emulate_decode(config, case, 70, seed=3, concurrent_ctas=8))


PROMPT: dict[str, Value] = {"warps": 2, "beginning": "prompt"}
WAITING: list[tuple[str, dict[str, Value]]] = [
    ("turboquant_4bit_nc", {}),
    ("turboquant_4bit_nc", PROMPT),
    ("turboquant_4bit_nc", PROMPT | {"reduction": "all_warps"}),
    ("turboquant_4bit_nc", PROMPT | {"reduction": "all_threads"}),
    ("turboquant_4bit_nc", PROMPT | {"reduction": "all_segments"}),
    ("turboquant_outlier", {}),
]


@pytest.mark.parametrize(
    ("cache_format", "values"),
    [
        *((name, values | {"schedule": schedule}) for schedule in ("grid", "deal") for name, values in WAITING),
        ("turboquant_4bit_nc", PROMPT | {"reduction": "all_warps", "schedule": "allot"}),
        ("turboquant_4bit_nc", PROMPT | {"reduction": "all_threads", "schedule": "allot"}),
        ("turboquant_4bit_nc", PROMPT | {"reduction": "all_segments", "schedule": "allot"}),
    ],
)
def test_contributors_that_wait_for_each_other(cache_format: str, values: dict[str, Value]) -> None:
    """One at a time, where all but the last give up waiting, and together; up to more of them than there are shares,
    and so many that two warps divide those to a head."""
    config = default_config(Problem("decode", 64, 6, cache_format)).with_(reduction="all", warps=1).with_(**values)
    case = small_case(config, (1300, 0, 1, 16 * 9, 33))
    for splits in (1, 9, 33, 70):
        check(config, case, splits)
    for splits in (9, 70):
        check(config, case, splits, seed=splits, concurrent_ctas=200)
    assert torch.equal(emulate_decode(config, case, 70), emulate_decode(config, case, 70, seed=3, concurrent_ctas=8))


@pytest.mark.parametrize("schedule", ["allot", "deal"])
def test_contributors_of_which_one_has_only_the_beginning_of_another_request_left(schedule: str) -> None:
    """One of five CTAs ends within what comes before the tokens of the next request, and waits for the others."""
    config = default_config(Problem("decode", 64, 6, "turboquant_4bit_nc"))
    config = config.with_(**PROMPT, reduction="all_segments", schedule=schedule)
    lengths, ctas = (91, 1155, 138, 322, 98), 5
    plan, groups = DecodePlan(config), [-(-n // 16) for n in lengths]
    lead = plan.beginning_steps * plan.token_warps * plan.tiles
    quota = -(-(sum(groups) + lead * len(groups)) // ctas)
    ends = [sum(groups[: i + 1]) + lead * (i + 1) for i in range(len(groups) - 1)]
    several = [end for end, n in zip(ends, groups, strict=False) if (end - n) // quota < (end - 1) // quota]
    assert any(0 < -end % quota <= lead for end in several)
    case = small_case(config, lengths)
    for concurrent_ctas in (1, 3, 40):
        check(config, case, ctas, seed=concurrent_ctas, concurrent_ctas=concurrent_ctas)


@pytest.mark.parametrize(
    ("beginning", "reduction"),
    [("ordered", "all"), *(("prompt", who) for who in ("all", "all_warps", "all_threads", "all_segments"))],
)
@pytest.mark.parametrize(("patience", "concurrent_ctas"), [(0, 1), (0, 200), (1, 3), (100_000, 200)])
def test_shares_are_added_up_once_however_long_one_waits(
    patience: int, concurrent_ctas: int, beginning: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right sums, and counters at zero, say that each share was taken once."""
    config = default_config(Problem("decode", 64, 6, "turboquant_4bit_nc"))
    config = config.with_(reduction=reduction, warps=2, beginning=beginning)
    monkeypatch.setattr(DecodePlan, "patience", patience)
    case = small_case(config, (700, 0, 33, 90))
    for seed in range(3):
        check(config, case, 12, seed=seed, concurrent_ctas=concurrent_ctas)


@pytest.mark.parametrize(
    ("gqa", "layout"),
    [(1, {"warps": 8}), (2, {"warps": 8, "head_warps": 2}), (3, {"warps": 4}), (5, {"warps": 8, "dim_warps": 2})],
)
@pytest.mark.parametrize(
    ("reduction", "head_dim"),
    [("all_warps", 128), *((who, head_dim) for who in ("all_threads", "all_segments") for head_dim in (128, 256, 512))],
)
def test_contributions_to_few_heads_are_divided(
    gqa: int, layout: dict[str, Value], reduction: str, head_dim: int
) -> None:
    """One at a time, where the last CTA takes every head, and together; so many contributions that one, two and four
    warps, or teams of two or four of them, have a head, and so few that one has."""
    config = default_config(Problem("decode", head_dim, gqa, "turboquant_4bit_nc"))
    config = config.with_(reduction=reduction, beginning="prompt", **layout)
    assert not get_space("decode").refusals(config, get_target("sm_90"))
    case = small_case(config, (4600, 90, 0, 1100))
    for splits, concurrent in ((9, 1), (40, 1), (40, 40)):
        check(config, case, splits, seed=splits, concurrent_ctas=concurrent)


@pytest.mark.parametrize(("schedule", "kv_heads"), [("grid", 2), ("allot", 2), ("allot", 3)])
def test_more_shares_than_a_word_has_bits_for(schedule: str, kv_heads: int) -> None:
    """64 segments, or of a third head 32, with two, four, 32 and up to 70 contributions to each, where all wait,
    where each quits before the next comes, and where some do."""
    config = default_config(Problem("decode", 256, 16, "turboquant_4bit_nc"))
    config = config.with_(warps=4, head_warps=2, beginning="prompt", reduction="all_segments", schedule=schedule)
    assert DecodePlan(config).share_words == 2 and not get_space("decode").refusals(config, get_target("sm_90"))
    case = synthetic_cache(config.problem.layout, (1130, 40, 0, 33), q_heads=16 * kv_heads, kv_heads=kv_heads)
    for splits, concurrent in ((2, 40), (4, 40), (32, 90), (70, 1), (70, 3), (70, 150)):
        check(config, case, splits, seed=splits, concurrent_ctas=concurrent)


@pytest.mark.parametrize("patience", [0, 3, 40])
@pytest.mark.parametrize("schedule", ["grid", "deal", "allot"])
def test_four_words_of_shares(schedule: str, patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 segments of four heads, of which the last CTAs have three; requests that CTAs leave for others."""
    config = default_config(Problem("decode", 512, 8, "turboquant_4bit_nc"))
    values: dict[str, Value] = {"warps": 8, "head_warps": 4, "dim_warps": 1, "stages": 1, "beginning": "prompt"}
    config = config.with_(reduction="all_segments", schedule=schedule, **values)
    assert DecodePlan(config).share_words == 4 and not get_space("decode").refusals(config, get_target("sm_90"))
    monkeypatch.setattr(DecodePlan, "patience", patience)
    case = synthetic_cache(config.problem.layout, (900, 50, 0, 130), q_heads=24, kv_heads=3)
    for splits, concurrent in ((5, 5), (21, 3)):
        check(config, case, splits, seed=splits, concurrent_ctas=concurrent)


def test_who_waits_long_enough_leaves_nothing_to_the_last() -> None:
    config = default_config(Problem("decode", 64, 6, "turboquant_4bit_nc")).with_(reduction="all", warps=1)
    source = render(config)
    quits = "if (looks == PATIENCE &&"
    assert source.text.count(quits) == 1
    trapped = replace(source, text=source.text.replace(quits, f"if (looks == PATIENCE) trap();\n        {quits}"))
    case = small_case(config, (700, 33))
    out = emulate_decode(config, case, 12, source=trapped, concurrent_ctas=200)
    assert worst_head_error(out, case.expected()) <= TOLERANCE[case.query.dtype]
    with pytest.raises(EmulationError, match="ended with -4"):
        emulate_decode(config, case, 12, source=trapped)


CLUSTERED = [
    ("turboquant_4bit_nc", 64, 1, {"warps": 1}),
    ("turboquant_4bit_nc", 128, 4, {"warps": 4, "head_warps": 2, "lookup": "spread"}),
    ("turboquant_4bit_nc", 256, 8, {"warps": 4, "dim_warps": 2, "lookup": "spread"}),
    ("turboquant_4bit_nc", 512, 16, {"warps": 8, "dim_warps": 4}),
    ("turboquant_3bit_nc", 128, 6, {"warps": 2, "dim_warps": 2, "load": "direct", "stages": 1}),
    ("turboquant_k3v4_nc", 256, 4, {"warps": 4, "head_warps": 4, "load": "bulk", "stages": 1}),
    ("turboquant_k8v4", 512, 8, {"warps": 2, "dim_warps": 2, "stages": 1}),
    ("turboquant_k8v4", 64, 16, {"warps": 4, "head_warps": 4, "load": "bulk_rows"}),
    ("turboquant_outlier", 128, 4, {"warps": 2, "dim_warps": 2}),
    ("turboquant_outlier", 64, 6, {"warps": 2, "math": "fma", "accumulate": "f32"}),
    ("turboquant_seed", 128, 8, {"warps": 2, "head_warps": 2}),
    ("turboquant_4bit_nc", 128, 4, {"warps": 8, "head_warps": 4, "load": "bulk", "beginning": "prompt"}),
    ("turboquant_3bit_nc", 256, 8, {"warps": 4, "dim_warps": 2, "stages": 1, "beginning": "prompt"}),
    ("turboquant_4bit_nc", 64, 3, {"warps": 2, "beginning": "prompt"}),
    ("turboquant_4bit_nc", 128, 4, {"warps": 8, "beginning": "prompt"}),
    ("turboquant_3bit_nc", 256, 8, {"warps": 8, "dim_warps": 4, "stages": 1, "beginning": "prompt"}),
    ("turboquant_k8v4", 128, 16, {"warps": 4, "head_warps": 2, "load": "bulk", "stages": 1, "beginning": "prompt"}),
]
"""Formats, head dims, groups and layouts of CTAs that a cluster has to add up."""


@pytest.mark.parametrize("index", range(len(CLUSTERED)))
def test_clusters_of_splits(index: int) -> None:
    """Fewer parts than a cluster has CTAs, whole clusters and one more, and clusters of which only some have parts."""
    cache_format, head_dim, gqa, values = CLUSTERED[index]
    size = (8, 2, 4)[index % 3]
    problem = Problem("decode", head_dim, gqa, cache_format)
    config = default_config(problem).with_(reduction=f"cluster{size}", **values)
    assert not get_space("decode").refusals(config, get_target("sm_90"))
    step = 16 * DecodePlan(config).token_warps * DecodePlan(config).tiles
    most = 18 if size == 8 else 26
    case = small_case(config, (0, most * step + 1, 1, 9 * step, 3 * step - 5))
    for splits in sorted({1, 3, size, size + 1, 2 * size}):
        check(config, case, splits, seed=splits, concurrent_ctas=1 + splits % 9)
    some = emulate_decode(config, case, most, seed=26, concurrent_ctas=9)
    assert worst_head_error(some, case.expected()) <= TOLERANCE[case.query.dtype]
    assert torch.equal(some, emulate_decode(config, case, most, concurrent_ctas=20))


@pytest.mark.parametrize("beginning", ["ordered", "prompt"])
@pytest.mark.parametrize("head_warps", [2, 4])
def test_clusters_of_more_heads_than_there_are(head_warps: int, beginning: str) -> None:
    config = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))
    config = config.with_(warps=4, head_warps=head_warps, reduction="cluster8", beginning=beginning)
    case = synthetic_cache(config.problem.layout, (700, 33), q_heads=12, kv_heads=3)
    for splits in (3, 20):
        check(config, case, splits)
