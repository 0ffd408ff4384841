"""What functions of a configuration say at every point of a grid, from as few evaluations as they distinguish points.

A function reads few axes, and which ones it reads depends only on the values it has read before. So it is a decision
tree: each path from the root is one evaluation and decides a whole box of the grid, whose other axes are free. What it
asks through ``Config.of`` branches like an axis: by what that function says, not by all that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.space.core import Config, Joint, Problem, Space, Value

Function = Callable[[Config], Any]
Key = str | Function
"""What a decision tree branches by: the name of an axis, or another function."""


@dataclass(frozen=True)
class Answers:
    """``values``, all different, and which of them is the one at a point: ``index`` has a dimension per axis of the
    space, of length 1 where the axis does not matter."""

    values: tuple[Any, ...]
    index: npt.NDArray[np.integer[Any]]


class Grid:
    """The points of ``space`` for ``problem``. What was asked once is kept."""

    def __init__(self, space: Space, problem: Problem) -> None:
        self.space, self.problem = space, problem
        self._known: dict[Key, Answers] = {}
        for n, axis in enumerate(space.axes):
            shape = [len(axis.values) if n == m else 1 for m in range(len(space.axes))]
            self._known[axis.name] = Answers(axis.values, np.arange(len(axis.values)).reshape(shape))

    def answers(self, key: Key) -> Answers:
        """What the axis or function ``key`` is at every point. A function may be asked for values of ``Config.of`` that
        do not occur together: what it says of them is not used."""
        if key not in self._known:
            if isinstance(key, str):
                raise KeyError(key)
            self._known[key] = self._joint(key) if isinstance(key, Joint) else self._tree(key)
        return self._known[key]

    def _tree(self, function: Function) -> Answers:
        leaves = list(self._leaves(function))
        values = {value: n for n, value in enumerate(dict.fromkeys(value for _, value in leaves))}
        keys = list(dict.fromkeys(key for path, _ in leaves for key in path))
        read = [self.answers(key) for key in keys]
        narrow = np.min_scalar_type(len(values))  # an index may have many millions of points
        tree = np.empty([len(answers.values) for answers in read], dtype=narrow)
        for path, value in leaves:
            tree[tuple(path.get(key, slice(None)) for key in keys)] = values[value]
        index = tree[tuple(answers.index for answers in read)]
        return Answers(tuple(values), np.array(index, ndmin=len(self.space.axes)))

    def _leaves(self, function: Function) -> Iterator[tuple[dict[Key, int], Any]]:
        """The decision tree, depth first: which value each key has on the path, and what ``function`` says there."""
        path: dict[Key, int] = {}
        while True:
            value = function(_Traced(self, path))
            yield dict(path), value
            # The next path: advance the key read last that has a value left, and forget what was read after it.
            while path:
                key, n = path.popitem()
                if n + 1 < len(self.answers(key).values):
                    path[key] = n + 1
                    break
            if not path:
                return

    def _joint(self, joint: Joint) -> Answers:
        """The combinations that occur, of parts that were found one by one."""
        values: list[tuple[Any, ...]] = [()]
        index = np.zeros([1] * len(self.space.axes), dtype=np.int32)
        for part in map(self._tree, map(joint.part, joint.attributes)):
            count = len(part.values)
            codes = index * count + part.index
            occurs = np.zeros(len(values) * count, dtype=np.bool_)
            occurs[codes] = True
            index = (np.cumsum(occurs, dtype=np.int32) - 1)[codes]  # of the combinations that occur, its number
            values = [(*values[code // count], part.values[code % count]) for code in np.flatnonzero(occurs).tolist()]
        return Answers(tuple(values), index)


class _Traced(Config):
    """A configuration that adds to ``path`` whatever is read of it and not there yet, with the first of its values.

    There is no way around: all that a Config says beside its problem comes from an axis, ``of`` or ``params``.
    """

    _grid: Grid
    _path: dict[Key, int]

    def __init__(self, grid: Grid, path: dict[Key, int]) -> None:
        vars(self).update(problem=grid.problem, _grid=grid, _path=path)

    def __getitem__(self, axis: str) -> Any:
        return self._read(axis)

    def of(self, function: Function) -> Any:
        return self._read(function)

    @property
    def params(self) -> tuple[tuple[str, Value], ...]:
        return tuple((axis.name, self[axis.name]) for axis in self._grid.space.axes)

    def __eq__(self, other: object) -> bool:  # dataclasses of different classes are never equal
        return Config(self.problem, self.params) == other

    __hash__ = Config.__hash__

    def _read(self, key: Key) -> Any:
        return self._grid.answers(key).values[self._path.setdefault(key, 0)]
