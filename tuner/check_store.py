"""The correctness gate of ``wph_store``: the slots that it writes against the reference's, byte by byte.

Caches start full of random bytes, of which only those that carry data of a stored token may change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tuner.check import CheckResult, Level
from tuner.formats import RowLayout
from tuner.reference import Codec, make_cache, store
from tuner.space import Problem

INDEX_TOLERANCE = 1e-3
"""Share of the indices that may be one level off: fp32 sums move a coefficient across a midpoint now and then."""

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
    """Of two caches after the same store: ``moved`` of ``indices`` codebook or value indices are one level apart.

    ``fields`` counts norms, scales and zero points that are one fp16 step apart; ``fault`` says what else differs.
    """

    indices: int
    moved: int
    fields: int
    fault: str | None


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
    """Random rows with loud channels; among them zeros, a constant and the largest and smallest numbers of ``dtype``.

    Slots are shuffled over a cache of random bytes, every seventh is negative. ``gap`` elements lie between the
    heads of ``key`` and ``value``.
    """
    layout = problem.layout
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_size) + 2
    before = make_cache(layout, blocks, block_size, kv_heads, order=order, padding=padding, generator=generator)
    rows = torch.randn(2, tokens, kv_heads, layout.head_dim + gap, generator=generator)
    rows *= torch.where(torch.rand(rows.shape[-1], generator=generator) < 0.05, 8.0, 1.0)
    # With random signs, a constant row's transform has coefficients of exactly zero, where the middle midpoint is: the
    # rounding of the reference's normalised row decides there, so constants are left to the other formats.
    constant = 1.0 if layout.format.has_signs else 3.5
    extremes = (0.0, constant, 1e-3, 6e4, 1e-6, 1e30 if dtype == torch.bfloat16 else 6.5e4)
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
    """Runs ``run`` on the gate's cases and compares all bytes of the cache; ``worst_error``: share of moved indices.

    Every call is made twice and must give the same bytes. Exceptions of ``run`` pass through.
    """
    worst, moved, indices, fields = 0.0, 0, 0, 0
    cases = _cases(problem, str(device), level, kv_heads)
    for case, expected in cases:
        first, again = (_moved(case.before, device) for _ in range(2))
        for cache in (first, again):
            run(cache, case.key, case.value, case.slot_mapping, case.codec)
        difference = compare(first, expected, case)
        share = difference.moved / max(1, difference.indices)
        worst, moved, indices = max(worst, share), moved + difference.moved, indices + difference.indices
        fields += difference.fields
        fault = difference.fault or (None if torch.equal(_bytes(first), _bytes(again)) else "two runs differ")
        # One index of a small case may move: its share says nothing.
        if fault is None and difference.moved > max(1.0, INDEX_TOLERANCE * difference.indices):
            fault = f"{difference.moved} of {difference.indices} indices moved: expected at most 0.1%"
        if fault:
            _cases.cache_clear()  # a kernel that goes wrong may have damaged the inputs
            dtype = str(case.key.dtype).removeprefix("torch.")
            return CheckResult(False, worst, f"{fault} ({len(case.key)} tokens, {kv_heads} KV heads, {dtype})")
    return CheckResult(True, worst, f"{len(cases)} cases, {moved} of {indices} indices and {fields} fields a step off")


def compare(got: Tensor, want: Tensor, case: StoreCase) -> Difference:
    """``got`` against ``want``, both ``case.before`` after the case's store, with everything between the slots."""
    layout = case.codec.layout
    planes = layout.format.separate_planes
    block_size = want.shape[-3]
    slots = case.slot_mapping[case.slot_mapping >= 0].long()
    at = slots // block_size, slots % block_size
    rest = _moved(want, want.device)
    moved = indices = fields = 0
    fault = None
    for plane, (side, row) in enumerate((("key", layout.key), ("value", layout.value))):
        start = 0 if planes or not plane else layout.value_offset
        part = slice(start, start + row.size)
        ours, theirs, patched = ((c[:, plane] if planes else c)[..., part] for c in (got, want, rest))
        a, b = ours[at], theirs[at]
        steps = (_indices(a, row) - _indices(b, row)).abs()
        exact = side == "key" and not layout.format.key_codebook
        indices += 0 if exact else steps.numel()
        moved += int((steps != 0).sum())
        if bool((steps > 1).any()) or (exact and bool(steps.any())):
            fault = fault or f"{side}: an index is {int(steps.max())} levels off"
        for offset in (row.norm_offset, row.scale_offset, row.zero_offset):
            if offset is not None:
                distance = (_ordered(a, offset) - _ordered(b, offset)).abs()
                fields += int((distance != 0).sum())
                if bool((distance > 1).any()):
                    fault = fault or f"{side}: the field at byte {offset} is {int(distance.max())} steps of fp16 off"
        if not torch.equal(a[..., : 2 * row.outliers], b[..., : 2 * row.outliers]):
            fault = fault or f"{side}: outliers are not exact"
        patched[at] = a
    if not torch.equal(_bytes(got), _bytes(rest)):
        fault = fault or "bytes that carry no data of a stored token were written"
    return Difference(indices, moved, fields, fault)


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


def _ordered(data: Tensor, offset: int) -> Tensor:
    """The fp16 field at byte ``offset`` as a number that counts fp16's steps; both zeros are 0."""
    bits = data[..., offset].long() | data[..., offset + 1].long() << 8
    return torch.where(bits >= 0x8000, 0x8000 - bits, bits)


def _bytes(cache: Tensor) -> Tensor:
    """The whole storage of ``cache``."""
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on ``device`` with strides, gaps and all."""
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
