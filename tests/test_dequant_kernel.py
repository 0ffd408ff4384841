"""wph_dequant on the emulator, against the float64 reference: the matrix of layouts, then each hazard by itself."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from covering import covering
from emulated import emulate_dequant, needs_gxx
from emulated_sources import skip_without_thread_sanitizer
from odd_caches import restride

from tuner import emulate
from tuner.build import build
from tuner.emulate import EmulationError
from tuner.formats import FORMATS, HEAD_DIMS, slot_layout
from tuner.reference import Case, dequantize, synthetic_cache
from tuner.render import render
from tuner.space import Config, Problem, default_config, get_space, seed_config
from tuner.targets import get_target

TARGET = get_target("sm_121")
SPACE = get_space("dequant")
UNTOUCHED = 0x7FC5
"""A bf16 NaN that no kernel produces."""


def draw(rng: random.Random, problem: Problem, warps: int) -> Config:
    """Random axis values, the dependent ones set to what their constraints leave."""
    values = {a.name: rng.choice(a.values) for a in SPACE.axes} | {"warps": warps}
    if not problem.layout.format.key_codebook:
        values |= {"transform": "shuffle", "lookup": "table", "dim_warps": 1}
    return SPACE.config(problem, values)


@cache
def matrix() -> dict[tuple[str, int], list[Config]]:
    return covering(SPACE, TARGET, draw)


@cache
def compiled(*configs: Config) -> None:
    """Compiles all emulated kernels of a test at once."""
    emulate.compile_many([render(c) for c in configs])


def poisoned_outputs(case: Case, by_block_id: bool, gap: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value outputs, every element UNTOUCHED; ``gap`` elements lie between heads."""
    blocks = case.kv_cache.shape[0] if by_block_id else case.block_table.numel()
    row = case.layout.head_dim
    full = torch.full((2, blocks, case.block_size, case.kv_heads, row + gap), UNTOUCHED, dtype=torch.int16)
    key, value = full[..., :row].view(torch.bfloat16)
    return key, value


