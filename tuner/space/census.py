"""Counts a space exactly without visiting its grid, which has millions of points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
    lengths = [len(axis.values) for axis in space.axes]
    alive, *others = _counts(lengths, [~mask for mask in refused.values()])
    return Census(
        total=space.size,
        alive=alive,
        refused={name: space.size // mask.size * int(np.count_nonzero(mask)) for name, mask in refused.items()},
        alone={name: count - alive for name, count in zip(refused, others, strict=True)},
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
    return answers.index == answers.values.index(True) if True in answers.values else np.zeros_like(answers.index, bool)


_LARGE = 1 << 20
"""Points of a mask beyond which a contraction takes longer than all those of smaller masks."""
_PART = 1 << 24
"""Points of a mask beyond which the grid is counted in parts, for the sake of memory: a count of eight bytes each."""


@dataclass(frozen=True)
class _Mask:
    """1 where a point is allowed, 0 elsewhere, or sums of such: a dimension per axis that is in ``read``, in order."""

    counts: npt.NDArray[np.int64]
    read: tuple[int, ...]

    @staticmethod
    def of(mask: npt.NDArray[np.bool_]) -> _Mask:
        return _Mask(mask.astype(np.int64).squeeze(), tuple(n for n, size in enumerate(mask.shape) if size > 1))


def _contract(masks: Sequence[_Mask], kept: Iterable[int]) -> _Mask:
    """The product of ``masks``, summed over all axes but ``kept``: it needs no array of all axes at once."""
    read = tuple(sorted({n for mask in masks for n in mask.read}.intersection(kept)))
    operands: list[Any] = []
    for mask in masks:
        operands += mask.counts, mask.read
    return _Mask(np.einsum(*operands, read, optimize="greedy"), read) if masks else _Mask(np.array(1), ())


def _counts(lengths: Sequence[int], allowed: Sequence[npt.NDArray[np.bool_]]) -> list[int]:
    """Points of a grid of so many values per axis at which all of ``allowed`` are true, then for each of them: at which
    all others are.
    """
    largest = max(allowed, key=np.size, default=np.ones([1] * len(lengths), bool))
    if largest.size > _PART:
        axis = int(np.argmax(largest.shape))
        rest = [1 if n == axis else length for n, length in enumerate(lengths)]
        parts = (
            _counts(rest, [mask.take([n if mask.shape[axis] > 1 else 0], axis) for mask in allowed])
            for n in range(lengths[axis])
        )
        return [sum(counts) for counts in zip(*parts, strict=True)]
    masks = [_Mask.of(mask) for mask in allowed]
    return [_count(lengths, masks), *_counts_without_each(lengths, masks)]


def _count(lengths: Sequence[int], masks: Sequence[_Mask]) -> int:
    """Points at which all ``masks`` are true."""
    return int(_contract(masks, ()).counts) * _free(lengths, masks)


def _free(lengths: Sequence[int], masks: Sequence[_Mask]) -> int:
    """Points of the axes that no mask reads."""
    read = {n for mask in masks for n in mask.read}
    return math.prod(length for n, length in enumerate(lengths) if n not in read)


def _counts_without_each(lengths: Sequence[int], masks: Sequence[_Mask]) -> list[int]:
    """For each of ``masks``: points at which all others are true.

    Half of the small masks are contracted with the large ones for the axes that the other half reads, which is then
    halved itself: only the first of these contractions are large, where one per mask would be.
    """
    large = [n for n, mask in enumerate(masks) if mask.counts.size > _LARGE]
    small = sorted(set(range(len(masks))) - set(large), key=lambda n: masks[n].read)
    sums: dict[int, int] = {n: int(_contract([*masks[:n], *masks[n + 1 :]], ()).counts) for n in large}

    def halve(carried: list[_Mask], left: list[int]) -> None:
        if len(left) == 1:
            sums[left[0]] = int(_contract(carried, ()).counts)
            return
        middle = len(left) // 2
        for kept, others in ((left[:middle], left[middle:]), (left[middle:], left[:middle])):
            axes = {axis for n in kept for axis in masks[n].read}
            halve([_contract([*carried, *(masks[n] for n in others)], axes)], kept)

    if small:
        halve([masks[n] for n in large], small)
    return [sums[n] * _free(lengths, [*masks[:n], *masks[n + 1 :]]) for n in range(len(masks))]
