"""vLLM's store against the reference: which bytes its arithmetic lets differ, and ours, which passes the gate.

Before its Triton kernel it divides each key by its length and multiplies by a Hadamard matrix, all in fp32 (PyTorch
allows no TF32 unless it is told to, and vLLM tells it nothing). Its values divide approximately. Rows that meet a
midpoint or a tie exactly, such as constant ones, may therefore fall on either side; no others may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tuner.baselines import StoreInputs, prepare, survey
from tuner.baselines.support import hadamard_matrix
from tuner.check_store import StoreCase, compare, ordered_halves, store_case
from tuner.reference import coefficients, midpoints, store
from tuner.reference.codec import unpack_indices
from tuner.space import Problem

FORMATS = ["turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc"]


def finite_case(problem: Problem, device: str) -> StoreCase:
    """Without numbers that overflow on the way, where vLLM's arithmetic and the format's end differently."""
    case = store_case(problem, 300, device=device, kv_heads=4)
    slots = torch.where(case.slot_mapping < 0, -1, case.slot_mapping).long()
    return replace(case, key=case.key.clamp(-60, 60), value=case.value.clamp(-60, 60), slot_mapping=slots)


def key_slack(rows: Tensor, norm: Tensor) -> Tensor:
    """[..., 1]: how far fp32 can move a rotated coefficient of ``rows`` [..., D], summing in any order.

    In roundings of the largest that a sum of its products can be: D of the sum; D / 2 of the length, whose squares are
    summed before the root halves what they are off; 8 of root, epsilon, quotient and matrix.
    """
    dim = rows.shape[-1]
    sums = rows.double().abs().sum(-1, keepdim=True) / (norm.clamp_min(1e-30) * dim**0.5)
    return 2.0**-24 * (dim + dim // 2 + 8) * sums


def moved_keys(indices: Tensor, rows: Tensor, case: StoreCase) -> Tensor:
    """Of key indices [..., D] that differ from the reference's: distance from the midpoint over the slack."""
    y, norm = coefficients(rows, case.codec)
    thresholds = midpoints(case.codec.centroids).double()
    expected = torch.bucketize(y, thresholds, right=True)
    assert (indices - expected).abs().max() <= 1
    at = (indices != expected).nonzero(as_tuple=True)
    middle = thresholds[torch.minimum(indices, expected)[at]]
    slack = key_slack(rows, norm).expand_as(y)[at]
    return (y[at] - middle).abs() / slack


