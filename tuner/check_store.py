"""The correctness gate of ``wph_store``: the slots that it writes against the reference's, byte by byte.

Caches start full of random bytes, of which only those that carry data of a stored token may change. FP8 keys, affine
values and outliers must agree in every bit: the format fixes their arithmetic. A codebook index may differ by one
level where fp32 sums can move its coefficient across the midpoint between the two, a norm where they can move it to
the next half. How far that is, is derived from the arithmetic and checked for every one that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tuner.check import CheckResult, Level
from tuner.formats import RowLayout
from tuner.reference import Codec, coefficients, make_cache, midpoints, store
from tuner.space import Problem

_UNIT = 2.0**-24
"""Relative error of one fp32 rounding."""
_LENGTH_ROUNDINGS = 32
"""Of a coefficient's own size: what dividing by the length and by sqrt(BLOCK_D) can add up to, in roundings.

The sum of squares takes at most 37 (32 channels of a lane, 5 steps across lanes), its root halves them and adds 1; the
reciprocal square root is good to 2^-22.9, twice, and is squared; 5 more for the sum with epsilon and the products.
"""
_FP16_MAX = 65504.0

StoreRun = Callable[[Tensor, Tensor, Tensor, Tensor, Codec], None]
"""``run(kv_cache, key, value, slot_mapping, codec)``, as reference.store takes them."""

_BF16, _FP16 = torch.bfloat16, torch.float16
_CASES: dict[Level, tuple[tuple[int, dict[str, Any]], ...]] = {
    "tiny": (
        (19, {"block_size": 16, "dtype": _BF16}),
        (13, {"block_size": 16, "dtype": _FP16, "index_dtype": torch.int64, "order": "head", "padding": 46, "gap": 3}),
    ),
    "quick": (
        (1, {"block_size": 16, "dtype": _BF16}),
        (700, {"block_size": 16, "dtype": _BF16}),
        (333, {"block_size": 32, "dtype": _FP16, "index_dtype": torch.int64, "gap": 8}),
    ),
    "full": (
        (1, {"block_size": 16, "dtype": _BF16}),
        (128, {"block_size": 16, "dtype": _FP16}),
        (4097, {"block_size": 16, "dtype": _BF16}),
        (333, {"block_size": 32, "dtype": _FP16, "index_dtype": torch.int64, "gap": 8}),
        (1000, {"block_size": 64, "dtype": _BF16, "order": "head", "padding": 4098, "gap": 1}),
        (513, {"block_size": 144, "dtype": _FP16, "padding": 64}),
    ),
}


@dataclass(frozen=True)
class StoreCase:
    """One store. ``key``, ``value`` [N, Hk, D]; ``slot_mapping`` [N] without repetitions but for -1; ``before``: the
    cache's bytes, strides as they are to be."""

    key: Tensor
    value: Tensor
    slot_mapping: Tensor
    before: Tensor
    codec: Codec


@dataclass(frozen=True)
class Difference:
    """Of two caches after the same stores: ``moved`` of ``indices`` codebook indices are one level apart.

    ``farthest``: of the moved ones, the largest distance from the midpoint over the distance that rounding allows.
    ``norms`` counts norms that are one fp16 step apart. ``fault`` says what must not differ and does.
    """

    indices: int = 0
    moved: int = 0
    farthest: float = 0.0
    norms: int = 0
    fault: str | None = None

    def plus(self, other: Difference) -> Difference:
        """Both together, with the first fault."""
        return Difference(
            self.indices + other.indices,
            self.moved + other.moved,
            max(self.farthest, other.farthest),
            self.norms + other.norms,
            self.fault or other.fault,
        )

    def describe(self) -> str:
        if not self.indices:
            return "every byte equal"
        share = self.moved / self.indices
        distance = f", at most {self.farthest:.2f} of the way that rounding allows" if self.moved else ""
        return f"{self.moved} of {self.indices} indices moved ({share:.1e}{distance}), {self.norms} norms a step off"


