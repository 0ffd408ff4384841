"""What a race that could not tell kernels apart decides, with the other times that there are."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from analytic_search import BUCKETS, PROBLEM, SHAPE, TARGET, Analytic, search

from tuner.search import Time
from tuner.search.choose import _settled
from tuner.search.evaluate import Final, limit_us
from tuner.space import Config
from tuner.table.portfolio import TOLERANCE
from tuner.workload import Bucket

SIMPLE, FAST = 0, 1


def outcome(*times: float | None, winner: int = SIMPLE, tie: bool = True) -> Final:
    return Final(tuple(t and Time(t, t, t) for t in times), winner, tie, {"triton": 90.0})


@pytest.mark.parametrize(
    ("raced", "screened", "winner"),
    [
        ((10.4, 10.0), (10.5, 10.1), FAST),  # behind in both
        ((10.4, 10.0), (10.1, 10.0), SIMPLE),  # behind in the race alone
        ((10.1, 10.0), (10.5, 10.0), SIMPLE),  # behind in the search alone
        ((10.4, 10.0), (10.0, 10.4), SIMPLE),  # one says this, one that
        ((10.4, 10.0, None), (10.5, 10.1, 9.0), FAST),  # whoever did not finish is nobody's measure
        ((10.4, None, 10.0), (10.5, 10.0, 10.1), 2),  # nor does it win
    ],
)
def test_the_simpler_stands_unless_two_measurements_put_it_behind(
    raced: tuple[float | None, ...], screened: tuple[float, ...], winner: int
) -> None:
    final = outcome(*raced)
    settled = _settled(final, None, screened)
    assert settled.winner == winner and settled.tie == (winner == SIMPLE)
    assert settled.times == final.times and settled.baselines_us == final.baselines_us


def test_the_simplest_of_those_that_nobody_is_ahead_of_wins() -> None:
    settled = _settled(outcome(10.2, 9.95, 9.94), None, (10.3, 10.0, 10.0))
    assert (settled.winner, settled.tie) == (1, True)
    by_the_third = _settled(outcome(10.0, 9.7, 9.75), None, (10.0, 9.99, 9.0))
    assert (by_the_third.winner, by_the_third.tie) == (1, False)


def test_the_tolerance_is_the_tables() -> None:
    for ratio, winner in ((1 + 1.01 * TOLERANCE, FAST), (1 + 0.99 * TOLERANCE, SIMPLE)):
        assert _settled(outcome(10 * ratio, 10.0), None, (20 * ratio, 20.0)).winner == winner


def test_what_an_earlier_race_decided_stands() -> None:
    decided = outcome(10.2, 10.0, winner=FAST, tie=False)
    assert _settled(outcome(10.0, 10.0), decided, (10.0, 10.0)) == outcome(10.0, 10.0, winner=FAST, tie=False)
    other_way = outcome(9.9, 10.0, winner=FAST, tie=False)
    assert _settled(other_way, outcome(9.9, 10.0, tie=False), (10.0, 10.0)) == other_way, "no tie: the later counts"
    undecided = outcome(10.1, 10.0)
    assert _settled(undecided, undecided, (10.1, 10.0)) == undecided
    contradicted = outcome(10.0, 9.9, 11.0)
    assert _settled(contradicted, outcome(10.1, 10.2, 10.0, winner=2, tie=False), (10.0, 9.9, 11.0)) == contradicted
    alone = outcome(None, 10.0, winner=FAST, tie=False)
    assert _settled(outcome(10.0, 10.0), alone, (10.0, 10.0)) == outcome(10.0, 10.0), "it had no rival there"
    lost = outcome(10.0, None, 10.1)
    assert _settled(lost, replace(decided, winner=FAST), (10.0, 10.0, 10.1)) == lost, "who won before did not finish"


class Undecided(Analytic):
    """Its races with baselines end in ties for the slowest; those without decide, or do so too."""

    def __init__(self, root: Path, ties_alone: bool = True, ties: bool = True) -> None:
        super().__init__(root)
        self.ties_alone, self.ties = ties_alone, ties
        self.fastest_us: dict[str, float] = {}
        """By bucket, of the contestants of its last race."""

    def outcome(self, bucket: Bucket, final: Final, alone: bool) -> Final:
        times = [t.median_us for t in final.times if t]
        self.fastest_us[bucket.key] = min(times)
        tie = self.ties_alone if alone else self.ties
        return replace(final, winner=times.index(max(times)), tie=True) if tie else final


class Close(Undecided):
    """Kernels are within one percent of each other, which the search does not see: its times are up to 20% off."""

    def __init__(self, root: Path, ties_alone: bool, ties: bool) -> None:
        super().__init__(root, ties_alone, ties)
        self.off = 0.2

    def time(self, config: Config, bucket: Bucket, splits: int) -> Time:
        digits = random.Random(f"{config.describe()} {bucket}").uniform(1, 1.01)
        us = digits * limit_us(PROBLEM, SHAPE, bucket, TARGET)
        return Time(us, us, us)


class Contrary(Undecided):
    """What the search finds slow its races find fast, and the reverse."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.slowest_us: dict[str, float] = {}

    def outcome(self, bucket: Bucket, final: Final, alone: bool) -> Final:
        times = [t.median_us for t in final.times if t]
        self.slowest_us[bucket.key] = max(times)
        mirrored = (min(times) + max(times) - us for us in times)
        final = super().outcome(bucket, final, alone)
        return replace(final, times=tuple(Time(us, us, us) for us in mirrored), winner=times.index(min(times)))


def served(evaluator: Undecided) -> dict[str, tuple[str, float]]:
    """Bucket -> kernel of the table and its time."""
    result, _, _ = search(evaluator.root, evaluator, evidence="measured", trials=40, race_timeout_s=30.0)
    entries = result.table.by_batch_and_context
    times = {Bucket(e.batch, e.timing.context, e.timing.ragged).key: (e.kernel, e.timing.time_us) for e in entries}
    assert set(times) == {b.key for b in BUCKETS}
    return times


def test_a_tie_with_the_baselines_does_not_undo_what_kernels_alone_decided(tmp_path: Path) -> None:
    decides, ties, never = (
        served(Close(tmp_path / name, *how))
        for name, how in {"decides": (False, False), "ties": (False, True), "never": (True, True)}.items()
    )
    assert ties == decides != never


def test_no_tie_makes_a_table_serve_what_is_known_to_be_beyond_its_tolerance(tmp_path: Path) -> None:
    undecided = Undecided(tmp_path)
    times = served(undecided)
    assert len(undecided.alone) > 1
    assert all(us <= (1 + TOLERANCE) * undecided.fastest_us[key] for key, (_, us) in times.items())


def test_a_tie_stands_where_race_and_search_contradict_each_other(tmp_path: Path) -> None:
    contrary = Contrary(tmp_path)
    times = served(contrary)
    assert len(contrary.alone) > 1
    for key, (_, us) in times.items():
        assert us == contrary.slowest_us[key] > (1 + TOLERANCE) * contrary.fastest_us[key]
