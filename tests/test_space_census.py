"""The census: counted by constraint and axis, it is what a walk over every point of the grid counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tuner.formats import FORMATS
from tuner.search.constraints import space_for
from tuner.space import Axis, Config, Constraint, Problem, Space, default_config, get_space
from tuner.space.census import Census, census, points_left
from tuner.space.core import Joint, Value
from tuner.targets import Target, get_target

TARGET = get_target("sm_121")
PROBLEM = Problem("dequant", 128, 1, "turboquant_4bit_nc")


def walk(space: Space, problem: Problem) -> Census:
    names = [c.name for c in space.constraints]
    alive, refused, alone = 0, dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for values in space:
        reasons = [c.name for c in space.refusals(space.config(problem, values), TARGET)]
        alive += not reasons
        for name in reasons:
            refused[name] += 1
            alone[name] += len(reasons) == 1
    return Census(space.size, alive, refused, alone)


@pytest.mark.parametrize("op", ["decode", "dequant", "store"])
@pytest.mark.parametrize("name", FORMATS)
def test_counts_what_a_walk_counts(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of the space that is drawn, but holds the default, so that something is left."""
    rng = random.Random(f"{op} {name}")
    problem = Problem(op, rng.choice((128, 256)), rng.choice((4, 6)) if op == "decode" else 1, name)
    full, some = space_for(op, 8), default_config(problem)
    small = full
    while small.size > 1500:
        axis = rng.choice([a for a in small.axes if len(a.values) > 1])
        others = [v for v in axis.values if v != some[axis.name]]
        kept = {some[axis.name], *rng.sample(others, len(others) - 1)}
        small = small.restricted({axis.name: tuple(kept)})
    counted = census(small, problem, TARGET)
    assert counted == walk(small, problem) and counted.alive and any(counted.alone.values())
    for large in (0, 8, 64):  # as in a space with masks of many points: all, some or few of them
        monkeypatch.setattr("tuner.space.census._LARGE", large)
        assert census(small, problem, TARGET) == counted
        monkeypatch.setattr("tuner.space.census._PART", 4 * large + 10)
    left = [v for v in small if not small.refusals(small.config(problem, v), TARGET)]
    assert list(points_left(small, problem, TARGET)) == left


def doubled(config: Config) -> int:
    return 2 * int(config["a"])


def difference(config: Config) -> int:
    return config.of(doubled) - int(config["c"]) if config["b"] == "x" else 0


class View:
    def __init__(self, config: Config) -> None:
        self.least, self.letter = min(config["a"], config["c"]), config["b"]


VIEW = Joint(View, ("letter", "least"))
AXES = (Axis("a", (1, 2, 3), ""), Axis("b", ("x", "y"), ""), Axis("c", (4, 2, 1, 3), ""), Axis("d", (0, 1), ""))


@pytest.mark.parametrize(
    "refuses",
    [
        lambda c: False,
        lambda c: True,
        lambda c: c.problem.head_dim == 128 and c["b"] == "y",
        lambda c: c["a"] == 2 and (c["b"] == "x" or c["c"] > 2),
        lambda c: c["a"] == (1 if c["d"] else c["c"]),
        lambda c: c["c"] > 2 or (c["b"] == "x" and c["a"] == 3),
        lambda c: c.of(difference) > 0,
        lambda c: c.of(difference) > 0 and c["d"] == 1,
        lambda c: c.of(VIEW) in (("x", 2), ("y", 1)),
        lambda c: c.of(doubled) == 4 or c.of(VIEW)[1] == c["d"],
        # Ways of reading a configuration that name no axis.
        lambda c: "a=1 b=y" in c.describe(),
        lambda c: c.with_(b="x")["c"] == 3,
        lambda c: c.with_(b="x") == c,
        lambda c: c in {Config(PROBLEM, (("a", 2), ("b", "y"), ("c", 1), ("d", 0)))},
        lambda c: c.to_dict()["params"]["c"] == 1,
    ],
)
def test_whatever_a_constraint_reads_is_seen(refuses: Callable[[Config], bool]) -> None:
    constraints = (
        Constraint("refuses", "", lambda c, _: refuses(c)),
        Constraint("not", "", lambda c, _: not refuses(c)),
        Constraint("other", "", lambda c, _: c["a"] * c["c"] % 2 == 0),
    )
    space = replace(get_space("dequant"), axes=AXES, constraints=constraints)
    for some in (space, space.restricted({"b": ("y",)}), space.restricted({"a": (2, 3), "c": (1,)})):
        assert census(some, PROBLEM, TARGET) == walk(some, PROBLEM)


@pytest.mark.parametrize("restrict", [{}, {"c": (1,)}])
def test_without_constraints_all_points_are_left(restrict: dict[str, tuple[Value, ...]]) -> None:
    space = replace(get_space("dequant"), axes=AXES, constraints=()).restricted(restrict)
    assert census(space, PROBLEM, TARGET) == Census(space.size, space.size, {}, {})
    assert list(points_left(space, PROBLEM, TARGET)) == list(space)


def test_an_axis_that_is_not_there_is_a_mistake() -> None:
    space = replace(get_space("dequant"), constraints=(Constraint("typo", "", lambda c, _: c["wraps"] == 1),))
    with pytest.raises(KeyError, match="wraps"):
        census(space, PROBLEM, TARGET)


def test_decode_takes_few_evaluations() -> None:
    """Of tens of millions of points: all constraints together are asked fewer than 100,000 times."""
    asked = 0

    def counted(constraint: Constraint) -> Constraint:
        def refuses(config: Config, target: Target) -> bool:
            nonlocal asked
            asked += 1
            return constraint.refuses(config, target)

        return replace(constraint, refuses=refuses)

    space = space_for("decode", 8).restricted({"warps": (4, 16)})
    space = replace(space, constraints=tuple(map(counted, space.constraints)))
    problem = Problem("decode", 128, 4, "turboquant_4bit_nc")
    assert census(space, problem, TARGET).total > 10_000_000
    assert asked < 100_000
