"""The landmarks and leads of ``wph_decode``'s space, and recorded kernels as they are tried today."""

from __future__ import annotations

from itertools import product

import pytest

from tuner.formats import FORMATS, HEAD_DIMS
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.space.decode_landmarks import direct_variant
from tuner.targets import ARCHS, get_target

SPACE = get_space("decode")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_default_and_its_direct_variant_suit_every_target(name: str, head_dim: int) -> None:
    for gqa in (1, 5, 8, 16):
        config = default_config(Problem("decode", head_dim, gqa, name))
        for arch in ARCHS:
            for variant in (config, direct_variant(config)):
                assert [c.name for c in SPACE.refusals(variant, get_target(arch))] == [], variant.describe()


def in_sums(*ways: Config) -> tuple[Config, ...]:
    both = product((2, 1), ("lazy", "always"))
    return tuple(way.with_(squares=squares, rescale=rescale) for squares, rescale in both for way in ways)


def test_recorded_kernels_are_renewed() -> None:
    config = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))
    bulk = config.with_(load="bulk", head_warps=8, warps=8)
    assert SPACE.renewed(bulk) == in_sums(bulk.with_(words="whole"))
    assert SPACE.renewed(bulk.with_(words="adjacent")) == in_sums(bulk.with_(words="whole_adjacent"))
    odd = bulk.with_(head_warps=1)  # 134 bytes between tokens
    for other in (config, odd, bulk.with_(words="whole")):
        assert SPACE.renewed(other) == in_sums(other)
    dealt = bulk.with_(words="whole", schedule="deal")
    assert SPACE.renewed(dealt) == in_sums(dealt)
    assert SPACE.renewed(dealt.with_(beginning="prompt")) == in_sums(dealt.with_(beginning="prompt", schedule="allot"))
    waiting = bulk.with_(words="whole", reduction="all")
    assert SPACE.renewed(waiting) == in_sums(waiting)
    segments = waiting.with_(reduction="all_segments", beginning="prompt")
    for reduction in ("all", "all_warps", "all_threads"):
        prompt = segments.with_(reduction=reduction)
        assert SPACE.renewed(prompt) == in_sums(segments, prompt)
    assert SPACE.renewed(segments) == in_sums(segments)


def test_recorded_kernels_keep_the_sums_they_have_or_must_have() -> None:
    config = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))
    plain = default_config(Problem("decode", 128, 4, "turboquant_k8v4"))
    kept = [config.with_(math="fma", accumulate="f32")]
    kept.append(config.with_(accumulate="f32"))  # as kernels were recorded before there were precise sums
    for other in kept:
        assert SPACE.renewed(other) == (other,)
    for other in (config.with_(squares=2), plain):
        assert SPACE.renewed(other) == (other.with_(rescale="lazy"), other)
        assert SPACE.renewed(other.with_(rescale="lazy")) == (other.with_(rescale="lazy"),)


def test_seed_landmark_has_four_warps() -> None:
    assert seed_config(Problem("decode", 256, 8, "turboquant_4bit_nc"))["warps"] == 4


@pytest.mark.parametrize(("head_dim", "gqa", "kv_heads"), [(128, 4, 8), (256, 8, 2), (512, 8, 4), (128, 16, 2)])
def test_leads_are_points_of_the_space_that_serve_small_and_large_batches(
    head_dim: int, gqa: int, kv_heads: int
) -> None:
    leads = SPACE.leads(Problem("decode", head_dim, gqa, "turboquant_4bit_nc"), kv_heads)
    for config in leads:
        assert SPACE.validate(config) == config
        assert config["load"] != "bulk" or config["head_warps"] == kv_heads
    usable = [c for c in leads if not SPACE.refusals(c, get_target("sm_90"))]
    assert {c["load"] for c in usable} == {"bulk", "cp_async"}
    large = {(c["tail"], c["schedule"]) for c in usable if c["load"] == "bulk"}
    assert ("apart", "allot") in large
    assert {c["tail"] for c in usable if c["load"] == "cp_async"} == {"apart", "masked"}
    newer = {"paired"} if gqa <= 4 else {"joined"} if gqa > 8 else {"shared"}
    newer |= {"borrowed" if head_dim == 512 else "registers"} if 4 < gqa <= 8 else set()
    assert {c["query"] for c in usable if c["tail"] == "apart"} == newer


@pytest.mark.parametrize(("kv_heads", "parts"), [(32, {8, 16}), (12, {4}), (9, set())])
def test_where_a_cta_cannot_hold_all_heads_it_takes_a_part_of_them(kv_heads: int, parts: set[int]) -> None:
    leads = SPACE.leads(Problem("decode", 128, 1, "turboquant_k8v4"), kv_heads)
    found = {(c["load"], c["head_warps"]) for c in leads if c["load"] != "cp_async"}
    assert found == {("bulk_rows", heads) for heads in parts} and leads
    for config in leads:
        assert "row_width" not in [c.name for c in SPACE.refusals(config, get_target("sm_90"))]
