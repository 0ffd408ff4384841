"""The space of wph_store: landmarks, constraints and the shape that template and launch share."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tuner.errors import UsageError
from tuner.formats import FORMATS, HEAD_DIMS
from tuner.geometry import entry_points, store_geometry
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.space.store import CHUNK, RUNS, shape
from tuner.targets import ARCHS, get_target

SPACE = get_space("store")
PROBLEMS = [Problem("store", d, 1, f) for f in FORMATS for d in HEAD_DIMS]


def refusals(config: Config, arch: str = "sm_121") -> set[str]:
    return {c.name for c in SPACE.refusals(config, get_target(arch))}


def config(format_name: str = "turboquant_4bit_nc", head_dim: int = 128, **changes: int | str) -> Config:
    return seed_config(Problem("store", head_dim, 1, format_name)).with_(**changes)


def anything(rng: random.Random) -> Config:
    return Config(rng.choice(PROBLEMS), tuple((a.name, rng.choice(a.values)) for a in SPACE.axes))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.cache_format}-{p.head_dim}")
def test_landmarks_are_allowed_on_every_gpu(problem: Problem) -> None:
    for landmark in (default_config(problem), seed_config(problem)):
        assert SPACE.validate(landmark) == landmark
        assert entry_points(landmark) == ("wph_store",)
        for arch in ARCHS:
            assert refusals(landmark, arch) == set()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.cache_format}-{p.head_dim}")
def test_leads_are_distinct_and_allowed(problem: Problem) -> None:
    leads = SPACE.leads(problem, 8)
    assert len(set(leads)) == len(leads) >= 5
    for lead in leads:
        assert SPACE.validate(lead) == lead
        assert refusals(lead, "sm_90") == set(), lead.describe()
    runs = set(RUNS) if not problem.layout.format.separate_planes else set()
    assert {c["store"] for c in leads} == {"direct", "staged"} | runs
    assert {c["sides"] for c in leads} >= {"together", "apart"}


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("row_too_wide", {"head_dim": 512, "chunks": 1}),
        ("row_too_narrow", {"head_dim": 64, "chunks": 4}),
        ("side_warps", {"warps": 1, "sides": "apart"}),
        ("no_codebook", {"format_name": "turboquant_k8v4", "search": "cells"}),
        ("no_rotation", {"format_name": "turboquant_k8v4", "search": "select", "transform": "tensor", "chunks": 2}),
        ("no_rotation", {"format_name": "turboquant_seed_dense", "transform": "tensor", "chunks": 2}),
        ("product_shape", {"transform": "tensor", "chunks": 1}),
        ("product_shape", {"transform": "tensor", "chunks": 4}),
        ("direct_width", {"store_bytes": 8}),
        ("no_run", {"store": "run", "sides": "turns"}),
        ("no_run", {"store": "run", "sides": "together", "format_name": "turboquant_seed"}),
        ("slots_ahead", {"store": "ahead", "sides": "together", "chunks": 2, "passes": 8, "rows": 2}),
        ("copies_ahead", {"store": "run", "sides": "copied"}),
        ("two_loops", {"loop": "two", "sides": "together"}),
        ("passes_together", {"passes": 2, "sides": "turns"}),
        ("occupancy", {"warps": 16, "min_ctas": 4}),
        ("registers", {"warps": 8, "min_ctas": 6, "rows": 8, "sides": "together"}),
        ("shared_memory", {"format_name": "turboquant_outlier", "head_dim": 512, "chunks": 2, "warps": 16}),
    ],
)
def test_constraints_refuse(reason: str, changes: dict[str, Any]) -> None:
    extra = {"chunks": 4, "head_dim": 512, "min_ctas": 3, "store": "staged"} if reason == "shared_memory" else {}
    assert reason in refusals(config(**(changes | extra)))


def test_every_constraint_gives_its_reason_and_is_not_vacuous() -> None:
    rng = random.Random(0)
    refused: set[str] = set()
    for _ in range(4000):
        refused |= refusals(anything(rng))
    assert refused == {c.name for c in SPACE.constraints}
    assert all(len(c.reason) > 20 for c in SPACE.constraints)


def test_every_axis_value_survives_for_some_problem() -> None:
    rng = random.Random(1)
    alive: set[tuple[str, int | str]] = set()
    for _ in range(4000):
        candidate = anything(rng)
        if not refusals(candidate, "sm_90"):
            alive |= set(candidate.params)
    assert alive == {(a.name, v) for a in SPACE.axes for v in a.values}


def test_shape_covers_a_row_exactly_and_keeps_rows_apart() -> None:
    rng = random.Random(2)
    for _ in range(1000):
        candidate = anything(rng)
        if refusals(candidate):
            continue
        s, layout = shape(candidate), candidate.problem.layout
        assert s.lanes * CHUNK * candidate["chunks"] == layout.block_d == layout.head_dim
        assert s.lanes * s.rows_per_pass == 32
        assert s.warp_bytes % 16 == 0 and s.shared_bytes == candidate["warps"] * s.warp_bytes
        assert bool(s.copied_bytes) == (candidate["sides"] == "copied")
        if candidate["store"] in RUNS:
            assert s.joint and s.row_bytes == layout.content_bytes
            assert (
                s.row_bytes * s.rows_per_pass + max(15, candidate["store_bytes"] + 4) <= s.warp_bytes - s.copied_bytes
            )
        if candidate["store"] == "staged":
            assert (s.lead_bytes + layout.key.indices_offset) % 4 == 0
            assert s.joint == (candidate["sides"] == "together" and not layout.format.separate_planes)
            written = layout.content_bytes if s.joint else max(layout.key.size, layout.value.size)
            end = s.gather_bytes + s.lead_bytes + written
            assert end + candidate["store_bytes"] <= s.row_bytes
        assert s.shared_bytes <= get_target("sm_121").shared_bytes_per_cta


def test_geometry_covers_all_rows_once() -> None:
    default = default_config(Problem("store", 128, 1, "turboquant_4bit_nc"))
    pairs = shape(default).pairs
    g = store_geometry(default, tokens=8192, kv_heads=7)
    assert g.grid[0] * pairs >= 8192 * 7 > (g.grid[0] - 1) * pairs
    assert g.grid[1:] == (1, 1) and g.block == 32 * default["warps"]
    assert shape(default.with_(sides="apart")).pairs == pairs // 2
    assert shape(default.with_(passes=4)).pairs == pairs * 4


def test_unknown_values_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="axis search cannot be 'guess'"):
        SPACE.validate(config(search="guess"))
