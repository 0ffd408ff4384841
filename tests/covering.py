"""Matrices of emulated kernels: each format, head dim and warp count, other axes drawn so that values meet in pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import combinations, product

from tuner.formats import FORMATS, HEAD_DIMS
from tuner.space import Config, Problem, Space
from tuner.targets import Target

WARPS = (1, 2, 4, 8, 16)
DRAWS = 300

Pairs = set[tuple[object, ...]]


def pairs(config: Config) -> Pairs:
    """Of all that makes a kernel, each two things that meet in it."""
    problem = config.problem
    traits = *config.params, ("format", problem.cache_format), ("head_dim", problem.head_dim), ("gqa", problem.gqa)
    return set(combinations(traits, 2))


def most_new(drawn: Iterable[Config], met: Pairs, space: Space, target: Target) -> Config | None:
    """Of the configurations that are allowed, the one with most pairs that are not in ``met``, where they are then."""
    for config in sorted(drawn, key=lambda config: len(pairs(config) - met), reverse=True):
        if not space.refusals(config, target):
            met |= pairs(config)
            return config
    return None


def covering(
    space: Space, target: Target, draw: Callable[[random.Random, Problem, int], Config]
) -> dict[tuple[str, int], list[Config]]:
    """Per format and head dim an allowed configuration of each warp count, of one query head per KV head."""
    rng, met = random.Random(0), Pairs()
    configs: dict[tuple[str, int], list[Config]] = {}
    for name, head_dim, warps in product(FORMATS, HEAD_DIMS, WARPS):
        problem = Problem(space.op, head_dim, 1, name)
        chosen = most_new((draw(rng, problem, warps) for _ in range(DRAWS)), met, space, target)
        assert chosen is not None, problem
        configs.setdefault((name, head_dim), []).append(chosen)
    return configs
