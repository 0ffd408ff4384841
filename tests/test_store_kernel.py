"""wph_store on the emulator, byte by byte against the reference: the matrix of layouts, then numbers and arguments."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from covering import covering
from emulated import emulate_store, needs_gxx
from store_emulated import (
    JOINT,
    RUN_STORES,
    STORES,
    UNEVEN,
    check,
    compiled,
    problem_config,
    small_case,
    twin,
    with_quotients_before_a_half,
)

import tuner
from tuner.arguments import store_params
from tuner.build import build
from tuner.check_store import StoreCase, check_store, compare, store_case
from tuner.errors import UsageError
from tuner.formats import FORMATS, HEAD_DIMS
from tuner.reference import Codec, make_cache, midpoints, store
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.space.store import RUNS
from tuner.targets import get_target

TARGET = get_target("sm_90")
SPACE = get_space("store")
RUN_STORES_OF = {64: RUN_STORES[2:], 128: RUN_STORES, 256: RUN_STORES[:1], 512: RUN_STORES[1:2]}
"""What rotations are tested with: all at one head dim, and each at one of the others."""


def draw(rng: random.Random, problem: Problem, warps: int) -> Config:
    """Random axis values, the dependent ones set to what their constraints leave."""
    values = {a.name: rng.choice(a.values) for a in SPACE.axes} | {"warps": warps}
    fmt = problem.layout.format
    if not fmt.key_codebook:
        values |= {"search": "select"}
    if not fmt.key_codebook or fmt.has_signs:
        values |= {"transform": "shuffle"}
    if fmt.separate_planes and values["sides"] == "copied":
        values |= {"sides": "together"}
    if values["sides"] == "copied":
        return SPACE.config(problem, values | {"store": "ahead"})
    if values["sides"] != "together" or fmt.separate_planes:
        values |= {"passes": 1, "store": "staged" if values["store"] in RUNS else values["store"]}
    values |= {"loop": "one"}
    return SPACE.config(problem, values)


@cache
def matrix() -> dict[tuple[str, int], list[Config]]:
    return covering(SPACE, TARGET, draw)


def test_matrix_reaches_every_axis_value() -> None:
    configs = [config for some in matrix().values() for config in some]
    assert {(a.name, v) for a in SPACE.axes for v in a.values} == {pair for c in configs for pair in c.params}


@needs_gxx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_matrix(format_name: str, head_dim: int) -> None:
    configs = matrix()[format_name, head_dim]
    compiled(*configs)
    for i, config in enumerate(configs):
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        check(config, small_case(format_name, head_dim, kv_heads=1 + i % 3, dtype=dtype), seed=i)


@needs_gxx
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d >= 128])
@pytest.mark.parametrize("format_name", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_rotation_by_products(format_name: str, head_dim: int) -> None:
    """Every number of lanes that hold a row, both dtypes, and rows whose squares fp32 does not hold."""
    configs = [
        problem_config(format_name, head_dim, transform="tensor", chunks=chunks, search="cells", **how)
        for chunks, how in ((2, STORES[0]), (2, STORES[2]), (4, STORES[3]))
        if head_dim // (8 * chunks) in (8, 16, 32)
    ]
    configs += [configs[0].with_(search="packed", store_bytes=16, passes=2, **how) for how in RUN_STORES_OF[head_dim]]
    compiled(*configs)
    for i, config in enumerate(configs):
        for dtype in (torch.bfloat16, torch.float16):
            check(config, small_case(format_name, head_dim, tokens=22, kv_heads=1 + i, dtype=dtype), seed=i)


@needs_gxx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_rotation_by_quads(format_name: str, head_dim: int) -> None:
    """Every number of chunks and quads that hold a row, both dtypes, midpoints with their codes and without."""
    chunks = [n for n in (1, 2, 4) if 4 <= head_dim // (8 * n) <= 32]
    configs = [
        problem_config(format_name, head_dim, transform="quads", chunks=n, search=search, **STORES[i % 4])
        for i, (n, search) in enumerate((n, s) for n in chunks for s in ("cells", "packed"))
    ]
    configs += [configs[-1].with_(store_bytes=16, passes=2, **how) for how in RUN_STORES_OF[head_dim]]
    compiled(*configs)
    for i, config in enumerate(configs):
        for dtype in (torch.bfloat16, torch.float16):
            check(config, small_case(format_name, head_dim, tokens=22, kv_heads=1 + i % 3, dtype=dtype), seed=i)


@needs_gxx
@pytest.mark.parametrize("format_name", FORMATS)
def test_gate(format_name: str) -> None:
    config = default_config(Problem("store", 128, 1, format_name))

    def run(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, codec: Codec) -> None:
        emulate_store(config, kv_cache, StoreCase(key, value, slots, kv_cache, codec))

    result = check_store(run, config.problem, level="tiny")
    assert result.passed, result.detail


@needs_gxx
@pytest.mark.parametrize("changes", [{}, {"transform": "quads", "chunks": 4, "search": "packed"}])
def test_indices_hardly_ever_move(changes: dict[str, int | str]) -> None:
    """A hundred thousand key indices: fp32 sums against float64 ones."""
    config = problem_config("turboquant_4bit_nc", 128, **changes)
    difference = check(config, small_case("turboquant_4bit_nc", 128, tokens=500, kv_heads=2))
    assert difference.indices > 100_000
    assert difference.moved <= 1e-4 * difference.indices


# --- hazards ----------------------------------------------------------------------------------------------------------


@needs_gxx
@pytest.mark.parametrize(
    ("format_name", "changes"),
    [
        ("turboquant_k8v4", {}),
        ("turboquant_3bit_nc", {}),
        ("turboquant_3bit_nc", {"transform": "tensor", "chunks": 2}),
        ("turboquant_3bit_nc", {"transform": "quads", "chunks": 4, "search": "packed"}),
        ("turboquant_seed_dense", {}),
    ],
)
def test_extremes_saturate(format_name: str, changes: dict[str, int | str]) -> None:
    """Norms, scales and zero points beyond fp16, squares and ranges beyond fp32, and zeros."""
    config = problem_config(format_name, 128, **changes)
    case = small_case(format_name, 128, tokens=12)
    factors = torch.tensor([0.0, 1e-30, 1e-9, 1e-4, 500.0, 7e4, 1e10, 1e25, 3e37, 1e38, -1e5, 1.0])
    key, value = (
        torch.randn(2, 12, 2, 128, generator=torch.Generator().manual_seed(1)).clamp(-3, 3) * factors[:, None, None]
    ).bfloat16()
    check(config, replace(case, key=key, value=value))
    got = twin(case.before)
    emulate_store(config, got, replace(case, key=key, value=value))
    layout = case.codec.layout
    slots = case.slot_mapping
    for token in (6, 7, 8):
        slot = got[(int(slots[token]) // 16, *([1] if got.dim() == 5 else []), int(slots[token]) % 16)]
        row = layout.value
        at = layout.value_offset + (row.norm_offset if row.scale_offset is None else row.scale_offset)  # type: ignore[operator]
        assert slot[:, at : at + 2].contiguous().view(torch.float16).flatten().tolist() == [65504.0] * 2


@needs_gxx
@pytest.mark.parametrize("format_name", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_value_ties_fall_as_in_the_reference(format_name: str) -> None:
    """Evenly spaced values meet the middle between two levels exactly; no byte may be off."""
    config = problem_config(format_name, 256)
    case = small_case(format_name, 256, tokens=40)
    steps = torch.arange(256.0).reshape(1, 1, 256)
    spacing = torch.arange(1, 41).reshape(40, 1, 1) / 8
    value = ((steps % 31) * spacing - 3).expand(40, 2, 256).bfloat16()
    check(config, replace(case, value=value))


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_name", ["turboquant_4bit_nc", "turboquant_3bit_nc"])
@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("loop", ["one", "two"])
def test_the_number_before_a_half_is_rounded_up(
    loop: str, cancels: bool, format_name: str, dtype: torch.dtype
) -> None:
    """Its sum with a half is one, in fp32 as in the reference; no byte may be off."""
    config = problem_config(
        format_name, 128, transform="quads", search="packed", chunks=4, sides="copied", store="ahead", loop=loop
    )
    case = small_case(format_name, 128, dtype=dtype)
    value = with_quotients_before_a_half(case.value, FORMATS[format_name].value_bits, cancels)
    low, high = value.float().amin(-1, keepdim=True), value.float().amax(-1, keepdim=True)
    quotient = (value.float() - low) / ((high - low) / torch.tensor(2.0 ** FORMATS[format_name].value_bits - 1))
    assert (quotient == torch.tensor(0.5) - 2.0**-25).any(-1).float().mean() > 0.3
    check(config, replace(case, value=value, slot_mapping=torch.arange(3, 14)))  # a run, as the short loop wants it


@needs_gxx
@pytest.mark.parametrize("search", ["select", "chain", "cells", "packed"])
def test_any_ascending_codebook(search: str) -> None:
    """Levels so uneven that two midpoints share a cell, equal levels, and coefficients exactly on a midpoint."""
    config = problem_config("turboquant_3bit_nc", 64, search=search)
    case = small_case("turboquant_3bit_nc", 64)
    level = 64**-0.5
    on_midpoints = (
        torch.tensor([-3, -2, -1.5, -1, 0, 1, 2, 4.0]) * level
    )  # of a one-hot row all coefficients are +-level
    one_hot = torch.zeros_like(case.key)
    one_hot[..., 0], one_hot[1::2, :, 5] = 2.0, 0.0
    for centroids in (UNEVEN, on_midpoints):
        check(config, replace(case, codec=replace(case.codec, centroids=centroids)))
        check(config, replace(case, key=one_hot, codec=replace(case.codec, centroids=centroids)))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_cell_holds_two_midpoints_of_the_formats(bits: int, head_dim: int) -> None:
    """Else search=cells would take its slow way: cells are 1/31 of the midpoints' range."""
    name = {3: "turboquant_3bit_nc", 4: "turboquant_4bit_nc"}[bits]
    middle = midpoints(Codec.for_layout(Problem("store", head_dim, 1, name).layout).centroids)
    cell = ((middle - middle[0]) * (31 / (middle[-1] - middle[0]))).double()
    assert float(cell.diff().min()) > 1.01


