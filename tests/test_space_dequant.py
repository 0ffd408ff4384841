"""The space of wph_dequant: landmarks, constraints and the shape that template and launch share."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tuner.errors import UsageError
from tuner.formats import FORMATS, HEAD_DIMS
from tuner.geometry import dequant_geometry
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.space.dequant import shape
from tuner.targets import ARCHS, get_target

SPACE = get_space("dequant")
PROBLEMS = [Problem("dequant", d, 1, f) for f in FORMATS for d in HEAD_DIMS]


def refusals(config: Config, arch: str = "sm_121") -> set[str]:
    return {c.name for c in SPACE.refusals(config, get_target(arch))}


def config(format_name: str = "turboquant_4bit_nc", head_dim: int = 256, **changes: int | str) -> Config:
    return seed_config(Problem("dequant", head_dim, 1, format_name)).with_(**changes)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.cache_format}-{p.head_dim}")
def test_landmarks_are_allowed_on_every_gpu(problem: Problem) -> None:
    for landmark in (default_config(problem), seed_config(problem)):
        assert SPACE.validate(landmark) == landmark
        for arch in ARCHS:
            assert refusals(landmark, arch) == set()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.cache_format}-{p.head_dim}")
def test_seed_layout_is_a_warp_per_row(problem: Problem) -> None:
    seed = seed_config(problem)
    plain = {"warps": 4, "rows": 1, "steps": 1, "transform": "shuffle", "load": "direct"}
    assert {name: seed[name] for name in plain} == plain
    s = shape(seed)
    assert (s.lanes, s.rows_per_pass, s.slots) == (32, 1, 4)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("row_warps", {"warps": 1, "divide": "planes"}),
        ("row_warps", {"warps": 2, "dim_warps": 2, "divide": "planes"}),
        ("dim_split_short", {"head_dim": 128, "dim_warps": 2}),
        ("dim_split_plain", {"format_name": "turboquant_k8v4", "dim_warps": 2}),
        ("dim_split_outliers", {"format_name": "turboquant_seed", "dim_warps": 2}),
        ("barriers", {"warps": 32, "dim_warps": 2}),
        ("no_codebook", {"format_name": "turboquant_k8v4", "lookup": "prmt"}),
        ("no_codebook", {"format_name": "turboquant_k8v4", "transform": "mma"}),
        ("replicated_levels", {"lookup": "replicated"}),
        ("mma_fragment", {"head_dim": 128, "transform": "mma", "store_bytes": 8}),
        ("narrow_store", {"store_bytes": 8}),
        ("direct_width", {"load_bytes": 16}),
        ("direct_width", {"load": "bulk", "load_bytes": 16, "rows": 2}),
        ("bulk_order", {"load": "bulk", "divide": "tokens", "rows": 2}),
        ("bulk_slots", {"load": "bulk"}),
        ("too_many_slots", {"warps": 32, "rows": 8, "steps": 4}),
        ("occupancy", {"warps": 32, "min_ctas": 2}),
        ("registers", {"warps": 16, "min_ctas": 3, "rows": 8}),
        ("shared_memory", {"transform": "half", "lookup": "replicated", "min_ctas": 4}),
    ],
)
def test_constraints_refuse(reason: str, changes: dict[str, Any]) -> None:
    assert reason in refusals(config(**changes))


def test_every_constraint_gives_its_reason_and_is_not_vacuous() -> None:
    rng = random.Random(0)
    refused: set[str] = set()
    for _ in range(4000):
        candidate = Config(rng.choice(PROBLEMS), tuple((a.name, rng.choice(a.values)) for a in SPACE.axes))
        refused |= refusals(candidate)
    assert refused == {c.name for c in SPACE.constraints}
    assert all(len(c.reason) > 20 for c in SPACE.constraints)


def test_every_axis_value_survives_for_some_problem() -> None:
    rng = random.Random(1)
    alive: set[tuple[str, int | str]] = set()
    for _ in range(8000):
        candidate = Config(rng.choice(PROBLEMS), tuple((a.name, rng.choice(a.values)) for a in SPACE.axes))
        if not refusals(candidate, "sm_90"):
            alive |= set(candidate.params)
    assert alive == {(a.name, v) for a in SPACE.axes for v in a.values}


@pytest.mark.parametrize("seed", range(3))
def test_shape_covers_a_row_exactly(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        problem = rng.choice(PROBLEMS)
        candidate = Config(problem, tuple((a.name, rng.choice(a.values)) for a in SPACE.axes))
        if refusals(candidate):
            continue
        s = shape(candidate)
        assert s.chunk * s.lanes * s.repeats * candidate["dim_warps"] == problem.layout.block_d
        assert s.lanes * s.rows_per_pass == 32
        assert s.lookup_bytes <= s.stage_at <= s.scatter_at <= s.exchange_at <= s.shared_bytes
        assert s.shared_bytes <= get_target("sm_121").shared_bytes_per_cta
        if candidate["load"] == "bulk":
            planes = problem.layout.token_bytes // problem.layout.slot_bytes
            assert s.plane_bytes % 16 == 0 and s.plane_bytes >= s.slots * problem.layout.slot_bytes
            assert s.barrier_at == s.stage_at + planes * s.plane_bytes and s.scatter_at >= s.barrier_at + 8


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.cache_format}-{p.head_dim}")
def test_leads_fit_a_block_and_every_gpu_takes_some(problem: Problem) -> None:
    for kv_heads in (1, 2, 8):
        leads = SPACE.leads(problem, kv_heads)
        assert len(set(leads)) == len(leads) and {c["warps"] for c in leads} == {1, 2, 4, 8, 16}
        assert all(c["load"] == "bulk" and c["rows"] * c["steps"] <= 32 for c in leads)
        idle = [c for c in leads if shape(c).slots > max(8, 16 * kv_heads)]
        assert all(c["rows"] == c["steps"] == 1 for c in idle), "no fewer warps do that"
        for arch in ARCHS:
            assert len([c for c in leads if not refusals(c, arch)]) >= 4


def test_geometry_covers_all_slots_and_entries() -> None:
    default = default_config(Problem("dequant", 128, 1, "turboquant_4bit_nc"))
    slots = shape(default).slots
    g = dequant_geometry(default, entries=200_000, block_size=8320, kv_heads=8)
    assert g.grid[0] * slots >= 8320 * 8 > (g.grid[0] - 1) * slots
    assert g.grid[1] * g.grid[2] >= 200_000 and max(g.grid[1:]) <= 65535
    assert g.block == 32 * default["warps"]
    assert dequant_geometry(default, entries=0, block_size=16, kv_heads=1).grid[1:] == (1, 1)


def test_unknown_values_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="axis transform cannot be 'fft'"):
        SPACE.validate(config(transform="fft"))
