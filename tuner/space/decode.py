"""The space of ``wph_decode``: fused split-KV decode attention."""

from __future__ import annotations

from tuner.space.core import Axis, Config, Constraint, Problem, Space, Value
from tuner.targets import Target

AXES = (
    Axis("warps", (4, 1, 2, 8, 16), "warps per CTA"),
    Axis("head_warps", (1, 2, 4, 8), "KV heads that a CTA handles side by side"),
    Axis("dim_warps", (1, 2, 4), "warps that share a token, each with a slice of the head dim"),
    Axis("math", ("mma", "fma"), "dot products on tensor cores (mma.sync) or on CUDA cores"),
    Axis("lookup", ("table", "replicated", "prmt", "shuffle"), "how a codebook index becomes a level"),
    Axis("load", ("cp_async", "direct", "bulk"), "how slots travel: 16-byte asynchronous copies, plain loads, whole-page bulk copies"),
    Axis("load_bytes", (16, 8, 4), "width of one asynchronous copy"),
    Axis("stages", (2, 1, 3, 4), "tiles in flight per CTA"),
    Axis("tokens", (16, 32, 64), "tokens that a warp takes per softmax step"),
    Axis("accumulate", ("f32", "f16x2"), "type of the partial sums inside a step (CUDA cores)"),
    Axis("min_ctas", (1, 2, 3, 4, 6, 8), "CTAs per SM that the register allocation must allow"),
    Axis("reduction", ("last", "kernel"), "splits are merged by the last CTA to arrive or by a second kernel"),
    Axis("schedule", ("grid", "stream"), "splits per request fixed by the grid, or a persistent grid that divides all tokens evenly"),
)


def token_warps(config: Config) -> int:
    """Warps that take different tokens of the same heads."""
    return config["warps"] // (config["head_warps"] * config["dim_warps"])


def step_tokens(config: Config) -> int:
    """Tokens that a CTA consumes per step."""
    return token_warps(config) * config["tokens"]


def head_tiles(config: Config) -> int:
    """Tiles of eight query heads (the N of mma.m16n8k16)."""
    return -(-config.problem.gqa // 8)
