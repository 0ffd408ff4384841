"""What tests of ``wph_store`` share: cases, and one emulated launch compared with the reference."""

from __future__ import annotations

from functools import cache

import torch
from emulated import emulate_store
from torch import Tensor

from tuner import emulate
from tuner.check_store import Difference, StoreCase, compare, store_case
from tuner.formats import FORMATS
from tuner.reference import store
from tuner.render import render
from tuner.space import Config, Problem, default_config

STORES: tuple[dict[str, int | str], ...] = (
    {"store": "direct", "store_bytes": 4},
    *({"store": "staged", "store_bytes": n} for n in (4, 8, 16)),
)
"""Ways to write, with the widths that they have."""
RUN_STORES: tuple[dict[str, int | str], ...] = (
    {"store": "run"},
    {"store": "ahead"},
    {"store": "ahead", "sides": "copied"},
    {"store": "ahead", "sides": "copied", "loop": "two"},
)
"""Ways to write slots that lie side by side as one."""
UNEVEN = torch.tensor([-0.5, -0.01, 0.0, 0.001, 0.002, 0.0025, 0.3, 0.3])
"""Levels of 3 bits so uneven that two midpoints share a cell."""
JOINT = [f for f in FORMATS if not FORMATS[f].separate_planes]
"""Formats whose key and value share a slot."""


@cache
def compiled(*configs: Config) -> None:
    """Compiles all emulated kernels of a test at once."""
    emulate.compile_many([render(c) for c in configs])


def twin(cache: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    storage = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage()).clone()
    return storage.as_strided(cache.shape, cache.stride(), cache.storage_offset())


def check(config: Config, case: StoreCase, seed: int = 0) -> Difference:
    got, want = twin(case.before), twin(case.before)
    emulate_store(config, got, case, seed=seed)
    store(want, case.key, case.value, case.slot_mapping, case.codec)
    difference = compare(got, want, case)
    assert difference.fault is None, f"{difference.fault} ({config.describe()})"
    return difference


def small_case(format_name: str, head_dim: int, tokens: int = 11, **options: object) -> StoreCase:
    return store_case(Problem("store", head_dim, 1, format_name), tokens, seed=head_dim, **options)  # type: ignore[arg-type]


def with_quotients_before_a_half(like: Tensor, bits: int, cancels: bool = False) -> Tensor:
    """Rows as ``like`` [tokens, heads, D] that hold values whose quotient is .5 - 2^-25, most of them.

    The lowest value is the distance of `g` to the float before it, so the distance of `g` is that float, and the range
    is rounded to 2 g times the number of steps: the quotient is the number before a half, or the one before that where
    `g` is 1.25 times a power of two. ``cancels``: the lowest value is -1, and others hardly differ from zero, so that
    they lie as far from it as the float before 1.
    """
    tokens, heads, dim = like.shape
    number = torch.arange(tokens * heads).reshape(tokens, heads, 1)
    g = (1 + number % 4 / 4) * 2.0 ** (number // 4 % 3)
    steps = 2**bits - 1
    low, high, held = g - torch.nextafter(g, torch.zeros(())), 2 * steps * g, g
    if cancels:
        low, high, held = -torch.ones_like(g), torch.full_like(g, 2 * steps - 1), torch.full_like(g, -(2.0**-24))
    rows = g + (high - g) * torch.rand(like.shape, generator=torch.Generator().manual_seed(dim))
    rows[..., ::3] = held
    rows[..., 1:2], rows[..., 4:5] = low, high
    return rows.to(like.dtype)


def problem_config(format_name: str, head_dim: int, **changes: int | str) -> Config:
    return default_config(Problem("store", head_dim, 1, format_name)).with_(**changes)
