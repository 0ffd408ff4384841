"""The search over the constants of the Triton baseline, with a formula and with compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.baselines import SHIPPED, Constants, TritonConstants, split_name
from tuner.search import TuneRequest
from tuner.search.rivals import CHOSEN, probes, select, sweep
from tuner.space import Problem
from tuner.targets import get_target
from tuner.toolchain import ToolchainError
from tuner.workload import Bucket, Shape, default_buckets

PROBLEM = Problem("decode", 256, 8, "turboquant_4bit_nc")
BASE = TritonConstants(block_kv=16, num_warps=4, num_stages=2, splits=32, block_h=16)


def formula(c: Constants) -> dict[str, float]:
    """Best at block_h 16, three stages; few splits suit the short probe, many the long one."""
    assert isinstance(c, TritonConstants)
    cost = 10.0 / c.block_h + abs(c.num_stages - 3) + abs(math.log2(c.num_warps / 4)) + 1
    return {"short": cost * (1 + c.splits / 8), "long": cost * (1 + 64 / c.splits)}


Tried = tuple[tuple[Constants, ...], list[Constants]]


def run(problem: Problem = PROBLEM, limit: int = 12, **changes: object) -> Tried:
    tried: list[Constants] = []

    def measure(constants: Constants) -> Mapping[str, float]:
        tried.append(constants)
        return formula(constants)

    options = {"seed": 0, "limit": limit, "budget_s": 60.0, "tell": lambda text: None} | changes
    return sweep(problem, measure, **options), tried  # type: ignore[arg-type]


def test_climbs_from_the_shipped_constants() -> None:
    found, tried = run(limit=24)
    assert tried[0] == SHIPPED["decode"] and len(tried) == 24 == len(set(tried))
    assert found[0].num_stages == 3 and 1 <= len(found) <= CHOSEN["decode"]
    best = {b: min(formula(c)[b] for c in found) for b in ("short", "long")}
    assert all(best[b] < formula(SHIPPED["decode"])[b] / 2 for b in best)
    assert run(limit=24)[1] == tried, "the same seed tries the same"
    assert not [c for c in tried if c.refusal(PROBLEM)]  # type: ignore[union-attr]


def test_budget_and_limit_hold() -> None:
    assert len(run(limit=5)[1]) == 5
    assert run(budget_s=0.0) == ((), [])


def test_what_does_not_run_is_not_chosen() -> None:
    broken = replace(BASE, splits=64)
    tried = {broken: {}, BASE: {"a": 2.0, "b": 2.0}, replace(BASE, splits=16): {"a": 1.0}}
    assert select(tried, 3) == (BASE,)
    assert select({broken: {}}, 3) == ()


def test_choice_covers_what_the_best_is_slow_on() -> None:
    long, even, useless = (replace(BASE, splits=n) for n in (64, 32, 16))
    tried = {long: {"a": 9.0, "b": 1.0}, even: {"a": 2.0, "b": 2.0}, useless: {"a": 2.0, "b": 3.0}}
    assert select(tried, 3) == (even, long)
    assert select(tried, 1) == (even,)


def test_probes_are_small_and_large() -> None:
    assert [b.key for b in probes(default_buckets())] == ["b1_c1024", "b1_c65536", "b64_c1024", "b64_c65536"]
    assert probes((Bucket(4, 65536, ragged=True),)) == (Bucket(4, 65536, ragged=True),)


def test_a_format_without_the_kernel_has_no_rivals() -> None:
    assert run(Problem("decode", 256, 8, "turboquant_seed")) == ((), [])


def test_predicted_rivals_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.search import predicted

    problem, shape = Problem("decode", 64, 4, "turboquant_4bit_nc"), Shape(64, 32, 8)
    buckets = (Bucket(1, 1024), Bucket(16, 16384))
    request = TuneRequest(problem, shape, buckets, get_target("sm_121"), "predicted", root=tmp_path)
    monkeypatch.setattr(predicted, "TRITON_TRIALS", 2)
    try:
        evaluator = predicted.PredictedEvaluator(request)
    except ToolchainError as error:
        pytest.skip(f"no compiler: {error}")
    names = evaluator.rivals(lambda text: None, 30.0)
    assert names and all(split_name(n)[0] == "triton" and split_name(n)[1] for n in names)
    folders = sorted((tmp_path / "triton").rglob("facts.json"))
    times = predicted.PredictedEvaluator(request)._baselines_us(buckets[1], names)
    assert set(times) == {"triton", *names}
    shipped = times["triton"]
    assert shipped and min(t for n in names if (t := times[n])) < shipped
    assert sorted((tmp_path / "triton").rglob("facts.json")) == folders, "nothing is compiled again"
