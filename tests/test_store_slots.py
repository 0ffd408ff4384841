"""wph_store on the emulator: where rows come from and where slots lie, each way by itself."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch
from emulated import emulate_store, needs_gxx
from odd_caches import restride
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

from tuner import emulate, geometry
from tuner.arguments import store_params
from tuner.check_store import StoreCase
from tuner.formats import FORMATS, HEAD_DIMS
from tuner.reference import make_cache, store
from tuner.render import render
from tuner.space import Problem, get_space

SPACE = get_space("store")
ODD_PLACES = (
    {"base": 1, "head_gap": 1},
    {"base": 3, "head_gap": 0, "token_gap": 3, "block_gap": 5},
    {"base": 2, "head_gap": 6, "block_gap": 1},
    {"base": 0, "head_gap": 2, "token_gap": 4},
)


@needs_gxx
@pytest.mark.parametrize("format_name", FORMATS)
def test_odd_bases_and_strides(format_name: str) -> None:
    """Every byte address occurs as a row's; nothing but the rows' own bytes changes, in the gaps neither."""
    configs = [problem_config(format_name, 128, **how) for how in STORES]
    compiled(*configs)
    case = small_case(format_name, 128, kv_heads=3)
    for config, place in zip(configs, ODD_PLACES, strict=True):
        check(config, replace(case, before=restride(case.before, fill=0xA5, **place)))


@needs_gxx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", JOINT)
def test_runs_of_slots(format_name: str, head_dim: int) -> None:
    """Adjacent slots at even and odd addresses, with gaps, and some without a slot."""
    narrow = 2 if head_dim == 512 else 1
    widest = 16, 4 if head_dim > 64 else 2
    widths = (4, narrow), (8, 2), widest, widest, (8, 2), widest
    ways = zip(widths, (*3 * RUN_STORES[:1], *RUN_STORES[1:]), strict=True)
    configs = [problem_config(format_name, head_dim, store_bytes=n, chunks=chunks, **how) for (n, chunks), how in ways]
    compiled(*configs)
    case = small_case(format_name, head_dim, tokens=11, kv_heads=4)
    slot = case.before.shape[-1]
    places = [{"base": base} for base in (0, 1, 2, 4, 6, 10, 14)] + [
        {"base": 0, "head_gap": 2},
        {"base": 2, "token_gap": 6},
    ]
    for i, place in enumerate(places):
        before = restride(case.before, fill=0xA5, **place)
        for config in configs[i % 3 :: 3] if i else configs:
            check(config, replace(case, before=before), seed=i)
    # All tokens one after the other, as a prompt's chunk mostly lies.
    packed = replace(case, slot_mapping=torch.arange(3, 14, dtype=torch.int32))
    assert packed.before.stride(-2) == slot
    for config in configs:
        check(config, packed)
        check(config, replace(packed, before=restride(case.before, fill=0xA5, base=6)))


@needs_gxx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("format_name", JOINT)
def test_however_rows_come_and_slots_are_found_the_bytes_are_the_same(format_name: str, head_dim: int) -> None:
    first = SPACE.leads(Problem("store", head_dim, 1, format_name), 8)[0].with_(
        store="run", sides="together", rows=1, passes=2, min_ctas=1, loop="one"
    )
    configs = [first, *(first.with_(**how) for how in RUN_STORES[1:])]
    configs.append(configs[-1].with_(rows=2, passes=1, warps=1))
    compiled(*configs)
    for dtype, gap in ((torch.bfloat16, 0), (torch.float16, 1)):
        case = small_case(format_name, head_dim, tokens=21, kv_heads=4, dtype=dtype, gap=gap)
        for slots in (case.slot_mapping, torch.arange(2, 23, dtype=torch.int64)):
            written = [twin(case.before) for _ in configs]
            for config, cache in zip(configs, written, strict=True):
                emulate_store(config, cache, replace(case, slot_mapping=slots))
            assert (written[0] != case.before).any()
            assert all(torch.equal(cache, written[0]) for cache in written[1:])


@needs_gxx
@pytest.mark.parametrize("how", RUN_STORES, ids=lambda how: " ".join(map(str, how.values())))
@pytest.mark.parametrize("slots", ["adjacent", "apart"])
def test_adjacent_slots_do_leave_as_one(slots: str, how: dict[str, int | str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the copy of a run is taken out of the kernel, adjacent slots are missing, and no others."""
    config = problem_config("turboquant_4bit_nc", 128, store_bytes=16, chunks=2, **how)
    mutant, count = re.subn(r"(if \((?:PLAIN \|\| )?run\.whole\)) run\.copy\(.*\);", r"\1 ;", render(config).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    case = small_case("turboquant_4bit_nc", 128, tokens=11, kv_heads=4)
    case = replace(case, slot_mapping=torch.arange(3, 14, dtype=torch.int32))
    if slots == "apart":
        case = replace(case, before=restride(case.before, fill=0xA5, base=0, head_gap=2))
        check(config, case)
    else:
        with pytest.raises(AssertionError):
            check(config, case)


@needs_gxx
@pytest.mark.parametrize(("rows", "passes"), [(1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize(
    ("format_name", "how"),
    [
        ("turboquant_seed", STORES[1]),
        *((f, how) for f in ("turboquant_k8v4", "turboquant_3bit_nc") for how in RUN_STORES),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v.values())),
)
def test_warps_that_load_again(format_name: str, how: dict[str, int | str], rows: int, passes: int) -> None:
    """Numbers of rows that end within a pass, between two and after one; tokens without a slot; grids of any size."""
    joint, coded = not FORMATS[format_name].separate_planes, FORMATS[format_name].key_codebook
    values = {"transform": "quads", "search": "packed"} if joint and coded else {}
    config = problem_config(format_name, 128, passes=passes, rows=rows, warps=1, chunks=2, **values, **how)
    for tokens, kv_heads in ((1, 1), (8, 1), (11, 3), (9, 8)):
        check(config, small_case(format_name, 128, tokens=tokens, kv_heads=kv_heads), seed=tokens)


TWO_LOOPS = RUN_STORES[-1]


def in_a_row(format_name: str, tokens: int, **options: Any) -> StoreCase:
    """Tokens whose slots follow one another, two of them and eight rows to a pass of ``chunks=4``."""
    case = small_case(format_name, 128, tokens=tokens, kv_heads=4, **options)
    return replace(case, slot_mapping=torch.arange(5, 5 + tokens, dtype=torch.int64))


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_name", ["turboquant_k8v4", "turboquant_3bit_nc"])
def test_passes_that_need_nothing_special_are_done_in_the_short_loop(
    format_name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the other loop's passes are taken out of the kernel, theirs are missing, and no others."""
    config = problem_config(format_name, 128, passes=4, warps=2, chunks=4, **TWO_LOOPS)
    if FORMATS[format_name].key_codebook:
        config = config.with_(transform="quads", search="packed")
    mutant, count = re.subn(r"code\(Kind<false>\(\), pass\);", ";", render(config).text)
    assert count == 1
    monkeypatch.setattr(emulated, "render", lambda _: SimpleNamespace(text=mutant))
    case = in_a_row(format_name, 8, dtype=dtype)
    check(config, case)
    hole = case.slot_mapping.clone()
    hole[3] = -1
    others = [replace(case, slot_mapping=hole), in_a_row(format_name, 8, dtype=dtype, gap=1)]
    others.append(replace(case, value=with_quotients_before_a_half(case.value, FORMATS[format_name].value_bits)))
    if FORMATS[format_name].key_codebook:
        others.append(replace(case, codec=replace(case.codec, centroids=UNEVEN)))
        if dtype == torch.bfloat16:  # fp16 has no numbers whose squares fp32 does not hold
            others.append(replace(case, key=case.key * 1e34))
    for other in others:
        with pytest.raises(AssertionError):
            check(config, other)


@needs_gxx
@pytest.mark.parametrize("tokens", [8, 23])
@pytest.mark.parametrize(
    ("format_name", "changes"),
    [
        ("turboquant_k8v4", {}),
        ("turboquant_3bit_nc", {"transform": "quads", "search": "packed"}),
        ("turboquant_3bit_nc", {"transform": "quads", "search": "packed", "rows": 2, "passes": 2}),
        ("turboquant_4bit_nc", {"transform": "tensor", "search": "cells", "chunks": 2}),
        ("turboquant_4bit_nc", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v.values())),
)
def test_a_pass_that_needs_more_is_done_right(format_name: str, changes: dict[str, int | str], tokens: int) -> None:
    """A warp's first, middle or last pass: keys to be scaled, slots apart or missing, values with a range to be scaled
    or a quotient that rounding must be asked about; and where all need more: keys or values without alignment,
    midpoints that share a cell."""
    config = problem_config(format_name, 128, passes=4, warps=2, chunks=4, store_bytes=16, **TWO_LOOPS)
    config = config.with_(**changes)
    case = in_a_row(format_name, tokens)
    check(config, case)
    bits = FORMATS[format_name].value_bits
    for token in (0, tokens // 2, tokens - 1):
        rows = case.key.clone()
        rows[token, 3] = torch.linspace(-1e38, 1e38, 128)
        check(config, replace(case, key=rows))
        for row in (
            torch.linspace(-1e38, 1e38, 128),
            3 * torch.linspace(-1e38, 1e38, 128),  # a range beyond fp32
            *(with_quotients_before_a_half(case.value, bits, cancels)[0, 0] for cancels in (False, True)),
        ):
            rows = case.value.clone()
            rows[token, 3] = row
            check(config, replace(case, value=rows))
        for slot in (-1, 1):
            slots = case.slot_mapping.clone()
            slots[token] = slot
            check(config, replace(case, slot_mapping=slots))
    if format_name == "turboquant_3bit_nc":
        check(config, replace(case, codec=replace(case.codec, centroids=UNEVEN)))
    unaligned = in_a_row(format_name, tokens, gap=1)
    for other in (unaligned, replace(case, key=unaligned.key), replace(case, value=unaligned.value)):
        check(config, other)


@needs_gxx
@pytest.mark.parametrize("order", ["heads", "tokens"])
@pytest.mark.parametrize("kv_heads", [1, 3, 5])
def test_rows_wrap_over_any_number_of_heads(order: str, kv_heads: int) -> None:
    config = problem_config("turboquant_3bit_nc", 64, order=order, rows=2)  # four rows per pass
    for tokens in (1, 2, 9):
        check(config, small_case("turboquant_3bit_nc", 64, tokens=tokens, kv_heads=kv_heads))


@needs_gxx
@pytest.mark.parametrize("gap", [1, 4, 8])
def test_inputs_without_alignment(gap: int) -> None:
    config = problem_config("turboquant_outlier", 64)
    check(config, small_case("turboquant_outlier", 64, gap=gap, dtype=torch.float16))


@needs_gxx
def test_inputs_of_any_stride_and_more_rows_than_slots() -> None:
    """Key and value as parts of one projection, head-major, and a token repeated by a stride of zero."""
    config = problem_config("turboquant_k3v4_nc", 64)
    case = small_case("turboquant_k3v4_nc", 64, kv_heads=2)
    fused = torch.randn(2, 13, 3, 64).bfloat16().transpose(0, 1)  # [13, 2, 3, 64], head-major
    check(config, replace(case, key=fused[:, :, 0], value=fused[:, :, 2]))
    check(config, replace(case, key=fused[:1, :, 1].expand(13, -1, -1), value=fused[:, :, 2]))


@needs_gxx
def test_int64_slots_and_head_major_padded_blocks() -> None:
    config = problem_config("turboquant_4bit_nc", 128)
    check(config, small_case("turboquant_4bit_nc", 128, index_dtype=torch.int64, order="head", padding=13))


@needs_gxx
@pytest.mark.parametrize("negative", [-1, -7, -(2**31)])
def test_negative_slots_write_nothing(negative: int) -> None:
    config = problem_config("turboquant_seed", 64)
    case = small_case("turboquant_seed", 64)
    nowhere = replace(case, slot_mapping=torch.full_like(case.slot_mapping, negative))
    got = twin(case.before)
    emulate_store(config, got, nowhere)
    assert torch.equal(got, case.before)


@needs_gxx
def test_offsets_beyond_two_gigabytes() -> None:
    """Blocks 5 and 10 lie 2.5 and 5 GB after block 0; tokens lie as far before their block, which leads back."""
    config = problem_config("turboquant_4bit_nc", 64)
    case = small_case("turboquant_4bit_nc", 64, tokens=3, kv_heads=1)
    want, got = (make_cache(config.problem.layout, 1, 16, 1) for _ in range(2))
    store(want, case.key, case.value, torch.tensor([5, -1, 10]), case.codec)
    far = torch.tensor([5 * 16 + 4, -1, 10 * 16 + 8], dtype=torch.int32)
    params, tensors = store_params(
        got, case.key, case.value, far, cache_format="turboquant_4bit_nc", centroids=case.codec.centroids
    )
    params.block_stride, params.token_stride = (1 << 29) + want.stride(1), -5 * (1 << 27)
    g = geometry.store_geometry(config, tokens=3, kv_heads=1)
    emulate.emulate(render(config), emulate.Launch("wph_store", g.grid, g.block, g.shared_bytes), params, tensors)
    assert torch.equal(got, want)


@needs_gxx
@pytest.mark.parametrize("block_size", [1, 24, 4176, 8320])
def test_block_sizes(block_size: int) -> None:
    config = problem_config("turboquant_k8v4", 64)
    check(config, small_case("turboquant_k8v4", 64, block_size=block_size, kv_heads=1))
