"""The layouts of the study: warps per CTA, what they divide among themselves, and rows in flight per warp."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tuner.model import LATENCY_US
from tuner.search.constraints import space_for
from tuner.search.evaluate import Candidate
from tuner.space import Config, Problem, default_config
from tuner.space.core import Value
from tuner.space.dequant import shape as cover_of
from tuner.space.plan import DecodePlan
from tuner.space.traits import GROUP_TOKENS
from tuner.targets import Target
from tuner.workload import Bucket, Shape, default_shape

FORMAT = "turboquant_4bit_nc"
BUCKETS = {
    "decode": (Bucket(1, 4096), Bucket(1, 65536), Bucket(16, 16384), Bucket(128, 8192)),
    "dequant": (Bucket(1, 4096), Bucket(1, 65536), Bucket(16, 16384), Bucket(128, 4096)),
}
AXES: dict[str, dict[str, tuple[Value, ...]]] = {
    "decode": {
        "warps": (1, 2, 4, 8, 16),
        "head_warps": (1, 2, 4, 8),
        "dim_warps": (1, 2, 4),
        "stages": (1, 2, 4),
    },
    "dequant": {
        "warps": (1, 2, 4, 8, 16, 32),
        "divide": ("heads", "tokens", "planes"),
        "dim_warps": (1, 2),
        "rows": (1, 2, 4, 8),
    },
}
"""What varies. All else is ``base``'s: codebook levels from registers (prmt), so that no table in shared memory counts
against layouts with many small CTAs; asynchronous copies (decode), or plain loads and one step per CTA (dequant)."""


@dataclass(frozen=True)
class Layout:
    """A configuration as the study sees it. ``split`` names what the warps of a CTA divide.

    ``rows_in_flight``: tokens (decode) or rows of keys or values (dequant) whose loads one warp keeps in flight.
    """

    config: Config
    split: str
    rows_in_flight: int

    @property
    def warps(self) -> int:
        return int(self.config["warps"])


def base(problem: Problem) -> Config:
    """The configuration that the layouts are variants of."""
    config = default_config(problem)
    lookup = "prmt" if problem.layout.format.key_codebook else "table"
    return config.with_(lookup=lookup) if problem.op == "decode" else config.with_(lookup=lookup, steps=1)


def study_problem(op: str, head_dim: int) -> tuple[Problem, Shape]:
    shape = default_shape(head_dim)
    return Problem(op, head_dim, shape.gqa if op == "decode" else 1, FORMAT), shape


def layouts(problem: Problem, shape: Shape, target: Target) -> list[Layout]:
    """Every layout that the space allows on ``target``, each warp count in turn: a study may end early."""
    space = space_for(problem.op, shape.kv_heads)
    found = [_layout(c) for c in _configs(problem) if not space.refusals(c, target)]
    random.Random(0).shuffle(found)
    by_warps = [[x for x in found if x.warps == w] for w in AXES[problem.op]["warps"]]
    return [x for turn in itertools.zip_longest(*by_warps) for x in turn if x is not None]


def bytes_in_flight(candidate: Candidate, shape: Shape, target: Target) -> float:
    """Bytes of loads that an SM full of this kernel's CTAs keeps under way."""
    config, layout = candidate.config, candidate.config.problem.layout
    ctas = target.resident_ctas(config["warps"], candidate.registers, candidate.shared_bytes)
    if config.problem.op == "decode":
        plan = DecodePlan(config)
        tokens = config["stages"] * plan.tiles * plan.token_warps * GROUP_TOKENS
        return float(ctas * tokens * config["head_warps"] * layout.token_bytes)
    rows = config["warps"] // config["dim_warps"] * config["rows"] * cover_of(config).rows_per_pass
    return ctas * rows * layout.token_bytes / 2


def bytes_needed(target: Target) -> float:
    """Bytes that every SM must keep under way to reach the read bandwidth (Little's law)."""
    return target.bandwidth_gbps * 1e3 * LATENCY_US[target.arch] / target.sms


def _configs(problem: Problem) -> Iterator[Config]:
    axes = AXES[problem.op]
    for values in itertools.product(*axes.values()):
        yield base(problem).with_(**dict(zip(axes, values, strict=True)))


def _layout(config: Config) -> Layout:
    if config.problem.op == "decode":
        plan = DecodePlan(config)
        split = f"heads {config['head_warps']} x tokens {plan.token_warps} x dims {config['dim_warps']}"
        return Layout(config, split, config["stages"] * plan.tiles * GROUP_TOKENS)
    dims = f" x dims {config['dim_warps']}" if config["dim_warps"] > 1 else ""
    return Layout(config, f"{config['divide']}{dims}", config["rows"] * cover_of(config).rows_per_pass)
