"""The gate of wph_store: what it lets pass, what it refuses, and that its bound is neither too tight nor idle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tuner.check_store import Difference, StoreCase, allowed_distance, check_store, compare, store_case
from tuner.formats import FORMATS, HEAD_DIMS
from tuner.reference import Codec, coefficients, midpoints, store
from tuner.space import Problem

CODED = [name for name, fmt in FORMATS.items() if fmt.key_codebook]


def twin(cache: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).clone()
    return storage.as_strided(cache.shape, cache.stride(), cache.storage_offset())


def stored(case: StoreCase) -> torch.Tensor:
    cache = twin(case.before)
    store(cache, case.key, case.value, case.slot_mapping, case.codec)
    return cache


def slot_of(case: StoreCase, token: int) -> tuple[int, ...]:
    """Index of head 0 of a stored token (the key's plane, where there are two)."""
    slot, planes = int(case.slot_mapping[token]), case.before.dim() == 5
    size = case.before.shape[-3]
    return (slot // size, *([0] if planes else []), slot % size, 0)


def fault_after(case: StoreCase, byte: int, flip: int, token: int = 0) -> str | None:
    want, got = stored(case), stored(case)
    got[slot_of(case, token)][byte] ^= flip
    return compare(got, want, case).fault


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_reference_passes_its_own_gate(format_name: str) -> None:
    def run(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, codec: Codec) -> None:
        store(kv_cache, key, value, slots, codec)

    result = check_store(run, Problem("store", 64, 1, format_name), level="tiny")
    assert result.passed and result.worst_error == 0.0
    assert result.detail.startswith("2 cases, ")
    assert ("every byte equal" in result.detail) == (not FORMATS[format_name].key_codebook)


@pytest.mark.parametrize("format_name", CODED)
def test_an_index_far_from_a_midpoint_may_not_move(format_name: str) -> None:
    """One level off, where the coefficient lies in the middle of its cell."""
    case = store_case(Problem("store", 64, 1, format_name), 1, kv_heads=1)
    y, _ = coefficients(case.key, case.codec)
    middle = midpoints(case.codec.centroids).double()
    distance = (y[0, 0, :, None] - middle).abs().amin(-1)
    row = case.codec.layout.key
    channel = int(distance[: row.coefficients].argmax())
    bit = channel * row.bits
    fault = fault_after(case, row.indices_offset + bit // 8, 1 << bit % 8)
    assert fault is not None and fault.startswith("key: 1 indices moved, up to ") and "x as far" in fault


def test_an_index_on_a_midpoint_may_move() -> None:
    """Of one-hot rows all coefficients are +-1/8: with a midpoint there, to a rounding or well beside it."""
    case = store_case(Problem("store", 64, 1, "turboquant_3bit_nc"), 1, kv_heads=1)
    key = torch.zeros_like(case.key)
    key[..., 3] = 2.0
    for nudge, passes in ((1 + 2e-7, True), (1 - 2e-7, True), (1.001, False)):
        levels = torch.tensor([-0.9, -0.7, -0.5, 0.0, 0.25 * nudge, 0.5, 0.7, 0.9])
        probe = replace(case, key=key, codec=replace(case.codec, centroids=levels))
        want, got = stored(probe), stored(probe)
        at = slot_of(probe, 0)
        below = bool((coefficients(key, probe.codec)[0][0, 0, 0] < levels[4].double() / 2).item())
        got[at][0] = (int(got[at][0]) & ~7) | (4 if below else 3)
        found = compare(got, want, probe)
        assert (found.fault is None) == passes, found
        assert found.moved == 1 and (found.farthest <= 1) == passes


def test_two_levels_are_never_rounding() -> None:
    case = store_case(Problem("store", 64, 1, "turboquant_4bit_nc"), 1, kv_heads=1)
    assert fault_after(case, 0, 2) == "key: an index is 2 levels off"
    assert fault_after(case, 0, 4) == "key: an index is 4 levels off"


@pytest.mark.parametrize("format_name", ["turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc"])
def test_bytes_that_the_format_fixes_must_be_equal(format_name: str) -> None:
    """Every byte of an affine value; FP8 keys."""
    case = store_case(Problem("store", 64, 1, format_name), 2, kv_heads=1)
    layout = case.codec.layout
    for byte in (layout.value_offset, layout.value_offset + layout.value.size - 1):
        assert fault_after(case, byte, 1) == "value: 1 rows differ, whose bytes the format fixes"
    if not layout.format.key_codebook:
        assert fault_after(case, 5, 1) == "key: 1 rows differ, whose bytes the format fixes"


def test_outliers_and_unused_bits_must_be_equal() -> None:
    case = store_case(Problem("store", 64, 1, "turboquant_seed"), 1, kv_heads=1)
    row = case.codec.layout.key
    assert fault_after(case, 0, 1) == "key: outliers are not exact"
    assert row.coefficients % 2  # so half of the last byte is no index
    fault = fault_after(case, row.indices_offset + row.indices_bytes - 1, 0x10)
    assert fault == "key: bits beyond the last index are not zero"


@pytest.mark.parametrize("format_name", CODED)
def test_a_norm_may_be_a_step_off_only_near_a_boundary(format_name: str) -> None:
    case = store_case(Problem("store", 64, 1, format_name), 1, kv_heads=1)
    offset = case.codec.layout.key.norm_offset
    assert offset is not None
    fault = fault_after(case, offset, 1)
    assert fault == "key: a norm is further off than rounding can bring it"


def test_a_norm_on_a_boundary_may_be_either() -> None:
    """Length 2049, halfway between the halves 2048 and 2050."""
    case = store_case(Problem("store", 64, 1, "turboquant_4bit_nc"), 1, kv_heads=1, dtype=torch.float16)
    key = torch.zeros_like(case.key)
    key[..., 0], key[..., 1] = 2048.0, (2049.0**2 - 2048.0**2) ** 0.5
    probe = replace(case, key=key)
    got, want = stored(probe), stored(probe)
    offset = case.codec.layout.key.norm_offset
    assert offset is not None
    half = want[slot_of(probe, 0)][offset : offset + 2].clone().view(torch.int16)
    other = {0x6800: 0x6801, 0x6801: 0x6800}[int(half)]
    got[slot_of(probe, 0)][offset : offset + 2] = torch.tensor([other], dtype=torch.int16).view(torch.uint8)
    exact = float(coefficients(key, probe.codec)[1])
    found = compare(got, want, probe)
    assert found.fault is None and abs(exact / 2049 - 1) < 32 * 2**-24
    assert found.norms == 1


def test_bytes_between_the_slots_must_stay() -> None:
    case = store_case(Problem("store", 64, 1, "turboquant_4bit_nc"), 3, kv_heads=1, padding=16)
    want, got = stored(case), stored(case)
    torch.empty(0, dtype=torch.uint8).set_(got.untyped_storage())[-1] ^= 1
    assert compare(got, want, case).fault == "bytes that carry no data of a stored token were written"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_bound_holds_for_fp32_sums_and_is_not_idle(head_dim: int) -> None:
    """Another order of the same sums: a matrix product. Its worst error is a fair share of what is allowed."""
    case = store_case(Problem("store", head_dim, 1, "turboquant_4bit_nc"), 3000, kv_heads=2)
    rows = case.key[(case.key.float().abs().amax(-1) < 1e18).all(-1)]  # beyond, squares overflow
    exact, norm = coefficients(rows, case.codec)
    x = rows.float()
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    length = x.square().sum(-1, keepdim=True).sqrt() + 1e-8
    y = (x @ matrix) * (head_dim**-0.5 / length)
    allowed = allowed_distance(exact, norm, rows, case.codec)
    live = (allowed > 0) & (norm > 1e-18)  # squares of less are subnormal
    worst = float(((y - exact).abs() / allowed)[live].max())
    assert 0.02 < worst < 0.9


def test_differences_add_up() -> None:
    a, b = Difference(10, 1, 0.5, 2), Difference(30, 2, 0.25, 1, "broken")
    assert a.plus(b) == Difference(40, 3, 0.5, 3, "broken")
    assert a.plus(Difference(30, 0)).describe() == (
        "1 of 40 indices moved (2.5e-02, at most 0.50 of the way that rounding allows), 2 norms a step off"
    )
