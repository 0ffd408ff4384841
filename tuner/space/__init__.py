"""The search space: problems, configurations, and per op the axes with the constraints between them."""

from tuner.space.core import MAX_GQA, OPS, Axis, Config, Constraint, Problem, Space
from tuner.space.decode import DECODE
from tuner.space.dequant import DEQUANT
from tuner.space.store import STORE

SPACES = {space.op: space for space in (DECODE, DEQUANT, STORE)}


def get_space(op: str) -> Space:
    return SPACES[op]


def default_config(problem: Problem) -> Config:
    """The configuration that runs where no table names a better one."""
    return SPACES[problem.op].default(problem)


def seed_config(problem: Problem) -> Config:
    """The seed's layout: four warps per CTA."""
    return SPACES[problem.op].seed(problem)


__all__ = [
    "MAX_GQA",
    "OPS",
    "SPACES",
    "Axis",
    "Config",
    "Constraint",
    "Problem",
    "Space",
    "default_config",
    "get_space",
    "seed_config",
]
