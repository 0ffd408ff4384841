"""Problems, configurations, axes and constraints: the vocabulary that every op's space is declared in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from tuner.errors import UsageError
from tuner.formats import SlotLayout, check_head_dim, slot_layout
from tuner.targets import Target

Value = int | str
T = TypeVar("T")
OPS = ("decode", "dequant", "store")
MAX_GQA = 16


@dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for. ``gqa`` is query heads per KV head (1 for ops without a query)."""

    op: str
    head_dim: int
    gqa: int
    cache_format: str

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise UsageError(f"unknown op {self.op!r}: expected one of {', '.join(OPS)}")
        check_head_dim(self.head_dim)
        slot_layout(self.cache_format, self.head_dim)
        if not 1 <= self.gqa <= MAX_GQA:
            raise UsageError(f"unsupported group size {self.gqa}: expected 1 to {MAX_GQA} query heads per KV head")

    @property
    def layout(self) -> SlotLayout:
        return slot_layout(self.cache_format, self.head_dim)


@dataclass(frozen=True)
class Config:
    """One kernel: a problem and a value for every axis, as (name, value) pairs in axis order."""

    problem: Problem
    params: tuple[tuple[str, Value], ...]

    @cached_property
    def _by_name(self) -> dict[str, Value]:
        return dict(self.params)

    def __getitem__(self, axis: str) -> Any:
        return self._by_name[axis]

    def of(self, function: Callable[[Config], T]) -> T:
        """What ``function`` says of this configuration. A constraint that asks here for what many configurations have
        in common lets a census (``space.tabulate``) evaluate it once for all of them. ``function`` reads only its
        argument and is known by its identity: it is not made anew at each call."""
        return function(self)

    def with_(self, **changes: Value) -> Config:
        """A copy with some axes changed; an unknown axis raises KeyError."""
        unknown = changes.keys() - self._by_name.keys()
        if unknown:
            raise KeyError(f"no such axis: {', '.join(sorted(unknown))}")
        return Config(self.problem, tuple((n, changes.get(n, v)) for n, v in self.params))

    def to_dict(self) -> dict[str, Any]:
        p = self.problem
        return {
            "op": p.op,
            "head_dim": p.head_dim,
            "gqa": p.gqa,
            "cache_format": p.cache_format,
            "params": dict(self.params),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Config:
        """Inverse of to_dict(); does not check axis values (``validate`` does)."""
        problem = Problem(data["op"], data["head_dim"], data["gqa"], data["cache_format"])
        return Config(problem, tuple(data["params"].items()))

    def describe(self) -> str:
        return " ".join(f"{n}={v}" for n, v in self.params)


@dataclass(frozen=True)
class Joint:
    """A function of a configuration: several attributes of ``view(config)``. Each reads few axes, so a census finds
    what they are together from what each of them is."""

    view: Callable[[Config], Any]
    attributes: tuple[str, ...]

    def __call__(self, config: Config) -> tuple[Any, ...]:
        view = self.view(config)
        return tuple(getattr(view, name) for name in self.attributes)

    def part(self, name: str) -> Callable[[Config], Any]:
        return lambda config: getattr(self.view(config), name)


@dataclass(frozen=True)
class Axis:
    """A parameter of the search: its values, the first being the plainest, and what it means.

    ``absent``: for an axis that came later, the value that kernels recorded before it have. Sources do not state it, so
    that those kernels keep their text, and tables need not.
    """

    name: str
    values: tuple[Value, ...]
    meaning: str
    absent: Value | None = None


@dataclass(frozen=True)
class Constraint:
    """``refuses(config, target)`` is true where the configuration cannot or should not be built."""

    name: str
    reason: str
    refuses: Callable[[Config, Target], bool]


@dataclass(frozen=True)
class Space:
    """All configurations of one op: axes, constraints and two landmark configurations."""

    op: str
    axes: tuple[Axis, ...]
    constraints: tuple[Constraint, ...]
    default: Callable[[Problem], Config]
    """The configuration that must work for every cache and GPU: what runs without a table."""
    seed: Callable[[Problem], Config]
    """The layout of the seed's kernel: four warps, one row or one KV head each."""
    leads: Callable[[Problem, int], tuple[Config, ...]] = lambda problem, kv_heads: ()
    """Layouts that tend to win for so many KV heads: a search tries those that are allowed before it samples."""
    renewed: Callable[[Config], tuple[Config, ...]] = lambda config: (config,)
    """A kernel that won before as a search tries it today, in one way or more: with what came since in the place of
    values of its."""

    def axis(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        expected = ", ".join(a.name for a in self.axes)
        raise UsageError(f"unknown axis {name!r} of op {self.op}: expected one of {expected}")

    def config(self, problem: Problem, values: Mapping[str, Value]) -> Config:
        """A configuration from one value per axis, in axis order; raises UsageError for a bad or missing value."""
        values = self.completed(values)
        for axis in self.axes:
            if axis.name not in values:
                raise UsageError(f"axis {axis.name} has no value")
            if values[axis.name] not in axis.values:
                expected = ", ".join(map(str, axis.values))
                raise UsageError(f"axis {axis.name} cannot be {values[axis.name]!r}: expected one of {expected}")
        return Config(problem, tuple((a.name, values[a.name]) for a in self.axes))

    def completed(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """``values``, in axis order, and what they leave out of axes that came later; nothing is checked."""
        known = {a.name: values.get(a.name, a.absent) for a in self.axes}
        return {name: value for name, value in known.items() if value is not None} | dict(values)

    def validate(self, config: Config) -> Config:
        """``config`` with its axes checked and ordered; raises UsageError naming what is wrong."""
        unknown = {n for n, _ in config.params} - {a.name for a in self.axes}
        if unknown:
            raise UsageError(f"unknown axis of op {self.op}: {', '.join(sorted(unknown))}")
        return self.config(config.problem, dict(config.params))

    def refusals(self, config: Config, target: Target) -> list[Constraint]:
        """The constraints that refuse ``config`` on ``target``; empty where it may be built."""
        return [c for c in self.constraints if c.refuses(config, target)]

    def restricted(self, allowed: Mapping[str, tuple[Value, ...]]) -> Space:
        """The same space with fewer values on some axes (as ``--warps 1,4`` asks)."""
        for name, values in allowed.items():
            axis = self.axis(name)
            bad = [v for v in values if v not in axis.values]
            if bad or not values:
                expected = ", ".join(map(str, axis.values))
                found = ", ".join(map(str, bad)) or "empty"
                raise UsageError(f"axis {name} cannot be {found}: expected one of {expected}")
        axes = tuple(
            replace(a, values=tuple(v for v in a.values if v in allowed.get(a.name, a.values))) for a in self.axes
        )
        return replace(self, axes=axes)

    def __iter__(self) -> Iterator[dict[str, Value]]:
        names = [a.name for a in self.axes]
        for values in itertools.product(*(a.values for a in self.axes)):
            yield dict(zip(names, values, strict=True))

    @property
    def size(self) -> int:
        """Points of the full grid, before constraints."""
        n = 1
        for axis in self.axes:
            n *= len(axis.values)
        return n
