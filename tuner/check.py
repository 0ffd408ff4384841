"""The correctness gate that a kernel passes before it is timed, and again after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tuner.space import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.reference import Case

Level = Literal["quick", "full"]
TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3}
"""Largest relative error of a head, by output type."""


@dataclass(frozen=True)
class CheckResult:
    """``worst_error`` is the largest relative error seen; ``detail`` one line: what was checked, or what failed."""

    passed: bool
    worst_error: float
    detail: str


def check_decode(
    run: Callable[[Case, Tensor], None], problem: Problem, *, device: str = "cpu", level: Level = "quick"
) -> CheckResult:
    """Runs ``run(case, out)``, which must fill ``out`` [B, Hq, D], on the gate's cases and compares with float64."""
    raise NotImplementedError


def check_dequant(
    run: Callable[[Case, Tensor, Tensor], None], problem: Problem, *, device: str = "cpu", level: Level = "quick"
) -> CheckResult:
    """Likewise for ``run(case, key_out, value_out)``, bf16 [B * max_blocks, block_size, Hk, D]."""
    raise NotImplementedError