def moved_values(indices: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Of value indices [..., D] that differ from exact arithmetic's: distance from the tie over the slack.

    A place p among the levels is off by 2^-22 of itself for each of two approximate quotients (2 ulps each), 2^-23 for
    two differences and 2^-24 of p + 1 for adding a half: less than 2^-20 (p + 1).
    """
    x = rows.double()
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8)
    place = (x - low) / scale
    expected = (place + 0.5).floor().long()
    assert (indices - expected).abs().max() <= 1
    at = (indices != expected).nonzero(as_tuple=True)
    tie = torch.minimum(indices, expected)[at] + 0.5
    return (place[at] - tie).abs() / (2.0**-20 * (place[at] + 1))


def check_theirs(theirs: Tensor, want: Tensor, case: StoreCase) -> None:
    """What vLLM stored, in ``theirs``, against the reference's ``want``."""
    stored = case.slot_mapping >= 0
    slots = case.slot_mapping[stored]
    at = slots // want.shape[1], slots % want.shape[1]
    key, value, layout = case.key[stored], case.value[stored], case.codec.layout
    a, b = theirs[at], want[at]
    if layout.format.key_codebook:
        moved = moved_keys(unpack_indices(a, layout.key), key, case)
        assert not len(moved) or moved.max() <= 1, f"{int((moved > 1).sum())} key indices moved by more than rounding"
        steps = ordered_halves(a, layout.key.norm_offset) - ordered_halves(b, layout.key.norm_offset)
        assert steps.abs().max() <= 1
    else:
        assert torch.equal(a[..., : layout.key.size], b[..., : layout.key.size])
    a, b = (t[..., layout.value_offset :][..., : layout.value.size] for t in (a, b))
    moved = moved_values(unpack_indices(a, layout.value), value, layout.value.bits)
    assert not len(moved) or moved.max() <= 1, f"{int((moved > 1).sum())} value indices moved by more than rounding"
    for offset in (layout.value.scale_offset, layout.value.zero_offset):
        assert (ordered_halves(a, offset) - ordered_halves(b, offset)).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", FORMATS)
def test_vllms_store_differs_from_the_reference_by_rounding_and_ours_by_less(cache_format: str) -> None:
    from tuner import store as ours_store

    problem = Problem("store", 128, 1, cache_format)
    if survey("cuda", problem)[0].reason:
        pytest.skip("no vLLM sources")
    case = finite_case(problem, "cuda")
    slots, centroids = case.slot_mapping, case.codec.centroids
    want, ours, theirs = (case.before.clone() for _ in range(3))
    store(want, case.key, case.value, slots, case.codec)
    ours_store(ours, case.key, case.value, slots, cache_format=cache_format, centroids=centroids)
    assert (difference := compare(ours, want, case)).fault is None, difference
    prepare("vllm_store", StoreInputs(case.key, case.value, theirs, slots, case.codec))()
    check_theirs(theirs, want, case)


# --- the derivation, without a GPU ------------------------------------------------------------------------------------


def tf32(x: Tensor) -> Tensor:
    """``x`` to 11 significant bits, as tensor cores take their operands."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def in_order(x: Tensor, matrix: Tensor) -> Tensor:
    """The product of fused multiplications and additions, one after the other."""
    total = torch.zeros_like(x)
    for i in range(x.shape[-1]):
        total = torch.addcmul(total.double(), x[..., i : i + 1].double(), matrix[i].double()).float()
    return total


def rotated(case: StoreCase, product: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(the case's keys, their indices) with vLLM's arithmetic around ``product``."""
    rows = case.key[case.slot_mapping >= 0]
    key = rows.float()
    unit = key / (key.norm(dim=-1, keepdim=True) + 1e-8)
    y = product(unit, hadamard_matrix(key.shape[-1], "cpu"))
    return rows, torch.bucketize(y, midpoints(case.codec.centroids), right=True)


@pytest.mark.parametrize("cache_format", FORMATS[1:])
@pytest.mark.parametrize("product", [torch.matmul, in_order])
def test_fp32_moves_what_lies_on_a_midpoint(cache_format: str, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Of a constant key all coefficients but one are zero, as the middle midpoint is: that token has nearly all."""
    case = finite_case(Problem("store", 128, 1, cache_format), "cpu")
    rows, indices = rotated(case, product)
    moved = moved_keys(indices, rows, case)
    constant = (rows == rows[..., :1]).all(-1).all(-1)
    assert int(constant.sum()) >= 1 and moved.max() <= 1
    assert len(moved_keys(indices[~constant], rows[~constant], case)) < 1e-3 * indices.numel()


@pytest.mark.parametrize("cache_format", FORMATS[1:])
def test_operands_of_tf32_would_be_found(cache_format: str) -> None:
    case = finite_case(Problem("store", 128, 1, cache_format), "cpu")
    rows, indices = rotated(case, lambda x, matrix: (tf32(x).double() @ tf32(matrix).double()).float())
    assert moved_keys(indices, rows, case).max() > 1


@pytest.mark.parametrize("bits", [3, 4])
def test_approximate_quotients_move_ties_alone(bits: int) -> None:
    rows = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x, top = rows.float(), 2**bits - 1
    low = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - low) * (torch.ones(()) / top)
    indices = ((x - low) * (1 / scale) + 0.5).floor().long()
    moved = moved_values(indices, rows, bits)
    assert 0 < len(moved) < 3e-3 * rows.numel() and moved.max() <= 1
    assert moved_values(((x - low) / (scale * 1.001) + 0.5).floor().long(), rows, bits).max() > 1
