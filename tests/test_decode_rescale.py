"""Sums of ``wph_decode`` that shrink only where weights would exceed 2^8: on the emulator, against float64."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import emulated
import pytest
import torch
from decode_emulated import check, small_case, stored_case
from torch import Tensor

from tuner.emulate import compile_many
from tuner.reference import Case, make_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space
from tuner.space.core import Value
from tuner.targets import get_target

FORMATS = ("turboquant_4bit_nc", "turboquant_3bit_nc", "turboquant_k8v4")
LAYOUTS: dict[str, dict[str, Value]] = {
    "default": {},
    "two tiles of tokens": {"tokens": 32, "tail": "apart", "beginning": "prompt"},
    "channels divided": {"warps": 4, "dim_warps": 2},
}


def lazy(cache_format: str, layout: str = "default", gqa: int = 4) -> Config:
    config = default_config(Problem("decode", 128, gqa, cache_format))
    return config.with_(rescale="lazy", **LAYOUTS[layout])


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_many([render(lazy(name, layout)) for name in FORMATS for layout in LAYOUTS], jobs=2)


def growing(config: Config, bits: float, size: float = 1.0) -> Case:
    """400 tokens whose scores grow, in all by ``bits`` in binary logarithms; values deviate by ``size``."""
    problem, generator, tokens = config.problem, torch.Generator().manual_seed(1), 400
    cache = make_cache(problem.layout, tokens // 16, 16, 1, generator=generator)
    query = torch.randn(problem.head_dim, generator=generator)
    scores = torch.linspace(-bits / 2, bits / 2, tokens) * math.log(2)
    key = scores[:, None] * query / query.square().sum() * problem.head_dim**0.5
    value = size * torch.randn(tokens, 1, problem.head_dim, generator=generator)
    return stored_case(problem, cache, query.expand(problem.gqa, -1), key[:, None], value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_slow_and_steep_scores(cache_format: str, layout: str) -> None:
    """Weights above one that never shrink, that shrink now and then, and scores of many nats in any order."""
    config = lazy(cache_format, layout)
    assert not get_space("decode").refusals(config, get_target("sm_90"))
    for bits in (7.0, 30.0, 200.0):
        for splits in (1, 3):
            check(config, growing(config, bits), splits)
    case = small_case(config)
    for factor in (1.0, 8.0, 30.0):
        check(config, replace(case, query=case.query * factor))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_halves_hold_the_weights_whatever_the_values_size(cache_format: str, size: float) -> None:
    config = lazy(cache_format)
    case = growing(config, 30.0, size)
    out = emulated.emulate_decode(config, case, 1)
    expected = case.expected()
    assert (out - expected).abs().max() <= 5e-3 * expected.abs().max()


@pytest.mark.parametrize("gqa", [1, 8, 16])
def test_groups(gqa: int) -> None:
    config = lazy("turboquant_4bit_nc", gqa=gqa)
    check(config, growing(config, 30.0), 2)


def scored(config: Config, scores: Tensor) -> Case:
    """Tokens that score ``scores`` [query heads, tokens], in binary logarithms and but for a little noise."""
    problem, generator = config.problem, torch.Generator().manual_seed(1)
    dim, tokens = problem.head_dim, scores.shape[1]
    cache = make_cache(problem.layout, tokens // 16, 16, 1, generator=generator)
    queries = torch.linalg.qr(torch.randn(dim, problem.gqa, generator=generator))[0].T * dim**0.5
    key = 0.1 * torch.randn(tokens, dim, generator=generator) + math.log(2) * scores.T @ queries / dim**0.5
    return stored_case(problem, cache, queries, key[:, None], torch.randn(tokens, 1, dim, generator=generator))


def spike(config: Config, token: int, head: int) -> Case:
    """400 tokens, of which one scores 30 bits more than all others, with one query head."""
    scores = torch.zeros(config.problem.gqa, 400)
    scores[head, token] = 30
    return scored(config, scores)


SPIKES = ((322, 0), (330, 0), (340, 0), (346, 0), (322, 1), (322, 9), (346, 15))
"""Tokens in all quarters of a step of 32, heads on all places of a lane."""


def test_one_score_of_one_head_is_enough() -> None:
    config = lazy("turboquant_4bit_nc", gqa=16).with_(warps=1, tokens=32)
    for token, head in SPIKES:
        check(config, spike(config, token, head), 1)


@pytest.mark.parametrize(("bits", "enough"), [(6.0, True), (30.0, False)])
def test_weights_of_less_than_2_to_the_8_need_one_maximum(
    bits: float, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sums shrink in a warp's first step alone, nothing is lost but what halves do not hold."""
    config = lazy("turboquant_4bit_nc").with_(warps=1)
    mutant, count = re.subn(r"vote_any\(grown\)", "vote_any(grown && acc.largest[0] == LOWEST)", render(config).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    case = growing(config, bits)
    if enough:
        check(config, case, 1)
    else:
        with pytest.raises(AssertionError):
            check(config, case, 1)


def test_sums_shrink_only_where_weights_would_exceed_2_to_the_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spoils a sum whenever it shrinks, but for the first time, is right for 6 bits, not for 10."""
    config = lazy("turboquant_4bit_nc").with_(warps=1)
    spoilt, count = re.subn(
        r"if \(vote_any\(grown\)\) ",
        "if (vote_any(grown)) acc.total[0] = acc.largest[0] == LOWEST ? 0.f : 0.f / 0.f;\n    if (vote_any(grown)) ",
        render(config).text,
    )
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=spoilt))
    check(config, growing(config, 6.0), 1)
    assert emulated.emulate_decode(config, growing(config, 10.0), 1).isnan().any()


def test_heads_keep_their_maxima_while_anothers_grows() -> None:
    """One head's scores grow by 300 bits in 300 tokens; another's first token outweighs all, the others' are flat."""
    config = lazy("turboquant_4bit_nc").with_(warps=1)
    scores = torch.zeros(config.problem.gqa, 400)
    scores[1, 100:] = torch.linspace(0, 300, 300)
    scores[2, 0] = 300
    check(config, scored(config, scores), 1)


def test_halves_hold_weights_far_below_the_greatest() -> None:
    """The first of 1600 tokens outweighs each of the others 2^12 times; its value is minus theirs."""
    config = lazy("turboquant_4bit_nc").with_(warps=1)
    problem, generator, tokens = config.problem, torch.Generator().manual_seed(1), 1600
    cache = make_cache(problem.layout, tokens // 16, 16, 1, generator=generator)
    query, value = torch.randn(2, problem.head_dim, generator=generator)
    key = torch.zeros(tokens, 1, problem.head_dim)
    key[0] = 12.4 * math.log(2) * query / query.square().sum() * problem.head_dim**0.5
    sign = torch.ones(tokens, 1, 1)
    sign[0] = -1
    check(config, stored_case(problem, cache, query.expand(problem.gqa, -1), key, sign * value), 1)


def test_only_halves_that_hold_the_scales_of_values_may_be_lazy() -> None:
    for other in (
        lazy("turboquant_4bit_nc").with_(math="fma", accumulate="f32", query="shared"),
        default_config(Problem("decode", 128, 4, "turboquant_seed")).with_(rescale="lazy"),
    ):
        assert "lazy_rescaling" in [c.name for c in get_space("decode").refusals(other, get_target("sm_90"))]
