"""Counts a space exactly without visiting its grid, which has millions of points.

A constraint reads few axes, and which ones it reads depends only on the values it has read before. So it is a
decision tree: each path from the root is one evaluation and decides a whole box of the grid, whose other axes are free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.space.core import Config, Constraint, Problem, Space, Value
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
    shape = tuple(len(axis.values) for axis in space.axes)
    times_refused = np.zeros(shape, dtype=np.uint8)
    masks = {}
    for constraint in space.constraints:
        mask = np.zeros(shape, dtype=bool)
        for box in _refused_boxes(space, problem, target, constraint):
            mask[box] = True
        masks[constraint.name] = mask
        times_refused += mask
    once = times_refused == 1
    return Census(
        total=space.size,
        alive=int((times_refused == 0).sum()),
        refused={name: int(mask.sum()) for name, mask in masks.items()},
        alone={name: int((mask & once).sum()) for name, mask in masks.items()},
    )


class _Traced(Config):
    """A configuration that remembers which axes were read, in the order of their first reading."""

    def __init__(self, problem: Problem, params: tuple[tuple[str, Value], ...]) -> None:
        super().__init__(problem, params)
        object.__setattr__(self, "read", {})

    read: dict[str, None]

    def __getitem__(self, axis: str) -> Any:
        self.read[axis] = None
        return super().__getitem__(axis)


def _refused_boxes(
    space: Space, problem: Problem, target: Target, constraint: Constraint
) -> Iterator[tuple[int | slice, ...]]:
    """Boxes that ``constraint`` refuses, as indices into the grid: depth first, one evaluation per path."""
    counts = {axis.name: len(axis.values) for axis in space.axes}
    path: dict[str, int] = {}
    while True:
        values = tuple((axis.name, axis.values[path.get(axis.name, 0)]) for axis in space.axes)
        config = _Traced(problem, values)
        refuses = constraint.refuses(config, target)
        path = {name: path.get(name, 0) for name in config.read}
        if refuses:
            yield tuple(path[axis.name] if axis.name in path else slice(None) for axis in space.axes)
        # The next path: advance the axis read last that has a value left, and forget what was read after it.
        while path:
            name, index = path.popitem()
            if index + 1 < counts[name]:
                path[name] = index + 1
                break
        if not path:
            return
