"""What the constraints of ``wph_decode``'s space allow and refuse, and what its axes come to."""

from __future__ import annotations

import pytest

from tuner.formats import FORMATS, HEAD_DIMS
from tuner.space import Config, Problem, default_config, get_space
from tuner.space.plan import DecodePlan
from tuner.targets import get_target

SPACE = get_space("decode")


def refusals(config: Config) -> list[str]:
    return [constraint.name for constraint in SPACE.refusals(config, get_target("sm_90"))]


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
    segments = DecodePlan(config.with_(reduction="all_segments"))
    assert [segments.share_parts(1, n) for n in (2, 8, 9, 16, 17, 32, 33, 132)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [segments.share_parts(n, 132) for n in (1, 2, 3, 4, 5)] == [8, 4, 2, 2, 1]


@pytest.mark.parametrize(
    ("head_dim", "gqa", "head_warps", "words"),
    [(64, 4, 1, 1), (128, 8, 8, 2), (256, 6, 4, 2), (512, 8, 4, 4), (512, 8, 16, 4)],
)
def test_shares_are_as_many_as_segments_and_four_words_of_bits_at_most(
    head_dim: int, gqa: int, head_warps: int, words: int
) -> None:
    config = default_config(Problem("decode", head_dim, gqa, "turboquant_4bit_nc")).with_(head_warps=head_warps)
    plan = DecodePlan(config.with_(reduction="all_segments"))
    assert (plan.share_words, plan.arrival_counters, plan.most_shares) == (words, 4 * words, 32 * words)
    assert DecodePlan(config.with_(reduction="all_threads")).most_shares == 32


def test_rows_are_read_in_whole_words_where_values_begin_within_them() -> None:
    ways = ("whole", "whole_adjacent")
    for name, allowed in (("turboquant_k3v4_nc", ["whole"]), ("turboquant_3bit_nc", []), ("turboquant_k8v4", [])):
        bulk = default_config(Problem("decode", 128, 4, name)).with_(load="bulk", head_warps=8, warps=8)
        assert [words for words in ways if not refusals(bulk.with_(words=words))] == allowed


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FORMATS)
def test_squares_are_chained_where_keys_have_lengths_to_divide_by(name: str, head_dim: int) -> None:
    config = default_config(Problem("decode", head_dim, 1, name)).with_(stages=1, squares=2)
    corrected = config.problem.layout.format.norm_correction
    for dim_warps in (1, 2, 4):
        found = refusals(config.with_(dim_warps=dim_warps))
        if config.problem.layout.block_d // dim_warps >= 64:  # a multiple of two k-steps
            assert found == ([] if corrected else ["chained_squares"])
        else:
            assert "slice" in found


def test_squares_are_chained_as_precise_sums_of_tensor_cores_only() -> None:
    config = default_config(Problem("decode", 64, 4, "turboquant_3bit_nc")).with_(squares=2)
    assert refusals(config) == []
    for accumulate in ("f32", "f16x2"):
        without = config.with_(math="fma", accumulate=accumulate)
        assert refusals(without) == ["chained_squares"] and refusals(without.with_(squares=1)) == []
    assert refusals(config.with_(accumulate="f32")) == ["precise_sums", "chained_squares"]