def run(
    config: Config,
    case: Case,
    *,
    by_block_id: bool = False,
    sides: str = "kv",
    gap: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value outputs of one emulated launch; a side that is not asked for stays poisoned."""
    key, value = poisoned_outputs(case, by_block_id, gap)
    emulate_dequant(
        config,
        case.codec,
        case.kv_cache,
        key if "k" in sides else None,
        value if "v" in sides else None,
        block_table=case.block_table,
        seq_lens=case.seq_lens,
        by_block_id=by_block_id,
        **options,
    )
    return key, value


def expected_rows(case: Case, by_block_id: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 keys and values where the outputs have them, and a mask [blocks, block_size] of the decoded tokens."""
    keys, values = dequantize(case.kv_cache, case.codec)
    blocks = case.kv_cache.shape[0] if by_block_id else case.block_table.numel()
    k = torch.zeros(blocks, *keys.shape[1:], dtype=torch.float64)
    v = torch.zeros_like(k)
    decoded = torch.zeros(blocks, case.block_size, dtype=torch.bool)
    columns = case.block_table.shape[1]
    for request, length in enumerate(case.seq_lens.tolist()):
        for column in range(-(-length // case.block_size)):
            block = int(case.block_table[request, column])
            to = block if by_block_id else request * columns + column
            n = min(case.block_size, length - column * case.block_size)
            k[to, :n], v[to, :n] = keys[block, :n], values[block, :n]
            decoded[to, :n] = True
    return k, v, decoded


def check(
    config: Config,
    case: Case,
    outputs: tuple[torch.Tensor, torch.Tensor],
    *,
    by_block_id: bool = False,
    sides: str = "kv",
) -> None:
    *references, decoded = expected_rows(case, by_block_id)
    fmt = case.layout.format
    rotated = {"k": fmt.key_codebook, "v": fmt.value_codebook}
    for side, out, ref in zip("kv", outputs, references, strict=True):
        touched = decoded if side in sides else torch.zeros_like(decoded)
        left = out[~touched].contiguous().view(torch.int16)
        assert bool((left == UNTOUCHED).all()), f"{side}: wrote outside of the decoded tokens"
        got, want = out[touched], ref[touched]
        if not rotated[side]:
            same = got == want.float().bfloat16()
            assert bool((same | (got.isnan() & want.isnan())).all()), f"{side}: not bit-exact"
            continue
        error = (got.double() - want).norm(dim=-1)
        length = want.norm(dim=-1)
        assert bool((error <= 4e-3 * length).all()), f"{side}: relative error {(error / length).max():.2e}"
        if config["transform"] == "shuffle" and config["lookup"] in ("table", "shuffle"):
            step = want.abs() * 2**-7 + length[..., None] * 1e-6  # one unit in the last place, and fp32 cancellation
            assert bool(((got.double() - want).abs() <= step).all()), f"{side}: more than one step of bf16 off"


def small_case(format_name: str, head_dim: int, **changes: object) -> Case:
    options: dict[str, object] = {"q_heads": 2, "kv_heads": 2, "block_size": 16, "seed": head_dim}
    return synthetic_cache(slot_layout(format_name, head_dim), (17, 0, 5), **options | changes)  # type: ignore[arg-type]


def test_matrix_reaches_every_axis_value() -> None:
    configs = [config for some in matrix().values() for config in some]
    missing = {(a.name, v) for a in SPACE.axes for v in a.values} - {pair for c in configs for pair in c.params}
    assert missing == {("warps", 32)}  # test_widest_cta


@needs_gxx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_matrix(format_name: str, head_dim: int) -> None:
    configs = matrix()[format_name, head_dim]
    compiled(*configs)
    case = small_case(format_name, head_dim)
    for i, config in enumerate(configs, HEAD_DIMS.index(head_dim)):
        check(config, case, run(config, case, seed=i))


# --- hazards ----------------------------------------------------------------------------------------------------------


def problem_config(format_name: str, head_dim: int, **changes: int | str) -> Config:
    return default_config(Problem("dequant", head_dim, 1, format_name)).with_(**changes)


BULK = {"load": "bulk", "warps": 4, "rows": 2, "steps": 2}
ODD_PLACES: tuple[dict[str, int], ...] = (
    {"base": 1, "head_gap": 1},
    {"base": 3, "head_gap": 0, "token_gap": 3, "block_gap": 5},
    {"base": 2, "head_gap": 6, "block_gap": 1},
)
LOADS: tuple[dict[str, int | str], ...] = (
    {"load": "direct"},
    {"load": "staged", "load_bytes": 4},
    {"load": "staged", "load_bytes": 16, "steps": 1},
)


@needs_gxx
@pytest.mark.parametrize("format_name", FORMATS)
def test_odd_bases_and_strides(format_name: str) -> None:
    """Every byte address occurs as a row's, a norm's and an index word's; nothing beyond the storage is read."""
    configs = [problem_config(format_name, 128, **load) for load in LOADS]
    compiled(*configs)
    case = small_case(format_name, 128, kv_heads=3)
    for config, place in zip(configs, ODD_PLACES, strict=True):
        odd = replace(case, kv_cache=restride(case.kv_cache, fill=0xFF, **place))
        check(config, odd, run(config, odd))


@needs_gxx
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("place", [{}, {"base": 16}, {"base": 2}, *ODD_PLACES], ids=str)
def test_slots_come_by_bulk_copy_or_piece_by_piece(format_name: str, place: dict[str, int]) -> None:
    """By bulk copy where they lie side by side at multiples of 16 bytes; nothing beyond the storage is read."""
    config = problem_config(format_name, 128, **BULK)
    case = small_case(format_name, 128, kv_heads=3)
    odd = replace(case, kv_cache=restride(case.kv_cache, fill=0xFF, **place)) if place else case
    check(config, odd, run(config, odd))


@needs_gxx
@pytest.mark.parametrize(("place", "whole"), [({}, True), ({"base": 16}, True), *((p, False) for p in ODD_PLACES)])
def test_only_what_no_bulk_copy_brings_is_fetched(
    place: dict[str, int], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = problem_config("turboquant_4bit_nc", 128, **BULK)
    case = small_case("turboquant_4bit_nc", 128, kv_heads=3)
    odd = replace(case, kv_cache=restride(case.kv_cache, fill=0xFF, **place)) if place else case
    mutant = render(config).text.replace("    slots.fetch(p);\n", "")
    monkeypatch.setattr(emulated, "render", lambda config: SimpleNamespace(text=mutant))
    outputs = run(config, odd)
    if whole:
        check(config, odd, outputs)
    else:
        with pytest.raises(AssertionError):
            check(config, odd, outputs)


@needs_gxx
@pytest.mark.parametrize("format_name", ["turboquant_4bit_nc", "turboquant_seed"])
def test_bulk_copies_are_waited_for(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator's race detector is silent, and finds rows that are decoded before they have come."""
    config = problem_config(format_name, 64, **BULK)
    case = small_case(format_name, 64)
    try:
        check(config, case, run(config, case, races=True))
    except EmulationError as error:
        skip_without_thread_sanitizer(error)
        raise
    whole = render(config).text
    mutant = whole.replace("    slots.wait();\n", "")
    assert mutant != whole
    monkeypatch.setattr(emulated, "render", lambda config: SimpleNamespace(text=mutant))
    with pytest.raises(EmulationError, match="data race in shared memory"):
        run(config, case, races=True)


@needs_gxx
@pytest.mark.parametrize(
    "changes", [{"divide": d} for d in ("heads", "tokens", "planes")] + [BULK, BULK | {"divide": "planes"}], ids=str
)
@pytest.mark.parametrize("kv_heads", [1, 3, 5])
def test_rows_wrap_over_any_number_of_heads(changes: dict[str, int | str], kv_heads: int) -> None:
    config = problem_config("turboquant_3bit_nc", 64, **changes)  # four rows per pass
    case = small_case("turboquant_3bit_nc", 64, kv_heads=kv_heads, q_heads=kv_heads)
    check(config, case, run(config, case))


@needs_gxx
@pytest.mark.parametrize("load", [{}, BULK], ids=["direct", "bulk"])
def test_int64_block_table_and_head_major_padded_blocks(load: dict[str, int | str]) -> None:
    config = problem_config("turboquant_4bit_nc", 128, **load)
    case = small_case("turboquant_4bit_nc", 128, index_dtype=torch.int64, order="head", padding=13)
    check(config, case, run(config, case))
    check(config, case, run(config, case, by_block_id=True), by_block_id=True)


@needs_gxx
def test_one_table_row_for_all_requests() -> None:
    config = problem_config("turboquant_seed_dense", 64)
    case = small_case("turboquant_seed_dense", 64)
    lengths = torch.tensor([3, 17, 16], dtype=torch.int32)
    shared = replace(case, block_table=case.block_table[:1].expand(3, -1), seq_lens=lengths)
    assert shared.block_table.stride(0) == 0
    check(config, shared, run(config, shared))


@needs_gxx
def test_early_exit_counts_positions_within_the_request() -> None:
    """Counted over the flattened table, every block of the later requests would lie beyond their length."""
    config = problem_config("turboquant_4bit_nc", 64)
    case = synthetic_cache(slot_layout("turboquant_4bit_nc", 64), (40, 16, 33), q_heads=1, kv_heads=1)
    outputs = run(config, case)
    assert expected_rows(case, False)[2].sum() == 40 + 16 + 33
    check(config, case, outputs)


@needs_gxx
@pytest.mark.parametrize("format_name", ["turboquant_seed", "turboquant_k3v4_nc"])
@pytest.mark.parametrize("changes", [{"divide": "heads"}, {"divide": "planes"}, BULK], ids=str)
def test_one_side_only(format_name: str, changes: dict[str, int | str]) -> None:
    config = problem_config(format_name, 64, **changes)
    case = small_case(format_name, 64)
    for side in "kv":
        check(config, case, run(config, case, sides=side), sides=side)


@needs_gxx
@pytest.mark.parametrize("load", [{}, BULK], ids=["direct", "bulk"])
@pytest.mark.parametrize("gap", [1, 4])
def test_output_without_alignment(gap: int, load: dict[str, int | str]) -> None:
    """Rows that do not start on a chunk's boundary are stored channel by channel; the gaps stay as they are."""
    config = problem_config("turboquant_outlier", 64, **load)
    case = small_case("turboquant_outlier", 64)
    check(config, case, run(config, case, gap=gap))


@needs_gxx
@pytest.mark.parametrize("load", [{}, BULK], ids=["direct", "bulk"])
@pytest.mark.parametrize("block_size", [32, 4176, 8320])
def test_block_sizes(block_size: int, load: dict[str, int | str]) -> None:
    config = problem_config("turboquant_4bit_nc", 128, **load)
    case = small_case("turboquant_4bit_nc", 128, block_size=block_size, kv_heads=1, spare_blocks=0)
    check(config, case, run(config, case, by_block_id=True), by_block_id=True)


@needs_gxx
def test_more_requests_than_a_grid_dimension_holds() -> None:
    config = problem_config("turboquant_4bit_nc", 64, warps=1, rows=1, steps=1)
    case = small_case("turboquant_4bit_nc", 64, kv_heads=1, block_size=4)
    lengths = torch.zeros(65540, dtype=torch.int32)
    lengths[-1] = 3
    table = torch.full((65540, 1), -1, dtype=torch.int32)
    table[-1] = case.block_table[0, 0]
    many = replace(case, seq_lens=lengths, block_table=table)
    check(config, many, run(config, many, by_block_id=True), by_block_id=True)


@needs_gxx
def test_widest_cta() -> None:
    config = problem_config("turboquant_seed", 256, warps=32, rows=1, steps=1, lookup="table")
    case = small_case("turboquant_seed", 256)
    check(config, case, run(config, case))


@needs_gxx
@pytest.mark.parametrize("format_name", ["turboquant_k8v4", "turboquant_4bit_nc"])
def test_extreme_fields(format_name: str) -> None:
    """Zero and huge norms, infinite and NaN scales, every FP8 byte: as the reference says, bit by bit where exact."""
    config = problem_config(format_name, 256)
    case = small_case(format_name, 256)
    layout = case.layout
    block = int(case.block_table[0, 0])
    slots = case.kv_cache[block]
    if layout.key.norm_offset is None:
        slots[0, 0, :256] = torch.arange(256, dtype=torch.uint8)
    else:
        for token, bits in enumerate((0x0000, 0x7BFF, 0x0001)):  # 0, the largest, the smallest
            slots[token, :, layout.key.norm_offset] = bits & 255
            slots[token, :, layout.key.norm_offset + 1] = bits >> 8
    fields = layout.value_offset + layout.value.scale_offset  # type: ignore[operator]
    for token, (scale, zero) in enumerate(((0x7C00, 0), (0x7E00, 0), (0x0001, 0x8001), (0x7BFF, 0xFBFF))):
        field_bytes = (scale & 255, scale >> 8, zero & 255, zero >> 8)
        slots[token, :, fields : fields + 4] = torch.tensor(field_bytes, dtype=torch.uint8)
    check(config, case, run(config, case))


# --- what the compiler makes of it ------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("arch", ["sm_121", "sm_90"])
def test_default_and_seed_layouts_do_not_spill(arch: str) -> None:
    problems = [Problem("dequant", 256, 1, f) for f in FORMATS]
    problems += [Problem("dequant", 512, 1, f) for f in ("turboquant_4bit_nc", "turboquant_seed")]
    configs = [default_config(p) for p in problems] + [seed_config(problems[1])]
    results = build([render(c) for c in configs], [arch])
    assert len(results) == len(configs)
    for built in results.values():
        assert not hasattr(built, "message"), built
        assert built.spill_bytes == 0, built
