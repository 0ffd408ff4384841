"""A matrix of few kernels in which most values of axes meet each other, each format and each head dim."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from tuner.space import Config, Space
from tuner.targets import Target

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