def store_case(
    problem: Problem,
    tokens: int,
    *,
    kv_heads: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    index_dtype: torch.dtype = torch.int32,
    order: str = "token",
    padding: int = 0,
    gap: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> StoreCase:
    """Random rows with loud channels; among them zeros, constants (whose transform meets the
    middle midpoint exactly, but for its rounding) and the largest and smallest numbers of ``dtype``.

    Slots are shuffled over a cache of random bytes, every seventh is negative. ``gap`` elements lie between the
    heads of ``key`` and ``value``.
    """
    layout = problem.layout
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_size) + 2
    before = make_cache(layout, blocks, block_size, kv_heads, order=order, padding=padding, generator=generator)
    rows = torch.randn(2, tokens, kv_heads, layout.head_dim + gap, generator=generator)
    rows *= torch.where(torch.rand(rows.shape[-1], generator=generator) < 0.05, 8.0, 1.0)
    extremes = (0.0, 3.5, 1e-3, 6e4, 1e-6, 1e30 if dtype == torch.bfloat16 else 6.5e4)
    for token, factor in zip(range(1, tokens, 3), extremes, strict=False):
        rows[:, token] = factor if factor in (0.0, 3.5) else (rows[:, token] / 8 * factor).clamp(-2e38, 2e38)
    limit = torch.finfo(dtype).max
    key, value = rows.clamp(-limit, limit).to(dtype)[..., : layout.head_dim]
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[5::7] = -1
    codec = Codec.for_layout(layout, seed).to(device)
    if torch.device(device).type != "cpu":
        key, value, before = (_moved(t, device) for t in (key, value, before))
    return StoreCase(key, value, slots.to(device=device, dtype=index_dtype), before, codec)


def check_store(
    run: StoreRun,
    problem: Problem,
    *,
    device: torch.device | str = "cpu",
    level: Level = "quick",
    kv_heads: int = 2,
) -> CheckResult:
    """Runs ``run`` on the gate's cases and compares all bytes of the cache.

    Every call is made twice and must give the same bytes. ``worst_error``: ``Difference.farthest``, 1 being what
    rounding can do. Exceptions of ``run`` pass through.
    """
    total = tally(run, problem, device=device, level=level, kv_heads=kv_heads)
    detail = total.fault or f"{len(_CASES[level])} cases, {total.describe()}"
    return CheckResult(total.fault is None, total.farthest, detail)


def tally(
    run: StoreRun,
    problem: Problem,
    *,
    device: torch.device | str = "cpu",
    level: Level = "quick",
    kv_heads: int = 2,
) -> Difference:
    """``check_store`` in numbers: the differences of all cases together, up to the first with a fault."""
    total = Difference()
    for case, expected in _cases(problem, str(device), level, kv_heads):
        first, again = (_moved(case.before, device) for _ in range(2))
        for cache in (first, again):
            run(cache, case.key, case.value, case.slot_mapping, case.codec)
        difference = compare(first, expected, case)
        fault = difference.fault or (None if torch.equal(_bytes(first), _bytes(again)) else "two runs differ")
        if fault:
            _cases.cache_clear()  # a kernel that goes wrong may have damaged the inputs
            dtype = str(case.key.dtype).removeprefix("torch.")
            where = f"{fault} ({len(case.key)} tokens, {kv_heads} KV heads, {dtype})"
            return total.plus(replace(difference, fault=where))
        total = total.plus(difference)
    return total


def compare(got: Tensor, want: Tensor, case: StoreCase) -> Difference:
    """``got`` against ``want``, both ``case.before`` after the case's store, with everything between the slots."""
    layout = case.codec.layout
    planes = layout.format.separate_planes
    block_size = want.shape[-3]
    stored = case.slot_mapping >= 0
    slots = case.slot_mapping[stored].long()
    at = slots // block_size, slots % block_size
    rest = _moved(want, want.device)
    total = Difference()
    for plane, (side, row, rows) in enumerate((("key", layout.key, case.key), ("value", layout.value, case.value))):
        start = 0 if planes or not plane else layout.value_offset
        part = slice(start, start + row.size)
        ours, theirs, patched = ((c[:, plane] if planes else c)[..., part] for c in (got, want, rest))
        a, b = ours[at], theirs[at]
        if row.norm_offset is None:
            wrong = int((a != b).any(-1).sum())
            fault = f"{side}: {wrong} rows differ, whose bytes the format fixes" if wrong else None
            total = total.plus(Difference(fault=fault))
        else:
            total = total.plus(_compare_coded(side, row, a, b, rows[: len(stored)][stored], case.codec))
        patched[at] = a
    if not torch.equal(_bytes(got), _bytes(rest)):
        total = total.plus(Difference(fault="bytes that carry no data of a stored token were written"))
    return total


