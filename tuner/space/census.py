"""Counts a space exactly without visiting its grid, which has millions of points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.space.core import Constraint, Problem, Space, Value
from tuner.space.tabulate import Grid
from tuner.targets import Target


@dataclass(frozen=True)
class Census:
    """``total`` points of the grid, ``alive`` of them refused by nothing; ``refused``: constraint name -> points.

    A point may be refused by several constraints; ``alone`` counts those that only this one refuses.
    """

    total: int
    alive: int
    refused: dict[str, int]
    alone: dict[str, int]


def census(space: Space, problem: Problem, target: Target) -> Census:
    """The counts of ``space`` for ``problem`` on ``target``."""
    grid = Grid(space, problem)
    refused = {constraint.name: _refused(grid, constraint, target) for constraint in space.constraints}
    allowed = {name: ~mask for name, mask in refused.items()}
    return Census(
        total=space.size,
        alive=_count(space, *allowed.values()),
        refused={name: _count(space, mask) for name, mask in refused.items()},
        alone={name: _count(space, *(allowed | {name: mask}).values()) for name, mask in refused.items()},
    )


def points_left(space: Space, problem: Problem, target: Target) -> Iterator[dict[str, Value]]:
    """The points that nothing refuses, in the order of ``space``, whose whole grid this marks."""
    grid = Grid(space, problem)
    left = np.ones([len(axis.values) for axis in space.axes], dtype=np.bool_)
    for constraint in space.constraints:
        left &= ~_refused(grid, constraint, target)
    for point in np.argwhere(left).tolist():
        yield {axis.name: axis.values[n] for axis, n in zip(space.axes, point, strict=True)}


def _refused(grid: Grid, constraint: Constraint, target: Target) -> npt.NDArray[np.bool_]:
    """Where ``constraint`` refuses, a dimension per axis: of length 1 where the axis does not matter."""
    answers = grid.answers(lambda config: bool(constraint.refuses(config, target)))
    return np.array(answers.values)[answers.index]


def _count(space: Space, *masks: npt.NDArray[np.bool_]) -> int:
    """Points at which all ``masks`` are true: the sum of their product, which needs no array of all axes at once."""
    free = set(range(len(space.axes)))
    operands: list[Any] = []
    for mask in masks:
        read = [n for n, size in enumerate(mask.shape) if size > 1]
        free -= set(read)
        operands += mask.astype(np.int64).squeeze(), read
    summed = np.einsum(*operands, [], optimize="greedy") if masks else 1
    return int(summed) * math.prod(len(space.axes[n].values) for n in free)