@needs_gxx
@pytest.mark.parametrize("transform", ["shuffle", "tensor", "quads"])
@pytest.mark.parametrize(
    ("search", "write"),
    [
        ("select", {}),
        ("cells", {"store": "staged"}),
        *(("packed", how | {"passes": 2}) for how in RUN_STORES),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_rows_with_nan_or_infinity_harm_no_other(search: str, write: dict[str, int | str], transform: str) -> None:
    config = problem_config("turboquant_4bit_nc", 128, search=search, transform=transform, chunks=2, **write)
    case = small_case("turboquant_4bit_nc", 128)
    broken = replace(case, key=case.key.clone(), value=case.value.clone())
    broken.key[3, 0], broken.value[3, 0] = float("nan"), float("inf")
    ours, clean = twin(case.before), twin(case.before)
    emulate_store(config, ours, broken)
    emulate_store(config, clean, case)
    where = int(case.slot_mapping[3]) // 16, int(case.slot_mapping[3]) % 16, 0
    assert not torch.equal(ours[where], clean[where])
    ours[where] = clean[where]
    assert torch.equal(ours, clean)


# --- arguments --------------------------------------------------------------------------------------------------------


def params_of(case: StoreCase, **changes: object) -> object:
    c = replace(case, **changes)  # type: ignore[arg-type]
    return store_params(
        c.before, c.key, c.value, c.slot_mapping, cache_format="turboquant_4bit_nc", centroids=c.codec.centroids
    )[0]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("value is float16: expected bfloat16", {"value": torch.zeros(11, 2, 64).half()}),
        ("slot_mapping is float32", {"slot_mapping": torch.zeros(11)}),
        ("slot_mapping has stride 2|last stride 2", {"slot_mapping": torch.zeros(22, dtype=torch.int32)[::2]}),
        ("key has 11 tokens but slot_mapping 12", {"slot_mapping": torch.zeros(12, dtype=torch.int32)}),
        ("value has shape .11, 3, 64.: expected that of key", {"value": torch.zeros(11, 3, 64).bfloat16()}),
        (
            "key has 2 heads but kv_cache 3",
            {"before": make_cache(Problem("store", 64, 1, "turboquant_4bit_nc").layout, 2, 16, 3)},
        ),
        ("slots and .* rows", {"before": torch.zeros(70, dtype=torch.uint8).expand(1 << 28, 16, 2, 70)}),
        ("last stride 2", {"key": torch.zeros(11, 2, 128).bfloat16()[..., ::2]}),
    ],
)
def test_arguments_are_refused_by_name(message: str, changes: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=message):
        params_of(small_case("turboquant_4bit_nc", 64), **changes)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_gate_on_the_gpu(format_name: str, head_dim: int) -> None:
    def run(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, codec: Codec) -> None:
        constants = {"centroids": codec.centroids, "signs": codec.signs, "channels": codec.channels}
        tuner.store(kv_cache, key, value, slots, cache_format=format_name, **constants)

    result = check_store(run, Problem("store", head_dim, 1, format_name), device="cuda", level="full")
    assert result.passed, result.detail