def _compare_coded(side: str, row: RowLayout, a: Tensor, b: Tensor, rows: Tensor, codec: Codec) -> Difference:
    """Rows ``a`` against the reference's ``b``, uint8 [n, Hk, size], both coded from ``rows`` [n, Hk, D]."""
    ours, theirs = _indices(a, row), _indices(b, row)
    steps = ours - theirs
    where = steps.nonzero(as_tuple=True)
    norms = ordered_halves(a, row.norm_offset) - ordered_halves(b, row.norm_offset)
    other = norms.nonzero(as_tuple=True)
    found = Difference(steps[..., : row.coefficients].numel(), len(where[0]), norms=len(other[0]))
    if not torch.equal(a[..., : 2 * row.outliers], b[..., : 2 * row.outliers]):
        return replace(found, fault=f"{side}: outliers are not exact")
    if not found.moved and not found.norms:
        return found
    farthest = int(steps.abs().max())
    if farthest > 1:
        return replace(found, fault=f"{side}: an index is {farthest} levels off")
    if bool((where[-1] >= row.coefficients).any()):
        return replace(found, fault=f"{side}: bits beyond the last index are not zero")
    y, norm = coefficients(rows, codec)
    middle = midpoints(codec.centroids).double()[torch.minimum(ours, theirs)[where]]
    allowed = allowed_distance(y, norm, rows, codec)[where]
    shares = torch.where(allowed > 0, (y[where] - middle).abs() / allowed, torch.inf)
    found = replace(found, farthest=float(shares.max()) if found.moved else 0.0)
    if found.farthest > 1:
        moved = f"{int((shares > 1).sum())} indices moved"
        return replace(found, fault=f"{side}: {moved}, up to {found.farthest:.3g} x as far as rounding can")
    if not bool(_may_round_to(norm[..., 0], ordered_halves(a, row.norm_offset))[other].all()):
        return replace(found, fault=f"{side}: a norm is further off than rounding can bring it")
    return found


def allowed_distance(y: Tensor, norm: Tensor, rows: Tensor, codec: Codec) -> Tensor:
    """How far fp32 arithmetic in any order can move each of the coefficients ``y`` of ``rows``, to first order.

    ``y`` [n, Hk, block_d] and ``norm`` as ``coefficients`` gives them. Each of the transform's log2(block_d) stages
    adds numbers of at most the channels' absolute sum and rounds once.
    """
    layout = codec.layout
    x = rows.double().abs()
    if codec.channels is not None:
        x = x[..., codec.channels.long()[: layout.normal]]
    stages = layout.block_d.bit_length() - 1
    sums = x.sum(-1, keepdim=True) / (norm.clamp_min(torch.finfo(torch.float64).tiny) * layout.block_d**0.5)
    return _UNIT * (stages * sums + _LENGTH_ROUNDINGS * y.abs())


def _may_round_to(norm: Tensor, got: Tensor) -> Tensor:
    """Whether fp32 arithmetic can make the halves ``got`` (``_ordered``) of the exact ``norm``, elementwise."""
    slack = _LENGTH_ROUNDINGS * _UNIT
    low, high = ((norm * f).clamp_max(_FP16_MAX).float().half() for f in (1 - slack, 1 + slack))
    steps = [h.contiguous().view(torch.int16).long() for h in (low, high)]
    return (steps[0] <= got) & (got <= steps[1])


@lru_cache(maxsize=8)
def _cases(problem: Problem, device: str, level: Level, kv_heads: int) -> tuple[tuple[StoreCase, Tensor], ...]:
    cases = []
    for seed, (tokens, options) in enumerate(_CASES[level]):
        case = store_case(problem, tokens, kv_heads=kv_heads, seed=seed, device=device, **options)
        expected = _moved(case.before, device)
        store(expected, case.key, case.value, case.slot_mapping, case.codec)
        cases.append((case, expected))
    return tuple(cases)


def _indices(data: Tensor, row: RowLayout) -> Tensor:
    """int64 [..., as many as fit]: a row's indices and the unused bits of their last byte."""
    packed = data[..., row.indices_offset : row.indices_offset + row.indices_bytes]
    string = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1).flatten(-2)
    string = string[..., : string.shape[-1] // row.bits * row.bits].unflatten(-1, (-1, row.bits))
    return (string << torch.arange(row.bits, dtype=torch.uint8, device=data.device)).sum(-1, dtype=torch.int64)


def ordered_halves(data: Tensor, offset: int | None) -> Tensor:
    """The fp16 field at byte ``offset`` as a number that counts fp16's steps; both zeros are 0."""
    assert offset is not None
    bits = data[..., offset].long() | data[..., offset + 1].long() << 8
    return torch.where(bits >= 0x8000, 0x8000 - bits, bits)


def _bytes(cache: Tensor) -> Tensor:
    """The whole storage of ``cache``."""
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on ``device`` with strides, gaps and all."""
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
