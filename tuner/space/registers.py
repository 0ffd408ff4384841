"""What registers a configuration of ``wph_decode`` needs at least, and has."""

from __future__ import annotations

from tuner.space.core import Config
from tuner.space.plan import DecodePlan
from tuner.targets import Target

REGISTER_LIMIT = 255
_FIXED_REGISTERS = 56
"""Registers for addresses, loop state and words in flight, beside what the estimate counts."""


def register_estimate(config: Config) -> int:
    """A lower bound on registers per thread: accumulators, scores and held query fragments."""
    plan, gqa = DecodePlan(config), config.problem.gqa
    outliers = plan.outlier_steps
    if config["math"] == "mma":
        sums = (plan.slice_dims // 16 + outliers) * plan.head_tiles * 4
        scores = plan.tiles * plan.head_tiles * 4 * (2 if outliers else 1)
        held = 4 * plan.head_tiles * (plan.key_steps + outliers) if plan.holds_query else 0
        state = 8 * plan.head_tiles
    else:
        sums = (plan.slice_dims // 8 + 2 * outliers) * gqa
        scores = plan.tiles * gqa * 2 * (2 if outliers else 1)
        held = 4 * gqa
        state = 4 * gqa
    return _FIXED_REGISTERS + sums + scores + held + state


def too_many_registers(config: Config, target: Target) -> bool:
    """Whether ``min_ctas`` CTAs per SM leave a thread fewer registers than it needs at least."""
    threads = 32 * config["warps"] * config["min_ctas"]
    return register_estimate(config) > min(target.registers // threads // 8 * 8, REGISTER_LIMIT)
