"""A query that is filed where a stage of ``wph_decode`` will lie, on the emulator, against the float64 reference."""

from __future__ import annotations

import pytest
from decode_emulated import check, small_case

from tuner.space import Problem, default_config, get_space
from tuner.space.core import Value
from tuner.targets import get_target

FORMAT = "turboquant_4bit_nc"
LEAN: dict[str, Value] = {"tail": "apart", "beginning": "prompt"}


@pytest.mark.parametrize(
    ("head_dim", "gqa", "how"),
    [
        (128, 8, LEAN | {"schedule": "grid", "reduction": "all", "words": "whole"}),
        (128, 6, LEAN | {"schedule": "deal", "lead": 8, "stages": 3, "words": "whole_adjacent"}),
        (128, 16, {"schedule": "share", "head_warps": 4, "warps": 8, "tokens": 64, "lookup": "table"}),
        (128, 8, LEAN | {"schedule": "stream", "load": "bulk_rows", "head_warps": 8, "warps": 16}),
        (256, 5, LEAN | {"schedule": "grid", "reduction": "cluster4", "lookup": "prmt"}),
    ],
)
@pytest.mark.parametrize("splits", [2, 3, 13])
def test_a_query_that_borrows_a_stage(head_dim: int, gqa: int, how: dict[str, Value], splits: int) -> None:
    """Spans of odd and even numbers of steps, so that stages change places, and of none at all."""
    layout: dict[str, Value] = {"warps": 4, "head_warps": 2, "dim_warps": 2, "load": "bulk", "tokens": 32}
    config = default_config(Problem("decode", head_dim, gqa, FORMAT)).with_(query="borrowed", lookup="woven", **layout)
    config = config.with_(**how)
    assert not get_space("decode").refusals(config, get_target("sm_90"))
    check(config, small_case(config, (333, 0, 1, 64, 150, 33)), splits, seed=splits, concurrent_ctas=1 + splits % 4)
