"""Launch geometry and scratch sizes: what a caller needs beside the cubin to start a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.space.core import Config
from tuner.space.dequant import shape
from tuner.space.plan import DecodePlan
from tuner.space.store import shape as store_shape
from tuner.space.traits import GROUP_TOKENS
from tuner.targets import Target


@dataclass(frozen=True)
class Geometry:
    """Grid in CTAs, block in threads, dynamic shared memory in bytes."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int


@dataclass(frozen=True)
class Scratch:
    """Device memory that a launch needs: fp32 partial results, and int32 counters that start as zero."""

    partial_floats: int
    counters: int


_REDUCE_WARPS = 4


def entry_points(config: Config) -> tuple[str, ...]:
    """Names of the ``extern "C"`` kernels of a source, the main one first."""
    if config.problem.op == "decode" and config["reduction"] == "kernel":
        return ("wph_decode", "wph_decode_reduce")
    return (f"wph_{config.problem.op}",)


def _head_groups(config: Config, kv_heads: int) -> int:
    return -(-kv_heads // int(config["head_warps"]))


def _shares(config: Config, splits: int) -> int:
    """Contributions to a request that go through global memory: one of each split, or of each cluster of them."""
    return -(-splits // DecodePlan(config).cluster)


def decode_geometry(config: Config, *, batch: int, kv_heads: int, splits: int) -> Geometry:
    """Geometry of ``wph_decode``; ``splits`` as in DecodeParams."""
    plan = DecodePlan(config)
    requests = batch if config["schedule"] == "grid" else 1
    ctas = _shares(config, splits) * plan.cluster
    return Geometry((ctas, _head_groups(config, kv_heads), requests), 32 * config["warps"], plan.shared_bytes)


def reduce_geometry(config: Config, *, batch: int, kv_heads: int) -> Geometry:
    """Geometry of ``wph_decode_reduce`` (configurations with ``reduction=kernel``): a warp per query head."""
    rows = kv_heads * config.problem.gqa
    return Geometry((-(-rows // _REDUCE_WARPS), batch, 1), 32 * _REDUCE_WARPS, 0)


GRID_YZ_MAX = 65535
"""CTAs that a grid can have in y or z."""
DIRTY_RUN_TOKENS = 16
"""Longest run of adjacent dirty slots that one entry of ``wph_dequant``'s grid decodes: blocks may hold thousands."""


def dequant_geometry(config: Config, *, entries: int, block_size: int, kv_heads: int) -> Geometry:
    """Geometry of ``wph_dequant``; ``entries`` = batch x max_blocks, the cells of the block table, or dirty slots.

    ``block_size``: tokens per entry, for dirty slots DIRTY_RUN_TOKENS at most. x counts the CTAs of an entry, y and z
    together the entries (a dimension beyond x holds no more than 65535).
    """
    s = shape(config)
    ctas = -(-block_size * kv_heads // s.slots)
    y = max(1, min(entries, GRID_YZ_MAX))
    return Geometry((ctas, y, max(1, -(-entries // y))), 32 * config["warps"], s.shared_bytes)


def store_geometry(config: Config, *, tokens: int, kv_heads: int) -> Geometry:
    """Geometry of ``wph_store``: x counts the CTAs over all tokens x heads."""
    s = store_shape(config)
    return Geometry((max(1, -(-tokens * kv_heads // s.pairs)), 1, 1), 32 * config["warps"], s.shared_bytes)


def dynamic_shared_bytes(config: Config) -> int:
    """Dynamic shared memory of a CTA of the op's main kernel: what every launch of ``config`` asks for."""
    if config.problem.op == "decode":
        return DecodePlan(config).shared_bytes
    return (shape if config.problem.op == "dequant" else store_shape)(config).shared_bytes


def decode_scratch(config: Config, *, batch: int, kv_heads: int, splits: int) -> Scratch:
    """Scratch of ``wph_decode``; counters must be zero before the first launch and are zero after each.

    Every slot holds per query head a maximum, a sum and the unnormalised output. Clusters leave one slot each, and
    their CTAs of equal rank share a counter.
    """
    slots = batch * _shares(config, splits) if config["schedule"] == "grid" else 2 * splits
    rows = slots * kv_heads * config.problem.gqa
    plan = DecodePlan(config)
    branches = -(-splits // plan.branch)
    others = {"kernel": 0, "tree": 1 + branches}.get(str(config["reduction"]), plan.cluster)
    counters = batch * _head_groups(config, kv_heads) * (plan.arrival_counters if plan.waits else others)
    return Scratch(-(-2 * rows // 4) * 4 + rows * plan.partial_row_floats, counters)


def split_candidates(
    config: Config, *, registers: int, batch: int, kv_heads: int, max_context: int, target: Target
) -> tuple[int, ...]:
    """Values of ``splits`` worth timing, the most promising first (about three).

    A persistent grid divides evenly, so it wants to fill the GPU once (or half, where merging costs more than
    idling). The grid schedule wants whole waves: the CTAs of all requests and heads together come near a multiple of
    what the GPU holds at once. Neither wants more splits than balance reading and merging. Clusters are whole.
    """
    plan = DecodePlan(config)
    per_sm = max(1, target.resident_ctas(config["warps"], registers, plan.shared_bytes))
    resident = target.held_ctas(per_sm, plan.cluster)
    heads = _head_groups(config, kv_heads)
    steps = max(1, -(-max_context // (GROUP_TOKENS * plan.token_warps * plan.tiles)))
    balanced = _balanced_splits(plan, steps)
    if config["schedule"] == "grid":
        per_wave = max(1, resident // (heads * batch) // plan.cluster * plan.cluster)
        wanted = [min(per_wave, balanced), per_wave, 2 * per_wave, max(1, per_wave // 2), 4 * per_wave]
        limit = steps
    else:
        full = max(1, resident // heads)
        wanted = [min(full, balanced * batch), full, max(1, full // 2), max(1, full // 4)]
        limit = steps * batch
    return tuple(dict.fromkeys(_shares(config, min(w, limit)) * plan.cluster for w in wanted))[:3]


_STEP_US = 1.0
_MERGED_BYTES_PER_US = 56e3
"""Rough times on an H200 (docs/kernel-notes.md): a step of a CTA, and what one CTA alone reads of partial results (32
bytes per cycle, as the static model has it)."""


def _balanced_splits(plan: DecodePlan, steps: int) -> int:
    """Splits of a request of ``steps`` steps for which ``steps / splits`` of them and merging ``splits`` parts, one
    after the other, take the least time together.
    """
    config = plan.config
    rows = _REDUCE_WARPS if config["reduction"] == "kernel" else config["head_warps"] * config.problem.gqa
    merge_us = 4 * rows * plan.partial_row_floats / _MERGED_BYTES_PER_US
    merge_us /= plan.branch if config["reduction"] == "tree" else plan.cluster
    return max(1, round(math.sqrt(steps * _STEP_US / merge_us)))