@pytest.mark.gpu
def test_replay_with_other_rows_and_slots_than_at_capture() -> None:
    problem = Problem("store", 128, 1, "turboquant_3bit_nc")
    first, later = (store_case(problem, 40, kv_heads=8, seed=seed, device="cuda") for seed in (1, 2))
    got, want = twin(first.before), twin(first.before)
    store(want, later.key, later.value, later.slot_mapping, later.codec)
    inputs = [first.key.clone(), first.value.clone(), first.slot_mapping.clone()]
    tuner.store(twin(got), *inputs, cache_format="turboquant_3bit_nc")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tuner.store(got, *inputs, cache_format="turboquant_3bit_nc")
    for old, new in zip(inputs, (later.key, later.value, later.slot_mapping), strict=True):
        old.copy_(new)
    graph.replay()
    assert compare(got, want, replace(later, before=first.before)).fault is None


# --- what the compiler makes of it ------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("arch", ["sm_121", "sm_90"])
def test_default_and_seed_layouts_do_not_spill(arch: str) -> None:
    problems = [Problem("store", 128, 1, f) for f in FORMATS]
    problems += [Problem("store", 512, 1, f) for f in ("turboquant_4bit_nc", "turboquant_seed")]
    products = problem_config("turboquant_4bit_nc", 128, transform="tensor", chunks=2, search="cells", **STORES[2])
    if arch == "sm_121":  # where no GPU was at hand a search would not tell; of leads that differ in passes, the most
        leads = [lead for f in JOINT for lead in SPACE.leads(Problem("store", 128, 1, f), 8) if lead["store"] in RUNS]
        chunks = list({lead.with_(passes=1): lead for lead in sorted(leads, key=lambda lead: lead["passes"])}.values())
        assert len(chunks) >= 5 * len(JOINT)
    else:
        chunks = []
    configs = [default_config(p) for p in problems] + [seed_config(problems[1]), products, *chunks]
    results = build([render(c) for c in configs], [arch])
    assert len(results) == len(configs)
    for built in results.values():
        assert not hasattr(built, "message"), built
        assert built.spill_bytes == 0, built
