"""The landmarks and leads of ``wph_decode``'s space."""

from __future__ import annotations

import pytest

from tuner.formats import FORMATS, HEAD_DIMS
from tuner.space import Problem, default_config, get_space, seed_config
from tuner.space.decode import direct_variant
from tuner.space.plan import DecodePlan
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


def test_warps_that_divide_a_heads_contributions_are_powers_of_two_with_enough_each() -> None:
    config = default_config(Problem("decode", 256, 8, "turboquant_4bit_nc")).with_(warps=8, beginning="prompt")
    plan = DecodePlan(config.with_(reduction="all_warps"))
    assert plan.sums_ahead == 8
    found = [plan.share_parts(1, n) for n in (2, 16, 17, 32, 33, 64, 65, 132)]
    assert found == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [plan.share_parts(heads, 132) for heads in (1, 2, 3, 4, 5, 9)] == [8, 4, 2, 2, 1, 1]
    assert DecodePlan(config.with_(reduction="all")).share_parts(1, 132) == 1
    teams = DecodePlan(config.with_(reduction="all_threads"))  # of two warps
    assert [teams.share_parts(heads, 132) for heads in (1, 2, 3, 4, 5)] == [4, 2, 1, 1, 1]


def test_recorded_kernels_are_renewed() -> None:
    config = default_config(Problem("decode", 128, 4, "turboquant_4bit_nc"))
    bulk = config.with_(load="bulk", head_warps=8, warps=8)
    assert SPACE.renewed(bulk) == (bulk.with_(words="whole"),)
    assert SPACE.renewed(bulk.with_(words="adjacent")) == (bulk.with_(words="whole_adjacent"),)
    odd = bulk.with_(head_warps=1)  # 134 bytes between tokens
    for other in (config, odd, bulk.with_(words="whole")):
        assert SPACE.renewed(other) == (other,)
    dealt = bulk.with_(words="whole", schedule="deal")
    assert SPACE.renewed(dealt) == (dealt,)
    assert SPACE.renewed(dealt.with_(beginning="prompt")) == (dealt.with_(beginning="prompt", schedule="allot"),)
    waiting = bulk.with_(words="whole", reduction="all")
    assert SPACE.renewed(waiting) == (waiting,)
    for reduction in ("all", "all_warps"):
        prompt = waiting.with_(reduction=reduction, beginning="prompt")
        assert SPACE.renewed(prompt) == (prompt.with_(reduction="all_threads"), prompt)
    by_threads = waiting.with_(reduction="all_threads", beginning="prompt")
    assert SPACE.renewed(by_threads) == (by_threads, by_threads.with_(reduction="all_warps"))
    for name, allowed in (("turboquant_k3v4_nc", ["whole"]), ("turboquant_3bit_nc", []), ("turboquant_k8v4", [])):
        format_bulk = default_config(Problem("decode", 128, 4, name)).with_(load="bulk", head_warps=8, warps=8)
        ways = ("whole", "whole_adjacent")
        assert [w for w in ways if not SPACE.refusals(format_bulk.with_(words=w), get_target("sm_90"))] == allowed


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
