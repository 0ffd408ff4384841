"""Statistics of samples, who runs in which round of a race, and races and short runs of calls with known times."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from tuner.measure import Sample, declare_winner, paired_ratio
from tuner.measure.clock import Clock
from tuner.measure.samples import LEAST_PAIRS
from tuner.measure.timer import Timer, unthrottled
from tuner.measure.turns import Turns, least_samples, short_samples


def noisy(median: float, n: int, seed: int, spread: float = 0.02) -> list[float]:
    rng = random.Random(seed)
    return [median * (1 + rng.gauss(0, spread)) for _ in range(n)]


def test_sample_brackets_the_median() -> None:
    sample = Sample.of(noisy(50, 400, 1))
    assert sample.ci_low_us < 50 < sample.ci_high_us
    assert sample.n == 400
    assert sample.relative_ci < 0.01
    assert Sample.of(noisy(50, 10, 1)).relative_ci > sample.relative_ci
    assert Sample.of([7.0]) == Sample(7.0, 7.0, 7.0, 1)


def test_intervals_hold_as_often_as_they_say() -> None:
    samples = [Sample.of(noisy(100, 40, seed)) for seed in range(200)]
    held = sum(s.ci_low_us <= 100 <= s.ci_high_us for s in samples)
    assert 0.88 < held / 200 <= 1


def test_paired_ratio_cancels_what_both_share() -> None:
    drift = [1 + 0.3 * i / 40 for i in range(40)]
    a = [d * t for d, t in zip(drift, noisy(98, 40, 1, 0.005), strict=True)]
    b = [d * t for d, t in zip(drift, noisy(100, 40, 2, 0.005), strict=True)]
    ratio, low, high = paired_ratio(a, b)
    assert low < ratio < high < 1
    assert ratio == pytest.approx(0.98, abs=0.004)
    assert paired_ratio(a, a) == (1, 1, 1)


def test_winner_only_where_the_interval_excludes_one() -> None:
    rounds = {"simple": noisy(100, 40, 1), "fast": noisy(90, 40, 2), "same": noisy(99.8, 40, 3)}
    assert declare_winner(rounds, ["simple", "fast", "same"]) == ("fast", False)
    assert declare_winner({k: rounds[k] for k in ("simple", "same")}, ["simple", "same"]) == ("simple", True)
    assert declare_winner(rounds, ["fast", "same", "simple"]) == ("fast", False)
    assert declare_winner({"only": [1.0]}, ["only"]) == ("only", False)


def test_of_identical_kernels_the_simpler_one_stands() -> None:
    """The more complex one must not win more often than the interval allows, however few rounds there were."""
    for pairs in (1, 2, 3, LEAST_PAIRS - 1, LEAST_PAIRS, 8, 16):
        wins = sum(
            declare_winner({"a": noisy(100, pairs, 2 * i), "b": noisy(100, pairs, 2 * i + 1)}, ["a", "b"])[0] == "b"
            for i in range(400)
        )
        assert wins / 400 <= 0.06, pairs


def test_few_rounds_tell_a_plain_difference_and_no_small_one() -> None:
    for pairs in (1, 2, LEAST_PAIRS - 1):
        slow = noisy(100, pairs, 1, 0.002)
        assert declare_winner({"a": slow, "b": [t * 0.97 for t in slow]}, ["a", "b"]) == ("a", True)
        assert declare_winner({"a": slow, "b": [t * 0.80 for t in slow]}, ["a", "b"]) == ("b", False)


def test_a_plain_difference_stands_whatever_single_rounds_say() -> None:
    """Samples of a race at 128 x 128k on an H200, paired by size, whose clock sank within one of them."""
    slow, fast = [5087.3, 5088.3, 5256.2], [4771.5, 4778.6, 5617.9]
    assert paired_ratio(fast, slow)[2] > 1
    assert declare_winner({"a": slow, "b": fast}, ["a", "b"]) == ("b", False)


@pytest.mark.parametrize(("ratio", "rounds"), [(6, 6), (20, 16), (100, 16)])
def test_a_far_slower_kernel_that_sits_rounds_out_never_wins(ratio: float, rounds: int) -> None:
    turns = Turns({"simple": 20.0 * ratio, "fast": 20.0})
    times: dict[str, list[float | None]] = {"simple": [], "fast": []}
    for number in range(rounds):
        ran = turns.in_round(number)
        for name, us in (("simple", 20.0 * ratio), ("fast", 20.0)):
            times[name].append(us if name in ran else None)
    assert declare_winner(times, ["simple", "fast"]) == ("fast", False)


def test_contestants_that_never_met_are_told_by_their_medians() -> None:
    apart: dict[str, list[float | None]] = {"a": [100.0, None, 101.0, None], "b": [None, 80.0, None, 80.5]}
    assert declare_winner(apart, ["a", "b"]) == ("b", False)
    assert declare_winner({"a": apart["a"], "b": [None, 98.0, None, 98.5]}, ["a", "b"]) == ("a", True)


def test_rounds_that_one_sat_out_do_not_count() -> None:
    fast, slow = noisy(90, 64, 2), [t if i % 8 == 0 else None for i, t in enumerate(noisy(100, 64, 1))]
    ratio, _, high = paired_ratio(fast, slow)
    assert ratio == paired_ratio(fast[::8], [t for t in slow if t])[0] and high < 1
    assert declare_winner({"slow": slow, "fast": fast}, ["slow", "fast"]) == ("fast", False)


def share_of_time(times_us: dict[str, float], rounds: int) -> dict[str, float]:
    turns = Turns(times_us)
    spent = dict.fromkeys(times_us, 0.0)
    for number in range(rounds):
        for name in turns.in_round(number):
            spent[name] += times_us[name]
    return spent


def test_slow_contestants_do_not_fill_a_race() -> None:
    times_us = {"ours": 20.0, "twin": 60.0, "bf16": 900.0, "triton": 80_000.0}
    spent = share_of_time(times_us, 2000)
    assert spent["ours"] == 2000 * 20 and spent["twin"] == 2000 * 60  # both in every round
    for name in ("bf16", "triton"):
        least = least_samples(times_us[name]) * times_us[name]
        assert least <= spent[name] <= least + 4 * 2000 * (20 + 150)


def test_everyone_has_its_least_samples_after_the_first_rounds_and_meets_everyone() -> None:
    times_us = {"a": 10.0, "b": 3000.0, "c": 9000.0, "d": 70_000.0}
    turns = Turns(times_us)
    rounds = [set(turns.in_round(i)) for i in range(3000)]
    for name, us in times_us.items():
        assert sum(name in r for r in rounds[: turns.least_rounds]) >= least_samples(us)
    for slower, faster in (("d", "c"), ("c", "b"), ("b", "a")):
        assert all(faster in r for r in rounds if slower in r)


def test_short_runs_are_shorter_for_slow_calls() -> None:
    counts = [short_samples(us, 9) for us in (10, 2000, 4000, 8000, 300_000)]
    assert counts == [9, 9, 5, 2, 2]


def test_a_throttled_round_counts_only_where_someone_has_no_other() -> None:
    rounds = [{"a": 1.0, "b": 2.0}, {"a": 1.0}, {"a": 1.0, "b": 2.0}]
    assert unthrottled(rounds, [False, True, False]) == [0, 2]
    assert unthrottled(rounds, [True, False, True]) == [0, 1, 2]
    assert unthrottled(rounds, [True, False, False]) == [1, 2]


# A timer whose calls take the time that they say: all of it but the GPU.


class Simulated(Timer):
    """``replay`` returns its time in us; a sample costs that long, sped up a thousand times."""

    def __init__(self) -> None:
        self.clock = Clock("no such device")
        self.runs: list[int] = []

    def _batch(self, replays: list[Callable[[], float]]) -> list[float]:  # type: ignore[override]
        times = [replay() for replay in replays]
        self.runs.append(len(times))
        time.sleep(sum(times) * 1e-9)
        return times


def call(us: float, spread: float = 0.005, seed: int = 0) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: us * (1 + rng.gauss(0, spread))


def test_a_race_is_fair_to_the_fast_and_short_on_the_slow() -> None:
    calls = {"a": call(50, seed=1), "b": call(49, seed=2), "slow": call(9000, seed=3), "slowest": call(80_000, seed=4)}
    rounds, samples = Simulated().race(calls, budget_s=5)  # type: ignore[arg-type]
    assert all(s.relative_ci < 0.01 for s in samples.values())
    assert len({len(times) for times in rounds.values()}) == 1  # a place for each round, None where one sat out
    assert samples["a"].n == samples["b"].n == len(rounds["a"]) >= 16
    assert samples["slowest"].n <= samples["slow"].n < samples["a"].n / 4
    assert samples["slowest"].n >= least_samples(80_000)
    for name, us in (("a", 50), ("slow", 9000), ("slowest", 80_000)):
        assert samples[name].median_us == pytest.approx(us, rel=0.01)
    assert declare_winner(rounds, ["a", "b", "slow", "slowest"])[0] == "b"


def test_a_race_without_time_still_gives_everyone_its_least_samples() -> None:
    calls = {"noisy": call(50, 0.2, 1), "slow": call(9000, 0.2, 2)}
    rounds, samples = Simulated().race(calls, budget_s=-1.0)  # type: ignore[arg-type]
    assert {n: s.n for n, s in samples.items()} == {"noisy": LEAST_PAIRS, "slow": 2}
    assert rounds["slow"][2] is None


def test_noise_takes_more_rounds() -> None:
    quiet, loud = Simulated(), Simulated()
    for timer, spread in ((quiet, 0.001), (loud, 0.05)):
        timer.race({"a": call(50, spread, 1)}, budget_s=2)  # type: ignore[dict-item]
    assert len(loud.runs) > 2 * len(quiet.runs)


def test_a_short_run_takes_few_samples_of_a_slow_call() -> None:
    timer = Simulated()
    for us, samples in ((10, 9), (4000, 5), (300_000, 2)):
        timer.runs.clear()
        sample = timer.short(call(us))  # type: ignore[arg-type]
        assert sample.n == samples and sample.median_us == pytest.approx(us, rel=0.02)
        assert sum(timer.runs) <= samples + (3 if us < 20_000 else 1)  # and to warm up
